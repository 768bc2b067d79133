"""Triton kernels, one file per operation. Installed as rlhf_fast.kernels, never imported as a top-level `kernels`."""
