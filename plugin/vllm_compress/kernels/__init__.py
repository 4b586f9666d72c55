"""vLLM's own kernels for our formats, and ours for other projects' checkpoints."""
