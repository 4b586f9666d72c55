"""Training data that a served model writes: distillation from a teacher seen only from outside."""
