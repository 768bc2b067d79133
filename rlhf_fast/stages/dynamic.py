"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts whose samples all score the same are replaced.

Such a prompt has advantages of 0, so that it only makes the batch smaller. A process replaces its own prompts by those
that it has sampled more, in their order. What cannot be replaced stays.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.rollout.generate import Rollout


class Drawn(NamedTuple):
    """B completions and what the reward says of them; the samples of a prompt are consecutive."""

    rollout: Rollout
    scores: Tensor  # [B]
    greedy_scores: Tensor | None  # one for each prompt
    parts: dict[str, Tensor]  # of several rewards: name -> scores [B]


def even(scores: Tensor, samples: int) -> Tensor:
    """Which prompts have equal scores for all their samples, [B / samples] bool. scores: [B]."""
    groups_PS = scores.view(-1, samples)
    return (groups_PS == groups_PS[:, :1]).all(dim=1)


def replaced(first: Drawn, more: Drawn, samples: int, pad: int) -> Drawn:
    """`first` with its `even` prompts replaced by those of `more` that are not, as far as these go. pad: a token id."""
    places, found = even(first.scores, samples).nonzero()[:, 0], (~even(more.scores, samples)).nonzero()[:, 0]
    number = min(len(places), len(found))
    index = torch.arange(len(first.scores) // samples, device=first.scores.device)
    index[places[:number]] = found[:number] + len(index)
    rows = (index[:, None] * samples + torch.arange(samples, device=index.device)).view(-1)
    parts = {name: torch.cat([x, more.parts[name]])[rows.to(x.device)] for name, x in first.parts.items()}
    rollout = joined(first.rollout, more.rollout, pad).rows(rows)
    return Drawn(rollout, torch.cat([first.scores, more.scores])[rows], first.greedy_scores, parts)


def joined(first: Rollout, second: Rollout, pad: int) -> Rollout:
    """The rows of both, padded to the longer prompts and responses."""
    longest = [max(x.shape[1], y.shape[1]) for x, y in ((first[0], second[0]), (first[2], second[2]))]
    fields = []
    for name, x, y in zip(Rollout._fields, first, second, strict=True):
        if x is None or y is None:
            fields.append(None)
            continue
        value = pad if name.endswith("_ids") else 0
        if x.dim() > 1:
            x, y = (
                _padded(t, longest[not name.startswith("prompt")], value, name.startswith("prompt")) for t in (x, y)
            )
        fields.append(torch.cat([x, y]))
    return Rollout(*fields)


def _padded(x: Tensor, length: int, value: int, left: bool) -> Tensor:
    more = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + ((more, 0) if left else (0, more)), value=value)
