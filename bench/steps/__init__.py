"""Whole steps: where their time goes, beside the bare matmuls of the same shapes and beside memory bandwidth."""
