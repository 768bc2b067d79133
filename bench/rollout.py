"""Decoding beside transformers' `generate`: tokens per second of the same rows, lengths and model.

Two things are checked before anything is timed: greedy tokens equal generate's, and the log-probs of decoding equal
the log-probs of a teacher-forced pass. No row ends early, so that all contenders make the same number of tokens.
Folded: the sampled and the greedy row of each prompt, which ReMax needs, in one decode; generate needs two calls.

A shape is a model without training, or with --model a checkpoint, on prompts of --data, in the precisions that people
decode in: fp32, fp32 weights under bf16 autocast, and bf16 weights. The precisions take turns in the same rounds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.device import CPU, CUDA, Contender
from bench.measure import Disagreement, quantiles, take_turns
from bench.record import about_run, page, versions
from rlhf_fast.data.encoding import encode_prompts, load_rows, pad_left
from rlhf_fast.data.files import write_text
from rlhf_fast.lab.compare.start import llama
from rlhf_fast.lab.demo import MODEL
from rlhf_fast.lab.world import build_tokenizer
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.rollout.generate import generate
from rlhf_fast.training.metrics import print_table

NO_EOS = (-1,)
SAMPLED, GREEDY, FOLDED = "rlhf_fast, sampled", "rlhf_fast, greedy", "rlhf_fast, sampled + greedy folded"
THEIRS, THEIRS_GREEDY = "transformers generate, sampled", "transformers generate, greedy"
THEIRS_BOTH = f"{THEIRS} and greedy"


@dataclass(frozen=True, eq=False)  # eq=False, so that a shape is a key
class Shape:
    """A model and the rows that it decodes. autocast: under bf16 autocast; dtype is of the weights."""

    name: str
    config: dict[str, Any]
    prompts: int
    prompt_length: int
    new_tokens: int
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def precision(self) -> str:
        """In words."""
        return f"{str(self.dtype).removeprefix('torch.')}{' under bf16 autocast' if self.autocast else ''}"


class Loaded(NamedTuple):
    """What a shape decodes. ids, mask: [prompts, prompt_length], padded on the left."""

    model: PreTrainedModel
    ids: torch.Tensor
    mask: torch.Tensor


class Bar(NamedTuple):
    """The seconds of `against` are at least `least` times the seconds of `what`. shape, other: their shapes."""

    what: str
    against: str
    least: float
    shape: int = 0
    other: int = 0


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


def bars(device: str) -> list[Bar]:
    """On the first shape of a device."""
    if device == "cpu":
        return [Bar(SAMPLED, THEIRS, 2.5), Bar(FOLDED, THEIRS_BOTH, 1 / 0.4), Bar(FOLDED, SAMPLED, 1 / 1.5)]
    return [Bar(SAMPLED, THEIRS, 3.0), Bar(FOLDED, SAMPLED, 1 / 1.15)]


def checkpoint_shapes(name: str, prompt_length: int, quick: bool) -> list[Shape]:
    """One shape for each precision in which people decode a checkpoint."""
    rows = (2, prompt_length, 2) if quick else (16, prompt_length, 40)
    precisions = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
    return [Shape(name, {}, *rows, dtype, autocast) for dtype, autocast in precisions]


def checkpoint_bars() -> list[Bar]:
    """On the shapes of a checkpoint. At its size the matmuls take most of the time, which no engine can avoid."""
    beside = [
        bar for i in range(3) for bar in (Bar(SAMPLED, THEIRS, 1.3, i, i), Bar(FOLDED, THEIRS_BOTH, 1 / 0.6, i, i))
    ]
    return [*beside, Bar(SAMPLED, SAMPLED, 1.5, 2, 0)]


def contenders(shape: Shape, loaded: Loaded) -> dict[str, Contender]:
    """Ours and `generate` on these prompts, sampled and greedy."""
    model, ids, mask = loaded

    def ours(**options: Any) -> Any:
        return generate(model, ids, mask, max_new_tokens=shape.new_tokens, eos_ids=NO_EOS, pad_id=0, **options)

    def theirs(sample: bool) -> torch.Tensor:
        full = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0} if sample else {}
        return model.generate(
            ids, attention_mask=mask.long(), do_sample=sample, max_new_tokens=shape.new_tokens, pad_token_id=0, **full
        )

    def in_its_precision(run: Callable[..., Any], **options: Any) -> Contender:
        def call() -> Any:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=shape.autocast):
                return run(**options)

        return Contender(call)

    return {
        SAMPLED: in_its_precision(ours),
        GREEDY: in_its_precision(ours, samples=0, greedy=True),
        FOLDED: in_its_precision(ours, greedy=True),
        THEIRS: in_its_precision(theirs, sample=True),
        THEIRS_GREEDY: in_its_precision(theirs, sample=False),
    }


def untrained(shape: Shape, device: str) -> Loaded:
    """A model of this shape, and prompts of random ids and lengths."""
    torch.manual_seed(0)
    settings = dict(shape.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, eos_token_id=None, bos_token_id=None)
    with torch.device(device):  # where random weights are made faster than they are copied
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()
    ids = torch.randint(1, config.vocab_size, (shape.prompts, shape.prompt_length), device=device)
    lengths = torch.randint(shape.prompt_length // 2, shape.prompt_length + 1, (shape.prompts, 1), device=device)
    mask = torch.arange(shape.prompt_length, device=device) >= shape.prompt_length - lengths
    return Loaded(model, ids * mask, mask)


def checkpoint(path: Path, data: Path, device: str, quick: bool) -> dict[Shape, Loaded]:
    """The checkpoint in each precision, on the first prompts of data/prompts.jsonl.gz; no completion ends early."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_rows(data / "prompts.jsonl.gz", "prompt")[: 2 if quick else 16]
    prompts = [example.prompt_ids for example in encode_prompts(rows, tokenizer, 128).examples]
    ids, mask = (x.to(device) for x in pad_left(prompts, 0))
    models: dict[torch.dtype, PreTrainedModel] = {}
    loaded = {}
    for shape in checkpoint_shapes(path.name, ids.shape[1], quick):
        if shape.dtype not in models:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=shape.dtype).to(device).eval()
            model.config.eos_token_id = model.generation_config.eos_token_id = None
            models[shape.dtype] = model
        loaded[shape] = Loaded(models[shape.dtype], ids, mask)
    return loaded


@torch.no_grad()
def measure(group: dict[Shape, Loaded], rounds: int, seconds: float, device: CPU | CUDA) -> list[dict[str, Any]]:
    """Everything about shapes that take turns in the same rounds, ready for JSON: one result a shape."""
    everyone = {shape: contenders(shape, loaded) for shape, loaded in group.items()}
    drifts = {shape: check(shape, loaded, everyone[shape]) for shape, loaded in group.items()}
    turns = {(shape, name): call for shape, calls in everyone.items() for name, call in calls.items()}
    samples = take_turns(turns, rounds, seconds, device)
    results = []
    for shape, loaded in group.items():
        parameters = sum(p.numel() for p in loaded.model.parameters())
        times = {name: quantiles(samples[shape, name]) for name in everyone[shape]}
        times[THEIRS_BOTH] = {key: times[THEIRS][key] + times[THEIRS_GREEDY][key] for key in ("median", "p20", "p80")}
        results.append(
            {
                "name": shape.name,
                "shape": f"{shape.prompts} prompts of {shape.prompt_length}, {shape.new_tokens} new tokens, "
                f"{parameters:,} weights in {shape.precision}",
                "precision": shape.precision,
                "rows": {name: shape.prompts * (1 + (name in (FOLDED, THEIRS_BOTH))) for name in times},
                "new_tokens": shape.new_tokens,
                "rounds": len(samples[shape, SAMPLED]),
                "seconds": times,
                "logprob_drift": drifts[shape],
            }
        )
    return results


@torch.no_grad()
def check(shape: Shape, loaded: Loaded, everyone: dict[str, Contender]) -> float:
    """Largest difference between decode-time and teacher-forced log-probs; raises where tokens or log-probs differ."""
    greedy, expected = everyone[GREEDY].run().greedy, everyone[THEIRS_GREEDY].run()[:, shape.prompt_length :]
    exact = shape.dtype == torch.float32 and not shape.autocast
    if exact and not torch.equal(greedy.response_ids, expected):
        raise Disagreement(f"{shape.name}: greedy tokens differ from generate's")
    sampled = everyone[SAMPLED].run().sampled
    with torch.autocast(loaded.model.device.type, torch.bfloat16, enabled=shape.autocast):
        forced = Objectives(loaded.model).logprobs(sampled.sequences).logprobs
    drift = (sampled.logprobs - forced).abs().max().item()
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


def bar_rows(results: list[dict[str, Any]], bars: list[Bar]) -> list[dict[str, Any]]:
    """One row per bar."""
    table = []
    for bar in bars:
        shape, other = results[bar.shape], results[bar.other]
        ratio = other["seconds"][bar.against]["median"] / shape["seconds"][bar.what]["median"]
        met = "yes" if ratio >= bar.least else "NO"
        what, against = f"{bar.what}, {shape['precision']}", f"{bar.against}, {other['precision']}"
        table.append({"rows": what, "against": against, "bar": f">= {bar.least:.3g}", "measured": ratio, "met": met})
    return table


def tables(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows: one for each shape, then the bars."""
    shown = {
        f"{result['name']}: {result['shape']}; largest log-prob drift {result['logprob_drift']:.1e}": rows(result)
        for result in record["results"]
    }
    return shown | ({record["bars_are_on"]: record["bars"]} if record["bars"] else {})


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    return page("Rollouts", record, tables(record))


def run(args: argparse.Namespace) -> int:
    """`python -m bench rollout`; the exit code."""
    device = CUDA() if args.device == "cuda" else CPU()
    record = about_run()
    record["machine"] |= versions("transformers") | device.about()
    if args.model:
        print(f"{args.model.name} ...", file=sys.stderr, flush=True)
        group = checkpoint(args.model, args.data, args.device, args.quick)
        record["results"] = measure(group, 2 if args.quick else min(args.rounds, 5), 0.0, device)
        promised, record["bars_are_on"] = checkpoint_bars(), "Bars"
    else:
        record["results"] = []
        for shape in [s for s in shapes(args.device, args.quick) if args.only in s.name]:
            print(f"{shape.name} ...", file=sys.stderr, flush=True)
            slow = args.device == "cpu" and record["results"]  # a round of any shape but the first takes a minute
            rounds = 2 if args.quick else min(args.rounds, 3) if slow else args.rounds
            group = {shape: untrained(shape, args.device)}
            record["results"] += measure(group, rounds, 0.0 if args.quick else 3.0, device)
        promised, record["bars_are_on"] = bars(args.device), "Bars, on the first"
    record["bars"] = [] if args.quick else bar_rows(record["results"], promised)
    for title, table in tables(record).items():
        print_table(title, table)
    if args.out:
        write_text(args.out.with_suffix(".md"), markdown(record))
        write_text(args.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in record["bars"]))
