"""The neural contextual bandit of arXiv 2312.10584: random rewards, preferences, optimality gaps.

States are uniform on [-1, 1]^50, actions are 0..9, the true reward is r + sign(r) of a random tanh network:
- additive, as published: r = linear(tanh(W s), tanh(V e_a)) orders the actions alike in every state, and the sign keeps
  the order: one action is best everywhere, and the bandit is contextual in name only.
- contextual: r = linear(tanh(W [s, e_a])) with W uniform on [-1, 1]. With torch's default, an eighth of that, it would
  be nearly additive.

As in the linear bandit a seed's draws do not depend on the other seeds, those of a smaller n or m open those of a
larger one, and the published code's order of random numbers is left out.

Shapes: S seeds, n preferences, M states, D = 50 numbers in a state, A = 10 actions. Tensors are float64.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlhf_fast.lab.bandit.networks import ACTIONS, HIDDEN, STATE_SIZE, AdditiveReward, JointReward, Layers, Reward
from rlhf_fast.lab.bandit.problem import draw_pairs, label, uniforms

RewardForm = Literal["additive", "contextual"]
EVALUATION_STATES = 5000
_PAIRS, _NEW_STATES, _EVALUATION, _FRESH_STATES, _FRESH_PAIRS = range(5)  # streams of random numbers
_TRUTH, _LEARNED, _POLICY = 10, 20, 30  # the first streams of the networks, which take several each


class Draws(NamedTuple):
    """What one run of the experiment draws."""

    states: Tensor  # [S, n, D]
    winners: Tensor  # [S, n] int64
    losers: Tensor  # [S, n] int64
    new_states: Tensor  # [S, m, D]


class TrueReward(NamedTuple):
    """r + sign(r) of a random network r."""

    network: Reward

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """r(s, a), [S, M, D] -> [S, M, A]."""
        rewards = self.network(states)
        return rewards + rewards.sign()


class Evaluation(NamedTuple):
    """The 5000 states per seed on which the published code measures every policy and the best one."""

    states: Tensor  # [S, M, D]
    rewards: Tensor  # [S, M, A] true ones

    @torch.no_grad()
    def gap(self, policy: Layers) -> Tensor:
        """mean_s[max_a r(s, a) - sum_a pi(a|s) r(s, a)], [S]."""
        return self._gap(policy(self.states).softmax(-1))

    def uniform_gap(self) -> Tensor:
        """The gap of the reference policy, [S]."""
        return self._gap(torch.full_like(self.rewards, 1 / ACTIONS))

    def single_action_gap(self) -> Tensor:
        """The gap of the best policy that does not look at the state, [S]."""
        best = self.rewards.mean(1).argmax(-1)
        return self._gap(one_hot(best, ACTIONS)[:, None].expand_as(self.rewards))

    def commonest_best_action(self) -> Tensor:
        """Share of the states whose best action is the one that is best most often, [S]."""
        return one_hot(self.rewards.argmax(-1), ACTIONS).double().mean(1).amax(-1)

    def _gap(self, probability: Tensor) -> Tensor:
        below = self.rewards.amax(-1, keepdim=True) - self.rewards
        return (below * probability).sum(-1).mean(-1)


def true_reward(seeds: Sequence[int], form: RewardForm) -> TrueReward:
    """The true reward of every seed, a random network of this form."""
    if form == "additive":
        return TrueReward(AdditiveReward(seeds, _TRUTH, 1, torch.tanh))
    return TrueReward(JointReward(seeds, _TRUTH, 1, torch.tanh, first_scale=(STATE_SIZE + ACTIONS) ** 0.5))


def learned_reward(seeds: Sequence[int], form: RewardForm) -> Reward:
    """The untrained reward model: the true reward's form with two hidden ReLU layers and no sign."""
    return (AdditiveReward if form == "additive" else JointReward)(seeds, _LEARNED, 2, torch.relu)


def initial_policy(seeds: Sequence[int]) -> Layers:
    """Logits of the actions, [S, M, D] -> [S, M, A]."""
    return Layers(seeds, _POLICY, (STATE_SIZE, HIDDEN, HIDDEN, ACTIONS))


def draw(seeds: Sequence[int], truth: TrueReward, n: int, m: int) -> Draws:
    """n labelled pairs of distinct actions, the label Bernoulli(sigmoid(r(s, a) - r(s, a'))), and m more states."""
    numbers = uniforms(seeds, _PAIRS, (n, STATE_SIZE + 3))
    states = _states(numbers[..., :STATE_SIZE])
    first, second = draw_pairs(numbers[..., STATE_SIZE:-1], ACTIONS)
    winners, losers = label(numbers[..., -1], truth(states), first, second)
    return Draws(states, winners, losers, _states(uniforms(seeds, _NEW_STATES, (m, STATE_SIZE))))


def evaluation(seeds: Sequence[int], truth: TrueReward) -> Evaluation:
    """The evaluation states of every seed, with their true rewards."""
    states = _states(uniforms(seeds, _EVALUATION, (EVALUATION_STATES, STATE_SIZE)))
    return Evaluation(states, truth(states))


def fresh(seeds: Sequence[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A large sample in place of all states: states [S, size, D] and a pair of distinct actions in each, [S, size]."""
    states = _states(uniforms(seeds, _FRESH_STATES, (size, STATE_SIZE)))
    return states, *draw_pairs(uniforms(seeds, _FRESH_PAIRS, (size, 2)), ACTIONS)


def _states(numbers: Tensor) -> Tensor:
    return 2 * numbers - 1
