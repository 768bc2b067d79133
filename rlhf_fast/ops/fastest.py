"""Which back end runs an operator on a GPU, by size; `python -m bench gpu` measures it and writes a patch of this file.

Not measured yet: the table is empty, and Triton runs every operator where it is there.
"""

FASTEST: dict[str, tuple[tuple[int, str], ...]] = {}
"""By operator, (elements of its first tensor from which the back end runs, back end), the sizes ascending."""
