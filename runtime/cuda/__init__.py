"""The decoder in CUDA kernels of our own. Not yet a backend: nothing here is reached by a command.

What exists: the kernels in ``kernels/`` (CUDA C++ that NVRTC compiles); the Python that names a kernel's template
arguments and packs its parameters; the plan of a decoder's launches from its layout, behind the interface of the
in-place KV cache. The tests run whole decoders on a CPU. What does not exist yet: the device over cuda-bindings, the
optimized copy with cubins, tensor cores, decoding as one CUDA graph a token, and a run on a GPU.
"""
