"""What models without a next token are judged by: embeddings, labels, masked tokens, pairs."""
