"""The recipe: what becomes of which modules, read from YAML. Needs no torch."""
