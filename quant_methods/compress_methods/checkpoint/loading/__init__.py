"""Checkpoints as models of transformers: unpacked, or packed with our kernels."""
