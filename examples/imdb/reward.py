"""The ground-truth reward of this example: P(positive) by a bag-of-words classifier trained on the reviews' labels.

Logistic regression on which words and word pairs a text holds, hashed into a table of weights; `prepare.py` trains it.
`positive` reads it from the file named by RLHF_FAST_IMDB_CLASSIFIER, by default data/classifier.pt beside this file.
"""

import functools
import os
import re
import zlib
from pathlib import Path

import torch

BUCKETS = 2**18
_WORD = re.compile(r"[a-z']+|[!?]")


def features(text: str) -> list[int]:
    """Buckets of the text's words and pairs of neighbouring words, each once: repeating a word changes nothing."""
    words = _WORD.findall(text.lower())
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    return sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in words + pairs})


def logits(weight: torch.Tensor, bias: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """log P(positive) / P(negative) of every text."""
    return table_sums(weight, *table(texts), len(texts)) + bias


def table(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(text number, bucket) of every feature of every text."""
    found = [features(text) for text in texts]
    rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(buckets) for buckets in found]))
    return rows, torch.tensor([bucket for buckets in found for bucket in buckets], dtype=torch.int64)


def table_sums(weight: torch.Tensor, rows: torch.Tensor, buckets: torch.Tensor, n: int) -> torch.Tensor:
    """Sum of every text's weights."""
    return torch.bincount(rows, weights=weight[buckets], minlength=n)


@functools.cache
def _classifier() -> dict[str, torch.Tensor]:
    default = Path(__file__).parent / "data" / "classifier.pt"
    path = Path(os.environ.get("RLHF_FAST_IMDB_CLASSIFIER", default))
    if not path.is_file():
        raise ValueError(f"RLHF_FAST_IMDB_CLASSIFIER: no classifier at {path}; prepare.py writes one")
    return torch.load(path, weights_only=True)


def positive(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """P(positive) of every prompt with its completion."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    classifier = _classifier()
    return torch.sigmoid(logits(classifier["weight"], classifier["bias"], texts)).tolist()
