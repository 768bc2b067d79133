"""One language model: loading it, one pass through it, and the losses and scores of that pass."""
