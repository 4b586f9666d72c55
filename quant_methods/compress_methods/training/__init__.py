"""training: winning back what compression lost, by gradients from the original (extra `train`)."""
