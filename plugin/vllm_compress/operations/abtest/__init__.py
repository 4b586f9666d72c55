"""A/B tests of two running servers: replay prompts to both, compare with confidence, judge."""
