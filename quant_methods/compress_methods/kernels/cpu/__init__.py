"""Products with weights of few bits on CPUs: C++ sources, their compilation and their calls.

Sources are compiled on first use for the instruction set of the machine (`build`) and run on
torch's own threads (`library`). Only `operators.cpp` knows torch, by its stable ABI.
"""
