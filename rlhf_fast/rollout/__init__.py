"""Sampling: prompts to completions with their log-probs. It knows tokens and models, but neither text nor rewards."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.rollout")
