"""Results in forms that others take, and what others quantized taken over."""
