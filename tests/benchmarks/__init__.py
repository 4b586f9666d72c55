"""Every figure of the README and of results/README.md comes from here: `make bench`."""
