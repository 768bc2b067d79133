"""The neural bandit's networks, one of each per seed: stacked weights, batched matrix products.

Weights start as torch's own linear layers do, uniform within 1 / sqrt(inputs), from the seed's own random numbers.
They are float64, because part of the reward's gradient is 0 but for rounding. AdamW would turn float32's rounding,
which differs with the batch, into full steps.

Left out: everything but what the bandit's rewards and policies need.

Shapes: S seeds, M states, D = 50 numbers in a state, A = 10 actions, 64 hidden units.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_fast.lab.bandit.problem import uniforms

STATE_SIZE, ACTIONS, HIDDEN = 50, 10, 64
Activation = Callable[[Tensor], Tensor]


class Layers(nn.Module):
    """Linear layers of the given widths with an activation between them, [S, M, widths[0]] -> [S, M, widths[-1]]."""

    def __init__(
        self, seeds: Sequence[int], stream: int, widths: Sequence[int], activation: Activation = torch.relu
    ) -> None:
        super().__init__()
        self.activation = activation
        shapes = list(zip(widths[:-1], widths[1:], strict=True))
        flat = 2 * uniforms(seeds, stream, (sum((rows + 1) * columns for rows, columns in shapes),)) - 1
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for rows, columns in shapes:
            weight, bias, flat = flat.split((rows * columns, columns, flat.shape[1] - (rows + 1) * columns), 1)
            self.weights.append((weight / rows**0.5).view(-1, rows, columns))
            self.biases.append((bias / rows**0.5)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """[S, M, widths[0]] -> [S, M, widths[-1]]."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])


class AdditiveReward(nn.Module):
    """r(s, a) = linear(network(s), network(a)), [S, M, D] -> [S, M, A]: every state orders the actions alike."""

    def __init__(self, seeds: Sequence[int], stream: int, hidden_layers: int, activation: Activation) -> None:
        super().__init__()
        hidden = [HIDDEN] * hidden_layers
        self.activation = activation
        self.of_state = Layers(seeds, stream, (STATE_SIZE, *hidden), activation)
        self.of_action = Layers(seeds, stream + 1, (ACTIONS, *hidden), activation)
        self.head = Layers(seeds, stream + 2, (2 * HIDDEN, 1))

    def forward(self, states: Tensor) -> Tensor:
        """r(s, a) of every action, [S, M, D] -> [S, M, A]."""
        (weight,), (bias,) = self.head.weights, self.head.biases
        of_state = self.activation(self.of_state(states)) @ weight[:, :HIDDEN]
        actions = torch.eye(ACTIONS, dtype=states.dtype, device=states.device).expand(len(states), -1, -1)
        of_action = self.activation(self.of_action(actions)) @ weight[:, HIDDEN:]
        return of_state + of_action.transpose(1, 2) + bias


class JointReward(nn.Module):
    """r(s, a) = one network on s and the one-hot a together, [S, M, D] -> [S, M, A].

    first_scale multiplies the first layer's weights.
    """

    def __init__(
        self, seeds: Sequence[int], stream: int, hidden_layers: int, activation: Activation, first_scale: float = 1.0
    ) -> None:
        super().__init__()
        widths = (STATE_SIZE + ACTIONS, *[HIDDEN] * hidden_layers, 1)
        self.activation = activation
        self.first = Layers(seeds, stream, widths[:2])
        self.rest = Layers(seeds, stream + 1, widths[1:], activation)
        with torch.no_grad():
            self.first.weights[0].mul_(first_scale)

    def forward(self, states: Tensor) -> Tensor:
        """r(s, a) of every action, [S, M, D] -> [S, M, A]."""
        (weight,), (bias,) = self.first.weights, self.first.biases
        of_state = torch.baddbmm(bias, states, weight[:, :STATE_SIZE])
        hidden = self.activation(of_state[:, :, None] + weight[:, None, STATE_SIZE:])  # one-hot a selects a row
        return self.rest(hidden.flatten(1, 2)).view(*states.shape[:2], ACTIONS)


Reward = AdditiveReward | JointReward
