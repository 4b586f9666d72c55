"""Commands on live traffic: `gateway`, `rollout` and `drain`."""
