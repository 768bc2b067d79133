"""A GPU's kernels on CPU tensors, with no GPU and no nvcc, for the tests and `python -m bench exactness`.

triton_on_cpu   Triton's kernels in its interpreter
cuda_on_cpu     the back end "cuda" on the module that cuda_on_host compiles
cuda_on_host    compiles csrc/cuda with a C++ compiler; include/ stands in for CUDA's headers
"""
