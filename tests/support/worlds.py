"""What the tests of `rlhf_fast.exact` share: random distributions, rewards and tables, and a comparison at 1e-8."""

import torch

from rlhf_fast import exact


def close(got, expected, tolerance=1e-8):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=tolerance)


def random_logprobs(*shape, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def random_rewards(*shape, seed=100):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tabular(completions, leading=(), seed=0, spread=1.0):
    policy = exact.TabularPolicy(completions, leading)
    with torch.no_grad():
        policy.logits.normal_(0.0, spread, generator=torch.Generator().manual_seed(seed))
    return policy
