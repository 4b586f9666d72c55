"""The ways of asking a teacher, one a file."""
