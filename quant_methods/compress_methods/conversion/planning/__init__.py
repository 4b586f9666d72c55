"""What a conversion will do, decided before any work."""
