"""Tokens out of a model: the engine, answer constraints, and chat on top of them."""
