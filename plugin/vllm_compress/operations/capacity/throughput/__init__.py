"""How fast a deployment is: a roofline, and simulated continuous batching."""
