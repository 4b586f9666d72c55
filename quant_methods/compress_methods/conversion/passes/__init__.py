"""What becomes of a model while it streams by, one file per pass."""
