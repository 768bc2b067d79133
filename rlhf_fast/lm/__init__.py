"""One language model: loading it, one pass through it, and the losses and scores of that pass."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.lm")
