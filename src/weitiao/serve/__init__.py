"""Answering requests: one thread owns the model; protocol, pages and feedback stand around it."""
