"""Calibration text: the user's, or the model's own."""
