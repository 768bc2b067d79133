"""Makes the rows of the HH-RLHF run from human preference pairs.

    python prepare.py PAIRS          PAIRS holds train.jsonl.gz and test.jsonl.gz, rows with prompt, chosen, rejected

Written to data/ beside this file:
    sft.jsonl.gz, sft_test.jsonl.gz         prompt, completion = the chosen answer
    pairs.jsonl.gz, pairs_test.jsonl.gz     prompt, chosen, rejected
    prompts_test.jsonl.gz                   the first --prompts rows of sft_test.jsonl.gz, for evaluation
Only dialogues of at most --max-words words with the longer answer are kept, so that the models see all of each.
Prompts end in "Assistant:", so answers get the space that follows it.
"""

import argparse
import gzip
import json
from pathlib import Path

from rlhf_fast.data.encoding import load_rows

OUT = Path(__file__).parent / "data"


def write(name: str, rows: list[dict[str, str]]) -> None:
    with gzip.open(OUT / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{name}: {len(rows)} rows")


def words(row: dict[str, str]) -> int:
    """Of the prompt with the longer answer."""
    prompt, chosen, rejected = (len(row[key].split()) for key in ("prompt", "chosen", "rejected"))
    return prompt + max(chosen, rejected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--max-words", type=int, default=100, help="longest dialogue, in words")
    parser.add_argument("--prompts", type=int, default=96, help="prompts to evaluate on")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    for split, suffix in (("train", ""), ("test", "_test")):
        rows = load_rows(args.pairs / f"{split}.jsonl.gz", "preference")
        short = [row for row in rows if words(row) <= args.max_words]
        pairs = [{"prompt": r["prompt"], **{key: f" {r[key]}" for key in ("chosen", "rejected")}} for r in short]
        chosen = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
        write(f"pairs{suffix}.jsonl.gz", pairs)
        write(f"sft{suffix}.jsonl.gz", chosen)
    write("prompts_test.jsonl.gz", chosen[: args.prompts])


if __name__ == "__main__":
    main()
