"""The GPU back ends: CUDA C++ and Triton. Nothing else in the package imports either."""
