"""Sampling: prompts to completions with their log-probs. It knows tokens and models, but neither text nor rewards."""
