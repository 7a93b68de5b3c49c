"""The decoder in CUDA kernels of our own. Not yet a backend: nothing here is reached by a command.

What exists: the kernels in ``kernels/`` (CUDA C++ that NVRTC compiles and that the tests run on a CPU), and the Python
that names a kernel's template arguments and packs its parameters. What does not exist yet: the loader over
cuda-bindings, the plan of a decoder's launches, and a run on a GPU.
"""
