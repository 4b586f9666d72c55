"""Products with wrapper formats: the base keeps the kernel it would have alone."""
