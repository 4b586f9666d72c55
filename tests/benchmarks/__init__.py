"""Every figure of the README comes from here: `make bench`."""
