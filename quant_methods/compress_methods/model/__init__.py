"""The model without its weights: modules, names, and running it block by block."""
