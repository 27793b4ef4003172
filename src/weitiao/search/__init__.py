"""Many trainings of one recipe, compared: a search over its settings, a learning curve over its rows."""
