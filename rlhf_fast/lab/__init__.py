"""The laboratory: the demo and its world, the studies, the bandits and the comparison of methods."""
