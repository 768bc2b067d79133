"""Makes the rows of the controlled-sentiment run from labelled reviews, and trains its ground-truth classifier.

    python prepare.py REVIEWS            REVIEWS holds train.jsonl.gz and test.jsonl.gz, rows with text and label (0, 1)

Written to data/ beside this file:
    sft.jsonl.gz          prompt = first 2 to 8 words of an excerpt of a review, completion = the rest of it
    sft_test.jsonl.gz     the same from the test reviews
    prompts.jsonl.gz      prompts of the training reviews
    prompts_test.jsonl.gz the first --prompts rows of sft_test.jsonl.gz, for evaluation
    classifier.pt         P(positive), see reward.py
An excerpt is a run of whole sentences of at most --words words, so that EOS stands where a sentence ends.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

import torch
from reward import BUCKETS, logits, table, table_sums

from rlhf_fast.data.rows import read_rows

OUT = Path(__file__).parent / "data"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def read_reviews(path: Path) -> list[tuple[str, int]]:
    reviews = []
    for where, row in read_rows(path):
        if not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
            raise ValueError(f"{where}: expected text (a string) and label (0 or 1), got {sorted(row)}")
        reviews.append((" ".join(row["text"].split()), row["label"]))
    return reviews


def excerpts(text: str, words: int, most: int) -> list[str]:
    """Up to `most` runs of whole sentences, each as long as fits in `words` words and at least half of that."""
    runs, length = [[]], 0
    for sentence in _SENTENCE_END.split(text):
        size = len(sentence.split())
        if length + size > words:
            runs.append([])
            length = 0
        runs[-1].append(sentence)
        length += size
    joined = [" ".join(run) for run in runs]
    return [excerpt for excerpt in joined if words // 2 <= len(excerpt.split()) <= words][:most]


def train_classifier(texts: list[str], labels: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimises mean cross-entropy + l2/2 |weight|^2 by L-BFGS; convex, so there is nothing to tune but l2."""
    rows, buckets = table(texts)
    weight, bias = torch.zeros(BUCKETS), torch.zeros(())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=30, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        z = table_sums(weight, rows, buckets, len(texts)) + bias
        residual = (torch.sigmoid(z) - labels) / len(texts)
        weight.grad = torch.bincount(buckets, weights=residual[rows], minlength=BUCKETS) + l2 * weight
        bias.grad = residual.sum()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(z, labels)
        return fit + 0.5 * l2 * weight.square().sum()

    optimizer.step(loss)
    return weight, bias


def write(name: str, rows: list[dict[str, str]]) -> None:
    with gzip.open(OUT / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{name}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--words", type=int, default=40, help="longest excerpt, in words")
    parser.add_argument("--excerpts", type=int, default=3, help="most excerpts of one review")
    parser.add_argument("--prompts", type=int, default=192, help="prompts to evaluate on")
    parser.add_argument("--l2", type=float, default=3e-4, help="weight of the classifier's L2 penalty")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    rng = random.Random(0)
    pieces = {}
    for split, suffix in (("train", ""), ("test", "_test")):
        reviews = read_reviews(args.reviews / f"{split}.jsonl.gz")
        cut = [(piece, label) for text, label in reviews for piece in excerpts(text, args.words, args.excerpts)]
        pieces[split] = reviews, cut
        rng.shuffle(cut)
        rows = []
        for piece, _ in cut:
            words = piece.split(" ")
            size = rng.randint(2, 8)
            rows.append({"prompt": " ".join(words[:size]), "completion": " " + " ".join(words[size:])})
        write(f"sft{suffix}.jsonl.gz", rows)
        prompts = [{"prompt": row["prompt"]} for row in rows]
        write(f"prompts{suffix}.jsonl.gz", rows[: args.prompts] if suffix else prompts)

    examples = pieces["train"][0] + pieces["train"][1]
    labels = torch.tensor([float(label) for _, label in examples])
    weight, bias = train_classifier([text for text, _ in examples], labels, args.l2)
    for name, held_out in zip(("reviews", "excerpts"), pieces["test"], strict=True):
        guessed = logits(weight, bias, [text for text, _ in held_out]) > 0
        right = (guessed == torch.tensor([label == 1 for _, label in held_out])).float().mean()
        print(f"classifier: accuracy on {len(held_out)} held-out {name} {right:.3f}")
    torch.save({"weight": weight, "bias": bias}, OUT / "classifier.pt")


if __name__ == "__main__":
    main()
