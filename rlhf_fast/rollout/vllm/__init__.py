"""Completions of a stock vLLM server over HTTP: its routes, what is asked of it, the weights that it gets."""
