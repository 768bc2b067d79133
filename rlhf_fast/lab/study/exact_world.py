"""An enumerable language model with a known reward, preference pairs from it, and a reward model learned from them.

The reference is a table of random logits. The true reward sums a random worth of every token and of every two tokens
next to each other; under the reference it has mean 0 and deviation 1. The reward model is a table of the same shape as
the policy's, so that it and DPO's implicit reward are fitted from one class of functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.exact import Completions, TabularPolicy, completions, expected_reward
from rlhf_fast.lab.study.config import ExactStudyConfig
from rlhf_fast.ops import reward_loss

REWARD_MODEL_STEPS = 200
HELD_OUT = 0.2


class World(NamedTuple):
    """A reference over N completions of T tokens, and the true reward of each."""

    completions: Completions
    reference: TabularPolicy
    ref_token_logprobs: Tensor  # [N, T]
    ref_logprobs: Tensor  # [N]
    rewards: Tensor  # [N], true

    def new_policy(self) -> TabularPolicy:
        """The reference again, to be trained."""
        policy = TabularPolicy(self.completions)
        policy.load_state_dict(self.reference.state_dict())
        return policy


def make_world(config: ExactStudyConfig) -> World:
    """The world of `config.world_seed`."""
    generator = torch.Generator().manual_seed(config.world_seed)
    V = config.vocab_size
    everything = completions(V, config.length)
    reference = TabularPolicy(everything).requires_grad_(False)
    reference.logits.normal_(generator=generator)
    worth_V, worth_VV = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((V,), (V, V)))
    tokens_NT = everything.tokens
    rewards_N = worth_V[tokens_NT].sum(1) + worth_VV[tokens_NT[:, :-1], tokens_NT[:, 1:]].sum(1)
    token_logprobs, logprobs = reference.token_logprobs(), reference()
    rewards_N = rewards_N - expected_reward(logprobs, rewards_N)
    rewards_N = rewards_N / expected_reward(logprobs, rewards_N.square()).sqrt()
    return World(everything, reference, token_logprobs, logprobs, rewards_N)


def sample_pairs(world: World, number: int, generator: torch.Generator) -> Tensor:
    """Indices [number, 2] of completions from the reference, labelled by Bradley-Terry: the preferred one first."""
    pairs = torch.multinomial(world.ref_logprobs.exp(), 2 * number, True, generator=generator).view(number, 2)
    first_wins = (world.rewards[pairs[:, 0]] - world.rewards[pairs[:, 1]]).sigmoid()
    swap = torch.rand(number, generator=generator, dtype=torch.float64) >= first_wins
    return torch.where(swap[:, None], pairs.flip(1), pairs)


def learn_rewards(world: World, pairs: Tensor, learning_rate: float) -> Tensor:
    """Scores [N] of the reward model with the least loss on held-out pairs, mean 0 under the reference."""
    model = TabularPolicy(world.completions)  # its logits as rewards of a token after a prefix
    held_out, training = pairs.split([int(HELD_OUT * len(pairs)), len(pairs) - int(HELD_OUT * len(pairs))])
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    best, best_loss = torch.zeros_like(world.rewards), float("inf")
    for _ in range(REWARD_MODEL_STEPS):
        scores = model.logits[model.nodes, model.tokens].sum(-1)
        loss = reward_loss(scores[held_out[:, 0]], scores[held_out[:, 1]]).loss.item()
        if loss < best_loss:
            best, best_loss = scores.detach(), loss
        optimizer.zero_grad()
        reward_loss(scores[training[:, 0]], scores[training[:, 1]]).loss.backward()
        optimizer.step()
    return best - expected_reward(world.ref_logprobs, best)
