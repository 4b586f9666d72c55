"""Layer methods of vLLM for compressed matrices: generic over formats."""
