"""Rollouts beside transformers' generate; on a GPU our decoding steps are CUDA graphs."""

from collections.abc import Iterator

import torch

from bench.device import CPU, CUDA
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work
from bench.rollout import FOLDED, GREEDY, SAMPLED, THEIRS, THEIRS_BOTH, THEIRS_GREEDY, Shape, measure, rows, untrained
from rlhf_fast.lab.compare.start import llama

REAL = Shape(
    "Qwen2.5-0.5B shape", llama(896, 4864, 24, 14, 2, vocab_size=151_936), 32, 256, 128, torch.bfloat16
)  # fmt: skip
TOY = Shape("toy", llama(32, 64, 2, 4, 2, vocab_size=97), 3, 6, 5, torch.bfloat16)
WEIGHTS = {REAL.name: 494e6, TOY.name: 5e4}
ROUNDS = 2
CALLS = {SAMPLED: 1, GREEDY: 1, FOLDED: 1, THEIRS: 25, THEIRS_GREEDY: 25}
"""Contender -> launches of a layer and step: our step is one graph, transformers' forward launches one by one."""


def work(setting: Setting) -> Iterator[Work]:
    """Every step reads the weights once; every call makes one pass over the prompts."""
    shape = setting.pick(REAL, TOY)
    weights, layers = WEIGHTS[shape.name], shape.config["num_hidden_layers"]
    calls = setting.pick(ROUNDS, 1) + 3
    for launches in CALLS.values():
        step = Work(bytes=2 * weights, launches=max(40, launches * layers))
        yield step.times(calls * shape.new_tokens)
        yield Work(flops=2 * weights * shape.prompts * shape.prompt_length * calls)
    yield Work(seconds=setting.pick(5, 0))  # the model, the graphs and the trial of our decoder


def run(setting: Setting, found: Found) -> None:
    """A row per contender."""
    shape = setting.pick(REAL, TOY)
    loaded = untrained(shape, setting.device)
    device = CPU() if setting.dry else CUDA()
    (result,) = measure({shape: loaded}, setting.pick(ROUNDS, 1), 0.0, device)
    found.details["result"] = result
    medians = {name: seconds["median"] for name, seconds in result["seconds"].items()}
    rival = {SAMPLED: THEIRS, GREEDY: THEIRS_GREEDY, FOLDED: THEIRS_BOTH}
    for row in rows(result):
        name = row["rows"]
        said = f"{row['tokens/s']} tokens/s, {1e3 * row['time/step']:.2f} ms a step"
        beside = f"{medians[rival[name]] / medians[name]:.2f}x the speed of {rival[name]}" if name in rival else ""
        found.row(f"{name}, {result['shape']}", said, beside)
    found.row("largest log-prob drift", f"{result['logprob_drift']:.2g}", "decoding against a teacher-forced pass")
