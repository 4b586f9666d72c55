"""What users lose before a perplexity shows it: questions whose answers a program can check."""
