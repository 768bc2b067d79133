"""Decoding beside transformers' `generate`: tokens per second of the same rows, lengths and model.

Two things are checked before anything is timed: greedy tokens equal generate's, and the log-probs of decoding equal
the log-probs of a teacher-forced pass. No row ends early, so that all contenders make the same number of tokens.
Folded: the sampled and the greedy row of each prompt, which ReMax needs, in one decode; generate needs two calls.
"""

import argparse
import functools
import json
import sys
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.device import CPU, CUDA, Contender
from bench.measure import Disagreement, quantiles, take_turns
from bench.record import about_run, versions
from rlhf_fast.data.files import write_text
from rlhf_fast.lab.compare.start import llama
from rlhf_fast.lab.demo import MODEL
from rlhf_fast.lab.world import build_tokenizer
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.rollout.generate import generate
from rlhf_fast.training.metrics import markdown_table, print_table

NO_EOS = (-1,)
SAMPLED, GREEDY, FOLDED = "rlhf_fast, sampled", "rlhf_fast, greedy", "rlhf_fast, sampled + greedy folded"
THEIRS, THEIRS_GREEDY = "transformers generate, sampled", "transformers generate, greedy"


class Shape(NamedTuple):
    """A model and the rows that it decodes."""

    name: str
    config: dict[str, Any]
    prompts: int
    prompt_length: int
    new_tokens: int
    dtype: torch.dtype = torch.float32


def shapes(device: str, quick: bool) -> list[Shape]:
    """The shapes of a device. The bars are about the first shape."""
    demo = Shape("demo's model", MODEL | {"vocab_size": len(build_tokenizer())}, 32, 18, 4 if quick else 48)
    if quick:
        return [demo]
    if device == "cpu":
        return [
            demo,
            Shape("8.4M weights", llama(256, 768, 8, 8, 4, vocab_size=8192), 32, 64, 64),
            Shape("52M weights", llama(512, 1408, 12, 8, 4, vocab_size=32768), 32, 64, 32),
        ]
    bf16 = torch.bfloat16
    return [
        Shape("Qwen2.5-0.5B shape", llama(896, 4864, 24, 14, 2, vocab_size=151936), 32, 256, 256, bf16),
        Shape("Qwen2.5-1.5B shape", llama(1536, 8960, 28, 12, 2, vocab_size=151936), 32, 256, 256, bf16),
    ]


def bars(device: str) -> list[tuple[str, str, float]]:
    """(what, against, at least): the seconds of `against` are at least so many times the seconds of `what`."""
    if device == "cpu":
        return [(SAMPLED, THEIRS, 2.5), (FOLDED, f"{THEIRS} and greedy", 1 / 0.4), (FOLDED, SAMPLED, 1 / 1.5)]
    return [(SAMPLED, THEIRS, 3.0), (FOLDED, SAMPLED, 1 / 1.15)]


def contenders(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> dict[str, Contender]:
    """Ours and `generate` on these prompts, sampled and greedy."""

    def ours(**options: Any) -> Any:
        return generate(model, ids, mask, max_new_tokens=tokens, eos_ids=NO_EOS, pad_id=0, **options)

    def theirs(sample: bool) -> torch.Tensor:
        full = {"top_k": 0, "top_p": 1.0} if sample else {}
        return model.generate(
            ids, attention_mask=mask.long(), do_sample=sample, max_new_tokens=tokens, pad_token_id=0, **full
        )

    return {
        SAMPLED: Contender(ours),
        GREEDY: Contender(functools.partial(ours, samples=0, greedy=True)),
        FOLDED: Contender(functools.partial(ours, greedy=True)),
        THEIRS: Contender(functools.partial(theirs, True)),
        THEIRS_GREEDY: Contender(functools.partial(theirs, False)),
    }


@torch.no_grad()
def set_up(shape: Shape, device: str) -> tuple[PreTrainedModel, dict[str, Contender], float]:
    """A model of this shape, what is compared on it, and the log-prob drift that `check` found."""
    torch.manual_seed(0)
    settings = dict(shape.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, eos_token_id=None, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype).to(device).eval()
    ids = torch.randint(1, config.vocab_size, (shape.prompts, shape.prompt_length), device=device)
    lengths = torch.randint(shape.prompt_length // 2, shape.prompt_length + 1, (shape.prompts, 1), device=device)
    mask = torch.arange(shape.prompt_length, device=device) >= shape.prompt_length - lengths
    everyone = contenders(model, ids * mask, mask, shape.new_tokens)
    return model, everyone, check(model, everyone, shape)


@torch.no_grad()
def measure(shape: Shape, rounds: int, seconds: float, device: CPU | CUDA) -> dict[str, Any]:
    """Everything about one shape, ready for JSON."""
    model, everyone, drift = set_up(shape, device.name)
    samples = take_turns(everyone, rounds, seconds, device)
    parameters = sum(p.numel() for p in model.parameters())
    times = {name: quantiles(values) for name, values in samples.items()}
    times[f"{THEIRS} and greedy"] = {
        key: times[THEIRS][key] + times[THEIRS_GREEDY][key] for key in ("median", "p20", "p80")
    }
    return {
        "name": shape.name,
        "shape": f"{shape.prompts} prompts of {shape.prompt_length}, {shape.new_tokens} new tokens, {parameters:,} "
        f"weights in {str(shape.dtype).removeprefix('torch.')}",
        "rows": {name: shape.prompts * (1 + (name in (FOLDED, f"{THEIRS} and greedy"))) for name in times},
        "new_tokens": shape.new_tokens,
        "rounds": len(samples[SAMPLED]),
        "seconds": times,
        "logprob_drift": drift,
    }


def check(model: PreTrainedModel, everyone: dict[str, Contender], shape: Shape) -> float:
    """Largest difference between decode-time and teacher-forced log-probs; raises where tokens or log-probs differ."""
    greedy, expected = everyone[GREEDY].run().greedy, everyone[THEIRS_GREEDY].run()[:, shape.prompt_length :]
    exact = shape.dtype == torch.float32
    if exact and not torch.equal(greedy.response_ids, expected):
        raise Disagreement(f"{shape.name}: greedy tokens differ from generate's")
    sampled = everyone[SAMPLED].run().sampled
    drift = (sampled.logprobs - Objectives(model).logprobs(sampled.sequences).logprobs).abs().max().item()
    if drift > (1e-3 if exact else 0.5):
        raise Disagreement(f"{shape.name}: decode-time log-probs differ from a teacher-forced pass by {drift:.2g}")
    return drift


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per contender of a shape."""
    table = []
    for name, seconds in result["seconds"].items():
        made = result["rows"][name] * result["new_tokens"]
        step = seconds["median"] / result["new_tokens"]
        rate = f"{made / seconds['median']:,.0f}"
        table.append({"rows": name, "time/step": step, "tokens/s": rate, "p80 / p20": seconds["p80"] / seconds["p20"]})
    return table


def bar_rows(result: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """One row per bar of the device."""
    table = []
    for what, against, least in bars(device):
        ratio = result["seconds"][against]["median"] / result["seconds"][what]["median"]
        met = "yes" if ratio >= least else "NO"
        table.append({"rows": what, "against": against, "bar": f">= {least:.3g}", "measured": ratio, "met": met})
    return table


def tables(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows: one for each shape, then the bars."""
    shown = {
        f"{result['name']}: {result['shape']}; largest log-prob drift {result['logprob_drift']:.1e}": rows(result)
        for result in record["results"]
    }
    return shown | ({"Bars, on the first": record["bars"]} if record["bars"] else {})


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    parts = ["# Rollouts", f"`{record['command']}`, {record['date']}: {machine}."]
    for title, table in tables(record).items():
        parts += [f"## {title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def run(args: argparse.Namespace) -> int:
    """`python -m bench rollout`; the exit code."""
    device = CUDA() if args.device == "cuda" else CPU()
    record = about_run()
    record["machine"] |= versions("transformers") | device.about()
    record["results"] = []
    for shape in [s for s in shapes(args.device, args.quick) if args.only in s.name]:
        print(f"{shape.name} ...", file=sys.stderr, flush=True)
        slow = args.device == "cpu" and record["results"]  # a round of any shape but the first takes a minute
        rounds = 2 if args.quick else min(args.rounds, 3) if slow else args.rounds
        result = measure(shape, rounds, 0.0 if args.quick else 3.0, device)
        record["results"].append(result)
    record["bars"] = [] if args.quick else bar_rows(record["results"][0], args.device)
    for title, table in tables(record).items():
        print_table(title, table)
    if args.out:
        write_text(args.out.with_suffix(".md"), markdown(record))
        write_text(args.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in record["bars"]))
