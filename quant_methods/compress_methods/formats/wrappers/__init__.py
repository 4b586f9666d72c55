"""Formats around another format, which stores the matrix in another basis, order or size."""
