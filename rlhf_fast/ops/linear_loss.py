"""linear_loss: a loss of your own from hidden states, its gradient taken in the forward pass as the built-in ones do.

Leaves out torch.compile: your function is Python that an operator cannot hold.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rlhf_fast.ops import private, reference
from rlhf_fast.ops.checks import check_dims, check_option, expect, shown
from rlhf_fast.ops.dispatch import has_kernel
from rlhf_fast.ops.gradients import Context, hand_over, hold
from rlhf_fast.ops.heads import Gradients, Head, loss_in_forward, pack_rows
from rlhf_fast.ops.linear import check_head, wants_gradients
from rlhf_fast.ops.linear_ops import over
from rlhf_fast.ops.policy_options import check_normalizer
from rlhf_fast.ops.reference import IGNORED_ID, no_autocast
from rlhf_fast.ops.results import LinearLoss

PACKS = ("token", "row", "pair")
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    coefficients: Losses,
    *,
    pack: str = "token",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> LinearLoss:
    """A loss of your own of log-probs and entropies, from hidden states: loss = sum of the items' losses / normalizer.

    Three products with the weight, two where weight and bias are frozen, and never [N, V] logits: `coefficients` is
    called on one pack of the batch after another, and autograd's gradient of its result goes into the logits of the
    pack while they are there. `linear_token_logprobs` with the same loss behind it needs four products.

    GSPO (arXiv 2507.18071, eq. 5 and 7), the ratio of whole sequences clipped::

        def gspo(logprobs, entropy, rows):  # [b, T], [b, T] and which rows of the batch they are, [b]
            counts = mask[rows]
            log_ratio = ((logprobs - old_logprobs[rows]) * counts).sum(1) / counts.sum(1)
            ratio, A = log_ratio.exp(), advantages[rows]
            return -torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)  # [b]

        out = linear_loss(hidden, weight, token_ids.masked_fill(~mask, -100), gspo, pack="row")
        out.loss.backward()

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients
            flow to hidden, weight and bias.
        coefficients: function of (logprobs, entropy, index) that returns the loss of each item of a pack, not yet
            summed or averaged. The losses' derivatives by log-probs and entropies, which autograd takes, are the
            coefficients of the tokens. What else the function reads is a constant. A pack has any number of items.
        pack: what an item is, and so what the function sees at once:
            "token"  counted tokens: logprobs, entropy [n]; index [n], their places in token_ids.flatten(); returns [n]
            "row"    whole rows of token_ids [B, T]: logprobs, entropy [b, T]; index [b]; returns [b]
            "pair"   rows i and B + i of token_ids [2B, T], chosen and rejected: logprobs, entropy [2, b, T]; index [b],
                     the i; returns [b]
            Tokens with the id -100 hold 0 in a row, and their gradient is dropped. An item with no counted token is
            left out: its loss is 0.
        normalizer: > 0, replaces the number of counted tokens, of rows B or of pairs B; for a row's or pair's mean over
            the tokens of the batch pass their number.

    Returns:
        LinearLoss(loss, logprobs, entropy): the loss 0-dim, the others [...], detached, 0 where masked; float32
        (float64 if an input is).

    Raises:
        ValueError: as `linear_token_logprobs`; an unknown pack; token_ids that are not [B, T], or for pairs an odd
            number of rows; normalizer <= 0; coefficients that return another shape than one floating-point number
            per item, or another device. An error that coefficients raise goes on as it is.
        RuntimeError: under torch.compile, which would need `coefficients` as an operator: call it eagerly; a second
            backward pass, as the gradients are handed over in the first.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_loss: runs eagerly only; keep its caller out of torch.compile (torch.compiler.disable)"
        )
    check_option("pack", pack, PACKS)
    expect(callable(coefficients), "coefficients", "a function of (logprobs, entropy, index)", shown(coefficients))
    if pack != "token":
        check_dims("token_ids", token_ids, "BT")
    if pack == "pair":
        expect(len(token_ids) % 2 == 0, "token_ids", "an even number of rows, chosen then rejected", [*token_ids.shape])
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    check_normalizer(normalizer, hidden)
    token_ids = token_ids.long()
    items = _Items(coefficients, pack, token_ids)
    scale = over(torch.ones((), dtype=torch.bool), items.normalizer() if normalizer is None else normalizer)
    if private.in_transform() or not has_kernel("linear_weighted_loss", hidden):
        return _plain(items, scale, hidden, weight, bias, token_ids, temperature, softcap)
    wanted = wants_gradients(hidden, weight, bias)

    def compute() -> tuple[LinearLoss, Gradients]:
        options = temperature, softcap or 0.0, budget, wanted
        with no_autocast(hidden):
            return _in_forward(Head(hidden, weight, bias, token_ids, *options, scaled_later=True), items, scale)

    return LinearLoss(*_Function.apply(compute, hidden, weight, bias)) if any(wanted) else compute()[0]


class _Items:
    """The user's function, and the items of the batch that it gives a loss each."""

    def __init__(self, losses: Losses, pack: str, token_ids: Tensor) -> None:
        self.losses, self.pack, self.ids = losses, pack, token_ids
        self.sides = 2 if pack == "pair" else 1
        self.number = token_ids.numel() if pack == "token" else len(token_ids) // self.sides

    def normalizer(self) -> int | Tensor:
        return (self.ids != IGNORED_ID).sum() if self.pack == "token" else max(self.number, 1)

    def packs(self, tokens: Tensor, most: int) -> Iterable[Tensor]:
        """The counted tokens [n], places in the flattened batch, in packs of whole items, about `most` tokens each."""
        if not len(tokens):
            return []
        return tokens.split(most) if self.pack == "token" else pack_rows(tokens, self.number, self.ids.shape[1], most)

    def of(self, tokens: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(index, losses) of the items that the tokens of one pack make up."""
        if self.pack == "token":
            index = tokens
        else:
            T = self.ids.shape[1]
            row = tokens // T
            index, nth = torch.unique_consecutive(row % self.number, return_inverse=True)
            shape = (len(index), T) if self.sides == 1 else (2, len(index), T)
            places = (row // self.number * len(index) + nth) * T + tokens % T
            logprobs, entropy = (
                x.new_zeros(shape).view(-1).index_copy(0, places, x).view(shape) for x in (logprobs, entropy)
            )
        losses = self._called(logprobs, entropy, index)
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        expected = f"a function that returns shape [{len(index)}], one per {self.pack}"
        expect(isinstance(losses, Tensor) and got == [len(index)], "coefficients", expected, got)
        expect(
            losses.is_floating_point(), "coefficients", "a function that returns floating-point losses", losses.dtype
        )
        expected = f"a function that returns losses on {logprobs.device}"
        expect(losses.device == logprobs.device, "coefficients", expected, losses.device)
        return index, losses

    def _called(self, logprobs: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        """The function's result. Its error goes on as it is, with a note of what the function was given."""
        try:
            return self.losses(logprobs, entropy, index)
        except Exception as error:
            add_note = getattr(error, "add_note", None)  # from Python 3.11 on
            if add_note is not None:
                given = f"logprobs and entropy {list(logprobs.shape)}, index {list(index.shape)}"
                add_note(f"linear_loss: raised by coefficients, which got {given} (pack={self.pack!r})")
            raise


def _in_forward(head: Head, items: _Items, scale: Tensor) -> tuple[LinearLoss, Gradients]:
    each = head.hidden.new_zeros(items.number, dtype=head.dtype)

    def coefficients(tokens: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            leaves = logprobs.requires_grad_(), entropy.requires_grad_()
            index, losses = items.of(tokens, *leaves)
            by_logprobs = by_entropy = None
            if losses.requires_grad:
                by_logprobs, by_entropy = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        each[index] = losses.detach().to(head.dtype)
        by_logprobs = torch.zeros_like(logprobs) if by_logprobs is None else by_logprobs
        return by_logprobs * scale, None if by_entropy is None else by_entropy * scale

    packs = list(items.packs(head.rows, head.chunk_rows))
    logprobs, entropy = loss_in_forward(head, packs, coefficients)
    if not head.makes_gradients:  # an evaluation has called `coefficients` on no pack
        for tokens in packs:
            index, losses = items.of(tokens, logprobs[tokens], entropy[tokens])
            each[index] = losses.to(head.dtype)
    shape = items.ids.shape
    loss = (each.sum(dtype=torch.float64) * scale).to(head.dtype)
    return LinearLoss(loss, logprobs.view(shape), entropy.view(shape)), head.gradients()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, compute: Callable[[], tuple[LinearLoss, Gradients]], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        out, gradients = compute()
        hold(ctx, list(gradients), list(inputs))
        ctx.mark_non_differentiable(out.logprobs, out.entropy)
        return tuple(out)

    @staticmethod
    def backward(ctx: Context, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return None, *hand_over(ctx, "linear_loss", upstream, ctx.needs_input_grad[1:])


def _plain(
    items: _Items,
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float | None,
) -> LinearLoss:
    """Where there is no kernel, and under torch.func: the whole batch is one pack, and its gradients are autograd's."""
    out = reference.linear_token_logprobs(
        hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap
    )
    tokens = (token_ids.reshape(-1) != IGNORED_ID).nonzero().squeeze(1)
    total = out.logprobs.sum() * 0
    for pack in items.packs(tokens, len(tokens)):
        total = total + items.of(pack, *(x.reshape(-1)[pack] for x in out))[1].sum()
    return LinearLoss(total * scale.to(total.dtype), *(x.detach() for x in out))
