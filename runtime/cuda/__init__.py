"""The backend ``cuda-decoder``: the decoder in CUDA kernels of this project. Not run on a GPU yet.

``kernels/`` has the kernels (CUDA C++ that NVRTC compiles). ``kernel.py``, ``products.py`` and ``steps.py`` name their
template arguments and pack their parameters. ``layout.py`` and ``copy_files.py`` describe a decoder and the files of a
copy, which ``optimize --backend cuda-decoder`` makes (``optimization/cuda_kernels``). ``plan.py`` makes the launches
of a run; ``decoding/`` runs them on an in-place KV cache, with one CUDA graph for each token, and chooses or draws
tokens. ``device/`` is the GPU, over cuda-bindings; ``backend.py`` opens a bundle. The tests run whole decoders on a
CPU. What does not exist yet: T5.
"""
