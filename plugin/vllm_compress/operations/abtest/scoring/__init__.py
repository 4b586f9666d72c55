"""From answers to scores, from scores to intervals and verdicts."""
