"""Commands about a result: what it holds, what it lost, how it divides."""
