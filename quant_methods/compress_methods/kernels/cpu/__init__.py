"""Products with weights of few bits on CPUs: C++ sources, their compilation and their calls.

`gemm.cpp` is compiled on first use for the instruction set of the machine (`build`) and called
through ctypes on torch's own threads (`library`). Sources need no header of torch's.
"""
