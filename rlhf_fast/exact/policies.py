"""All completions of a small vocabulary and length, and two kinds of policy that give each of them a log-probability.

Left out: sampling (draw from `exp(logprobs)`), and vocabularies of which only a part is enumerated.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.ops.checks import expect

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # causal_lm_logprobs alone needs transformers

MAX_COMPLETIONS = 2**20


class Completions(NamedTuple):
    """Every completion once, in lexicographic order."""

    tokens: Tensor  # [N, T] int64; the EOS token after the first EOS
    mask: Tensor  # [N, T] bool, True = counts: up to and with the first EOS
    vocab_size: int


def completions(vocab_size: int, length: int, *, eos_token_id: int | None = None) -> Completions:
    """All sequences of `length` tokens; with an EOS token also all shorter sequences that end with it.

    Raises:
        ValueError: sizes < 1, an EOS token outside the vocabulary, or vocab_size ** length beyond 2 ** 20.
    """
    expect(vocab_size >= 1, "vocab_size", "at least 1", vocab_size)
    expect(length >= 1, "length", "at least 1", length)
    expect(vocab_size**length <= MAX_COMPLETIONS, "length", f"at most {MAX_COMPLETIONS} completions", length)
    expect(
        eos_token_id is None or 0 <= eos_token_id < vocab_size, "eos_token_id", f"in [0, {vocab_size})", eos_token_id
    )
    tokens_NT = torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)
    if eos_token_id is None:
        return Completions(tokens_NT, torch.ones_like(tokens_NT, dtype=torch.bool), vocab_size)
    eos_NT = tokens_NT == eos_token_id
    ended_NT = eos_NT.cumsum(1) > eos_NT.long()  # by an earlier token
    canonical_N = (eos_NT | ~ended_NT).all(1)
    return Completions(tokens_NT[canonical_N], ~ended_NT[canonical_N], vocab_size)


def greedy(logprobs: Tensor, completions: Completions) -> Tensor:
    """Index [...] of the completion that takes the likeliest next token at every step; ties go to the lower id.

    logprobs: [..., N], of whole completions; the next token's probabilities are their marginals.
    """
    _check_logprobs(logprobs, completions)
    rows_BN = logprobs.detach().reshape(-1, logprobs.shape[-1])
    return torch.stack([_greedy_row(row_N, completions) for row_N in rows_BN]).view(logprobs.shape[:-1])


def _greedy_row(logprobs_N: Tensor, completions: Completions) -> Tensor:
    left = torch.arange(len(logprobs_N), device=logprobs_N.device)  # completions that agree with the tokens so far
    for next_N in completions.tokens.to(logprobs_N.device).T:
        mass_V = logprobs_N.new_zeros(completions.vocab_size).index_add(0, next_N[left], logprobs_N[left].exp())
        left = left[next_N[left] == mass_V.argmax()]
    return left[0]


class TabularPolicy(nn.Module):
    """One softmax for every prefix: pi(y) = prod_t softmax(logits[prefix y_<t])[y_t]. Any distribution fits.

    logits: [..., prefixes, V], float64, the parameter; leading axes are prompts (and seeds). Prefixes stand in heap
    order: the empty one is 0, and prefix i followed by token a is V i + 1 + a. The logits start as zeros, which
    make every softmax uniform. Logits of prefixes behind an EOS are never used.
    """

    nodes: Tensor
    tokens: Tensor
    mask: Tensor

    def __init__(self, completions: Completions, leading: tuple[int, ...] = ()) -> None:
        super().__init__()
        V = completions.vocab_size
        nodes_NT = torch.zeros_like(completions.tokens)
        for t in range(1, nodes_NT.shape[1]):
            nodes_NT[:, t] = V * nodes_NT[:, t - 1] + 1 + completions.tokens[:, t - 1]
        prefixes = sum(V**t for t in range(nodes_NT.shape[1]))
        for name, buffer in {"nodes": nodes_NT, "tokens": completions.tokens, "mask": completions.mask}.items():
            self.register_buffer(name, buffer, persistent=False)
        self.logits = nn.Parameter(torch.zeros(*leading, prefixes, V, dtype=torch.float64))

    def token_logprobs(self, rows: Tensor | None = None) -> Tensor:
        """[..., N, T] of all completions, or [..., R, T] of those at `rows` [R]; 0 where masked. Differentiable."""
        keep = slice(None) if rows is None else rows
        logprobs = self.logits.log_softmax(-1)[..., self.nodes[keep], self.tokens[keep]]
        return torch.where(self.mask[keep], logprobs, 0.0)

    def forward(self) -> Tensor:
        """Log-probabilities [..., N] of all completions. Differentiable."""
        return self.token_logprobs().sum(-1)

    @torch.no_grad()
    def set_logprobs(self, logprobs: Tensor) -> None:
        """Becomes the distribution exp(logprobs), [..., N]: logits = log of the mass that goes through each branch.

        Raises ValueError where the shape is not [*leading, N].
        """
        *leading, prefixes, V = self.logits.shape
        expect(list(logprobs.shape) == [*leading, len(self.tokens)], "logprobs",
               f"shape {[*leading, len(self.tokens)]}", list(logprobs.shape))  # fmt: skip
        branch_NT = self.nodes * V + self.tokens
        mass = self.logits.new_zeros(*leading, prefixes * V)
        mass.index_add_(-1, branch_NT[self.mask], logprobs.exp()[..., self.mask.nonzero()[:, 0]].to(mass))
        mass = mass.view(self.logits.shape)
        reached = mass.sum(-1, keepdim=True) > 0
        self.logits.copy_(torch.where(reached, mass.log(), 0.0))


def causal_lm_logprobs(
    model: "PreTrainedModel",
    prompt_ids: Tensor,
    completions: Completions,
    *,
    prompt_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities [P, N], float64, of all completions after each prompt; differentiable in the model's weights.

    One forward pass a prompt over N rows, in the model's dtype; the softmax is float64.

    Args:
        prompt_ids: [P, L] int64, padded on the left where prompt_mask [P, L] bool is False (default: nowhere).

    Raises:
        ValueError: a model whose vocabulary is not the completions', ids that are not [P, L], temperature <= 0.
        ImportError: the extra `[train]` is not installed.
    """
    from rlhf_fast.lm.passes import response_logits
    from rlhf_fast.lm.sequences import Sequences

    V, N = completions.vocab_size, len(completions.tokens)
    expect(
        model.config.vocab_size == V, "model", f"a vocabulary of {V} tokens, as completions", model.config.vocab_size
    )
    expect(prompt_ids.dim() == 2, "prompt_ids", "shape [P, L]", list(prompt_ids.shape))
    expect(temperature > 0, "temperature", "a number > 0", temperature)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask
    device = prompt_ids.device
    responses = Completions(completions.tokens.to(device), completions.mask.to(device), V)
    rows = []
    for ids_L, mask_L in zip(prompt_ids, prompt_mask, strict=True):
        prompt = ids_L.expand(N, -1), mask_L.expand(N, -1)
        logits_NTV = response_logits(model, Sequences(*prompt, responses.tokens, responses.mask))
        logprobs_NTV = (logits_NTV.double() / temperature).log_softmax(-1)
        logprobs_NT = logprobs_NTV.gather(-1, responses.tokens[..., None])[..., 0]
        rows.append(torch.where(responses.mask, logprobs_NT, 0.0).sum(-1))
    return torch.stack(rows)


def _check_logprobs(logprobs: Tensor, completions: Completions) -> None:
    N = len(completions.tokens)
    expect(logprobs.shape[-1:] == (N,), "logprobs", f"shape [..., {N}]", list(logprobs.shape))
