"""Inputs that are wrong in thousands of ways; `python -m tests.robustness` writes what came of
them into tests/README.md."""
