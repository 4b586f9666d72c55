"""What a model takes: shapes, stored bytes, KV cache."""
