"""Contextual bandits on which preference methods can be compared in seconds, and solved exactly (arXiv 2312.10584)."""
