"""Python imports this module in every process that a watched run starts."""

from bench.trust import mutations

mutations.join()
