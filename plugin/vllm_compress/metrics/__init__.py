"""Prometheus series of a deployment, beside those of vLLM on its `/metrics`."""
