"""Factors moved between matrices without a change of what a block computes."""
