"""One-token steps of a language model over a KV cache, for many rows at once. `rlhf_fast.rollout` drives them."""
