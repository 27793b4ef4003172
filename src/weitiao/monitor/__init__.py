"""A run shown to people while it trains: other tools fed with its figures, and what its folder tells of it."""
