"""Codes and small floats in bytes, and the groups of columns that share a scale."""
