"""Searches for the stored values of least error, which formats share."""
