"""What training lowers: predictions, inner states, and text the student writes."""
