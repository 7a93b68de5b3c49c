"""The decoder in CUDA kernels of this project. Not yet a backend: no command uses this package.

What exists: the kernels in ``kernels/`` (CUDA C++ that NVRTC compiles); the Python that names a kernel's template
arguments and packs its parameters; the plan of a decoder's launches from its layout, behind the interface of the
in-place KV cache; greedy decoding whose steps choose their tokens on the device, one CUDA graph a step; the device over
cuda-bindings (``device/``). The tests run whole decoders on a CPU.
What does not exist yet: the optimized copy with cubins, tensor cores, and a run on a GPU.
"""
