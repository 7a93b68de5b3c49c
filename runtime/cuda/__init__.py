"""The decoder in CUDA kernels of this project. Not yet a backend: no command uses this package.

What exists: the kernels in ``kernels/`` (CUDA C++ that NVRTC compiles); the Python that names a kernel's template
arguments and packs its parameters; the plan of a decoder's launches from its layout, behind the interface of the
in-place KV cache; greedy decoding whose steps choose their tokens on the device. The tests run whole decoders on a CPU.
What does not exist yet: the device over cuda-bindings, the optimized copy with cubins, tensor cores, the capture of a
step as a CUDA graph, and a run on a GPU.
"""
