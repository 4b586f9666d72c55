"""Fitting the roofline to a server that was measured."""
