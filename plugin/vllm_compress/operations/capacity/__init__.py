"""Capacity planning: what a model needs before it is converted or any machine is rented.

shapes       every matrix of a model, from file headers or a shipped list    (no torch)
storage      what a recipe makes of each matrix, in bytes
memory       weights, KV cache and overhead on each device; which splits vLLM allows
performance  seconds of one step of vLLM: roofline, or measured
speculation  the same with a draft that writes ahead
drafts       which drafts, and how often they are right
trace        requests as they came, from published forms of traces
simulation   continuous batching step by step, for percentiles
calibration  the measured step: by requests to a server, or from Prometheus
power        watts, energy and CO2, under assumptions that are said
plan         all of it for every scheme, machine and split; ranked, with reasons
schedule     replicas by the hour of a day
picture      cost against latency
"""
