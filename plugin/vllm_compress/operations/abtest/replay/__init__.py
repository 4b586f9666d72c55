"""Sending the same prompts to both servers and timing the answers."""
