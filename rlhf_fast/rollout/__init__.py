"""Sampling: prompts to completions with their log-probs. Knows tokens and models, neither text nor rewards."""
