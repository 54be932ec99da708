"""Measurements of round trips, a file a question."""
