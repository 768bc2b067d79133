"""An optimizer that moves every weight in the backward pass, as soon as the weight's gradient is there, and frees it.

With several processes the gradient of a weight is first added up over the processes, which all have to come to the same
weight next. Their backward passes may reach the weights in other orders, as where one process packs its rows, and a
process without rows makes no pass. So the weights move in one order, from the last weight of the model to the first,
and `finish` moves those that a pass did not reach.

FSDP2 adds up the gradients of a model in shards itself, a layer at a time, and then calls the hooks of the weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlhf_fast.lm.sharding import full, is_part
from rlhf_fast.ranks import current
from rlhf_fast.training.optimizers import MasterWeights


class InBackward:
    """The steps of one optimizer in the backward pass.

    alone: whether nothing else is added up over the processes in the backward pass, such as a layer in shards.
    Otherwise the weights that are whole in every process wait for `finish`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer | MasterWeights,
        *,
        alone: bool,
    ) -> None:
        self.optimizer, self.ranks, self.norms = optimizer, current(), list[Tensor]()
        parameters = list(parameters)
        self._order = [p for p in reversed(parameters) if not is_part(p)]
        self._moved, self._alone = 0, alone
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def finish(self) -> None:
        """Moves the weights that wait. All processes call it after a backward pass, and once more in a step."""
        if self.ranks.size > 1:
            for parameter in self._order[self._moved :]:
                self._add_up(parameter)

    def take_norm(self, device: torch.device) -> Tensor:
        """The norm of all gradients of a step, 0-dim on `device`; the next step begins."""
        self.finish()
        self._moved = 0
        norms, self.norms = self.norms, []
        groups = [[n for n in norms if is_part(n)], [n for n in norms if not is_part(n)]]
        found = [full(torch.stack(group).norm()) for group in groups if group]
        # A step may have no gradient, as where no pair of online DPO has a preference.
        return torch.stack(found).norm() if found else torch.zeros((), device=device)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self.ranks.size == 1 or is_part(parameter):
            self._move(parameter)
            return
        while self._alone and self._moved < len(self._order) and self._order[self._moved].grad is not None:
            self._add_up(self._order[self._moved])

    def _add_up(self, parameter: nn.Parameter) -> None:
        self._moved += 1
        self.ranks.add_gradients([parameter])
        if parameter.grad is not None:
            self._move(parameter)

    def _move(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # torch calls the hook when the gradient is there
        self.norms.append(norm_of(parameter.grad))
        # A gradient that waits for its turn would move its weight without the other processes' gradients.
        waiting = [(p, p.grad) for p in self._order[self._moved :] if p is not parameter and p.grad is not None]
        for other, _ in waiting:
            other.grad = None
        self.optimizer.step()  # moves this weight alone: no other has a gradient at this moment
        parameter.grad = None
        for other, gradient in waiting:
            other.grad = gradient


def norm_of(gradient: Tensor) -> Tensor:
    """0-dim, in fp32 for half precision, whose own numbers have two or three digits."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
