"""Random arguments of every public operation, by name: shapes from empty to some tokens, options, dtypes, layouts."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "apo_zero", "apo_down", "sppo_hard", "discopop")


class Draw:
    """Draws arguments. rng: of the choices; the numbers in tensors come from a generator seeded by it."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        self.dtype = rng.choice(DTYPES)
        self.B, self.T, self.V = (
            rng.choice((0, 1, 2, 3, 7)),
            rng.choice((0, 1, 2, 5, 17)),
            rng.choice((1, 2, 11, 33, 130)),
        )
        self.H = rng.choice((1, 4, 9, 16))

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in a random layout."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.laid_out(values.to(dtype or self.dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values, contiguous, transposed, with gaps, or with an offset."""
        way = self.rng.randrange(5)
        if way == 1 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if way == 2 and x.dim():
            wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
            wide[..., ::2] = x
            return wide[..., ::2]
        if way == 3 and x.dim():
            wide = x.new_zeros(x.shape[0] + 1, *x.shape[1:])
            wide[1:] = x
            return wide[1:]
        return x

    def logprobs(self, *shape: int) -> Tensor:
        """Numbers below 0, some near 0."""
        return self.laid_out(-self.floats(*shape, scale=2.0).abs())

    def mask(self, *shape: int) -> Tensor:
        """Bools: some True, all, or none."""
        share = self.rng.choice((0.0, 0.5, 0.8, 1.0))
        return self.laid_out(torch.rand(shape, generator=self.generator) < share)

    def ids(self, *shape: int) -> Tensor:
        """Token ids, int64 or int32, some -100."""
        found = torch.randint(0, self.V, shape, generator=self.generator)
        ignored = torch.rand(shape, generator=self.generator) < self.rng.choice((0.0, 0.2))
        return self.laid_out(found.masked_fill(ignored, -100).to(self.rng.choice((torch.int64, torch.int32))))

    def maybe(self, value: Any) -> Any:
        """The value or None."""
        return value if self.rng.random() < 0.5 else None

    def heads(self) -> Arguments:
        """What is common to logits."""
        return {"temperature": self.rng.choice((1.0, 0.7, 2.5)), "softcap": self.rng.choice((None, None, 5.0))}


def _logits(d: Draw) -> Arguments:
    scale = d.rng.choice((0.1, 1.0, 10.0))
    return {"logits": d.floats(d.B, d.T, d.V, scale=scale), "token_ids": d.ids(d.B, d.T), **d.heads()}


def _token_kl(d: Draw) -> Arguments:
    found = _logits(d)
    return found | {"ref_logits": d.floats(d.B, d.T, d.V)}


def _linear(d: Draw, rows: int | None = None) -> Arguments:
    rows = d.B if rows is None else rows
    hidden, weight = d.floats(rows, d.T, d.H), d.floats(d.V, d.H)
    bias = d.maybe(d.floats(d.V))
    budget = d.rng.choice((None, 1 << 12, 1 << 20))
    return (
        {"hidden": hidden, "weight": weight, "token_ids": d.ids(rows, d.T), "bias": bias}
        | d.heads()
        | {"memory_budget": budget}
    )


def _tokens(d: Draw) -> Arguments:
    return {"old_logprobs": d.logprobs(d.B, d.T), "advantages": d.floats(d.B, d.T), "mask": d.mask(d.B, d.T)}


def _ppo_options(d: Draw) -> Arguments:
    reference = d.maybe(d.logprobs(d.B, d.T))
    objective = d.rng.choice(("clip", "clip", "cispo", "sapo"))
    bounds = {"clip": d.rng.choice((0.2, (0.1, 0.3))), "cispo": d.rng.choice((1.5, 5.0)), "sapo": None}
    level = d.rng.choice(("token", "sequence_token"))
    return {
        "objective": objective,
        "importance_sampling_level": level,
        "clip": bounds[objective],
        "dual_clip": d.rng.choice((None, 2.0)) if objective == "clip" else None,
        "use_bias_correction_kl": level == "token" and d.rng.random() < 0.5,
        "ref_logprobs": reference,
        "kl_coef": 0.0 if reference is None else 0.3,
        "kl_estimator": d.rng.choice(("k1", "k2", "k3", "abs")),
        "reduction": d.rng.choice(("token_mean", "sequence_mean", "sequence_sum")),
        "normalizer": d.rng.choice((None, 3.0, torch.tensor(5.0))),
    }


def _dpo(d: Draw) -> Arguments:
    loss = d.rng.choice(LOSSES)
    smoothing = d.rng.choice((0.1, 0.3)) if loss in ("sigmoid", "robust", "exo_pair") else 0.0
    return {"beta": d.rng.choice((0.1, 0.5)), "loss_type": loss, "label_smoothing": smoothing}


def _kto(d: Draw) -> Arguments:
    labels = torch.rand(d.B, generator=d.generator) < 0.5
    options = {"loss_type": d.rng.choice(("kto", "apo_zero_unpaired")), "desirable_weight": 2.0}
    return {"ref_logps": d.floats(d.B), "labels": labels, "kl": d.rng.choice((0.4, torch.tensor(0.7)))} | options


def _square(logprobs: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
    return (logprobs * logprobs).flatten(1).sum(1) if logprobs.dim() > 1 else logprobs * logprobs - 0.1 * entropy


def _uniforms(d: Draw) -> Tensor:
    return torch.rand(d.B, generator=d.generator, dtype=torch.float64)


CALLS: dict[str, Callable[[Draw], Arguments]] = {
    "token_logprobs": _logits,
    "token_kl": _token_kl,
    "linear_token_logprobs": _linear,
    "linear_token_kl": lambda d: (
        _linear(d)
        | {"ref_hidden": d.floats(d.B, d.T, d.H), "ref_weight": d.floats(d.V, d.H), "ref_bias": d.maybe(d.floats(d.V))}
    ),
    "linear_loss": lambda d: _linear(d) | {"coefficients": _square, "pack": d.rng.choice(("token", "row"))},
    "linear_sft_loss": lambda d: _linear(d) | {"normalizer": d.rng.choice((None, 3.0))},
    "linear_reinforce_loss": lambda d: _linear(d) | {"advantages": d.floats(d.B), "mask": d.mask(d.B, d.T)},
    "linear_ppo_loss": lambda d: _linear(d) | _tokens(d) | _ppo_options(d),
    "linear_dpo_loss": lambda d: (
        _linear(d, 2 * d.B) | {"ref_chosen_logps": d.floats(d.B), "ref_rejected_logps": d.floats(d.B)} | _dpo(d)
    ),
    "linear_kto_loss": lambda d: _linear(d) | _kto(d),
    "sample_tokens": lambda d: {
        "logits": d.floats(d.B, d.V, scale=2.0),
        "temperature": d.rng.choice((1.0, 0.7)),
        "greedy_mask": d.maybe(d.mask(d.B)),
        "uniforms": _uniforms(d),
    },
    "kl_penalty": lambda d: {
        "logprobs": d.logprobs(d.B, d.T),
        "ref_logprobs": d.logprobs(d.B, d.T),
        "estimator": d.rng.choice(("k1", "k2", "k3", "abs")),
    },
    "shape_rewards": lambda d: {
        "scores": d.floats(d.B),
        "logprobs": d.logprobs(d.B, d.T),
        "ref_logprobs": d.logprobs(d.B, d.T),
        "mask": d.mask(d.B, d.T),
        "kl_coef": 0.1,
        "clip": d.rng.choice((None, 0.5)),
    },
    "gae": lambda d: {
        "rewards": d.floats(d.B, d.T),
        "values": d.floats(d.B, d.T),
        "mask": d.mask(d.B, d.T),
        "gamma": d.rng.choice((1.0, 0.9)),
        "lam": d.rng.choice((1.0, 0.95, 0.0, d.floats(d.B).sigmoid())),
        "value_lam": d.rng.choice((None, 1.0)),
    },
    "length_adaptive_lambda": lambda d: {"lengths": d.floats(d.B).abs(), "alpha": d.rng.choice((0.05, 2.0))},
    "soft_overlong_punishment": lambda d: (
        {"lengths": 20 * d.floats(d.B).abs(), "max_length": 20} | {"soft_punish_cache": d.rng.choice((1, 5))}
    ),
    "discounted_returns": lambda d: {"rewards": d.floats(d.B, d.T), "mask": d.mask(d.B, d.T), "gamma": 0.9},
    "whiten": lambda d: {"x": d.floats(d.B, d.T), "mask": d.mask(d.B, d.T), "shift_mean": d.rng.random() < 0.5},
    "remax_returns": lambda d: {
        "scores": d.floats(d.B),
        "greedy_scores": d.floats(d.B),
        "logprobs": d.logprobs(d.B, d.T),
        "ref_logprobs": d.logprobs(d.B, d.T),
        "mask": d.mask(d.B, d.T),
        "kl_coef": 0.1,
        "gamma": d.rng.choice((1.0, 0.9)),
        "clip": d.rng.choice((None, 1.0)),
    },
    "rloo_advantages": lambda d: {"scores": d.floats(4 * d.B), "group_size": d.rng.choice((2, 4))},
    "grpo_advantages": lambda d: {"scores": d.floats(4 * d.B), "group_size": d.rng.choice((2, 4))},
    "ppo_loss": lambda d: {"logprobs": d.logprobs(d.B, d.T)} | _tokens(d) | _ppo_options(d),
    "ppo_value_loss": lambda d: {
        "values": d.floats(d.B, d.T),
        "old_values": d.floats(d.B, d.T),
        "returns": d.floats(d.B, d.T),
        "mask": d.mask(d.B, d.T),
    },
    "reinforce_loss": lambda d: {
        "logprobs": d.logprobs(d.B, d.T),
        "advantages": d.floats(*d.rng.choice(((d.B,), (d.B, d.T)))),
        "mask": d.mask(d.B, d.T),
        "reduction": d.rng.choice(("token_mean", "sequence_mean", "sequence_sum")),
    },
    "reward_loss": lambda d: {
        "chosen_scores": d.floats(d.B),
        "rejected_scores": d.floats(d.B),
        "margin": d.maybe(d.floats(d.B).abs()),
        "center_coef": d.rng.choice((0.0, 0.1)),
    },
    "ranking_loss": lambda d: {
        "scores": d.floats(d.B, d.T),
        "ranks": torch.randint(-1, 3, (d.B, d.T), generator=d.generator),
    },
    "dpo_loss": lambda d: (
        {name: d.floats(d.B) for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")}
        | _dpo(d)
    ),
    "kto_loss": lambda d: {"logps": d.floats(d.B)} | _kto(d),
}
"""Operation -> its arguments. The tensors that get gradients are `LEAVES`, where they are floating point."""
LEAVES = ("logits", "hidden", "weight", "bias", "logprobs", "values", "chosen_scores", "rejected_scores", "scores")
LEAVES += ("chosen_logps", "rejected_logps", "logps")
