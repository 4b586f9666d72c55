"""Searching a recipe for the setting that just meets a bound."""
