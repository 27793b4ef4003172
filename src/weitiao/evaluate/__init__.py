"""Predictions, their scores and the report of them: predict.py asks, score.py counts, report.py shows."""
