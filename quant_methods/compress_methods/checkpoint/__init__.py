"""Checkpoints on disk: read, written, checked, loaded."""
