"""Everything around a server: capacity planning, A/B tests, gateway, dashboard."""
