"""Live traffic between variants of a service: how it is split, and how the split changes.

`traffic_split` is the arithmetic. `nginx` and `route` write it down for nginx and for the
Kubernetes Gateway API. `control` makes a running one follow, `alerts` says whether it may.
"""
