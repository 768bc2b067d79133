"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts whose samples all score the same are replaced.

Such a prompt has advantages of 0, so that it only makes the batch smaller. The first prompt that has to go gets the
first of the further batch that has not, and so on, in the order of the batches of all processes. A prompt may so move
to another process. What cannot be replaced stays.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ranks import Ranks
from rlhf_fast.rollout.generate import Rollout


class Drawn(NamedTuple):
    """B completions and what the reward says of them; the samples of a prompt are consecutive."""

    rollout: Rollout
    scores: Tensor  # [B]
    greedy_scores: Tensor | None  # one for each prompt
    parts: dict[str, Tensor]  # of several rewards: name -> scores [B]

    def prompts(self, index: Tensor, samples: int) -> "Drawn":
        """The completions of these prompts, without greedy ones."""
        rows = (index[:, None] * samples + torch.arange(samples, device=index.device)).view(-1)
        parts = {name: x[rows.to(x.device)] for name, x in self.parts.items()}
        return Drawn(self.rollout.rows(rows), self.scores[rows], None, parts)

    def followed_by(self, more: "Drawn", pad: int) -> "Drawn":
        """The completions of both. pad: a token id for the longer prompts and responses."""
        parts = {name: torch.cat([x, more.parts[name]]) for name, x in self.parts.items()}
        scores = torch.cat([self.scores, more.scores])
        return Drawn(joined(self.rollout, more.rollout, pad), scores, self.greedy_scores, parts)

    def to(self, device: torch.device | str) -> "Drawn":
        """Rollout and scores on this device."""
        rollout = Rollout(*(None if x is None else x.to(device) for x in self.rollout))  # pyright: ignore[reportArgumentType]
        return self._replace(rollout=rollout, scores=self.scores.to(device))


def even(scores: Tensor, samples: int) -> Tensor:
    """Which prompts have equal scores for all their samples, [B / samples] bool. scores: [B]."""
    groups_PS = scores.view(-1, samples)
    return (groups_PS == groups_PS[:, :1]).all(dim=1)


def replaced(first: Drawn, more: Drawn, samples: int, pad: int, ranks: Ranks) -> Drawn:
    """`first` with its `even` prompts replaced by those of `more` that are not, as far as these go. pad: a token id.

    first, more: this process's shares of two batches of equally many prompts. All processes make the call.
    """
    evens_P, wanted_P = (ranks.cat(x) for x in (even(first.scores, samples), ~even(more.scores, samples)))
    places, found = evens_P.nonzero()[:, 0], wanted_P.nonzero()[:, 0]  # among the prompts of all processes
    number = min(len(places), len(found))
    if not number:
        return first
    part, device = ranks.part(len(evens_P)), first.scores.device
    found, places = (x[:number] for x in (found, places))
    given = more.prompts(found[_within(found, part)] - part.start, samples)
    taken, *others = [given] if ranks.size == 1 else [x.to(device) for x in ranks.gather(given.to("cpu"))]
    for other in others:
        taken = taken.followed_by(other, pad)
    mine, index = _within(places, part), torch.arange(part.stop - part.start, device=device)
    index[places[mine] - part.start] = mine.nonzero()[:, 0] + len(index)
    new = first.followed_by(taken, pad).prompts(index, samples)
    return new._replace(greedy_scores=first.greedy_scores)


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


def _within(numbers: Tensor, part: slice) -> Tensor:
    return (numbers >= part.start) & (numbers < part.stop)


def _padded(x: Tensor, length: int, value: int, left: bool) -> Tensor:
    more = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + ((more, 0) if left else (0, more)), value=value)
