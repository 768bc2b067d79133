"""`python -m bench static`: what is known of the GPU kernels without a GPU.

triton.py      Triton's kernels compiled for every arch; their registers, shared memory, spills and PTX
cuda.py        the CUDA C++ kernels as they were built, and as a driver compiles their PTX for a newer arch
occupancy.py   the warps that a multiprocessor holds, by its limits
traffic.py     bytes of global memory that every operator asks for, counted while its kernels run on the CPU
report.py      the tables, and what has changed since the committed ones
command.py     the command line
"""
