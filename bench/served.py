"""Decoding by a vLLM server beside our own decoder and transformers' `generate`: the same model, prompts and lengths.

Before anything is timed, the server proves that it has the model (`rollout.vllm.server`), and its greedy tokens are
compared with ours. No row ends early. ReMax's sampled and greedy row of each prompt go in one batch of requests, and in
two calls: the server's prefix cache has the prompts in both cases, but the greedy rows fill the same steps in one.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import rollout
from bench.device import CPU, CUDA, Contender
from bench.measure import Disagreement, quantiles, take_turns
from bench.record import about_run, versions
from bench.rollout import FOLDED, GREEDY, SAMPLED, THEIRS, THEIRS_BOTH, THEIRS_GREEDY, Loaded, Shape, contenders
from rlhf_fast.config.sampling import PATIENCE, TIMEOUT
from rlhf_fast.data.encoding import encode_prompts, load_rows, pad_left
from rlhf_fast.data.files import write_text
from rlhf_fast.rollout.vllm.client import Client
from rlhf_fast.rollout.vllm.sampler import Asked, VLLMSampler
from rlhf_fast.rollout.vllm.server import Server
from rlhf_fast.training.metrics import print_table

SERVED, SERVED_GREEDY = "vLLM, sampled", "vLLM, greedy"
SERVED_FOLDED, SERVED_TWICE = "vLLM, sampled + greedy in one batch", "vLLM, sampled and greedy in two calls"
_BOTH = (FOLDED, THEIRS_BOTH, SERVED_FOLDED, SERVED_TWICE)
_BOUND = 0.1  # nats a token by which a server in bf16 may differ


class Endless(VLLMSampler):
    """Rows of full length, whatever tokens they have."""

    def ask(self, *args: Any, **options: Any) -> Asked:
        """As in `VLLMSampler`, without a token that ends a row."""
        return super().ask(*args, **options)._replace(eos=frozenset())


def load(args: argparse.Namespace, directory: Path) -> tuple[Shape, Loaded, Endless, list[list[int]]]:
    """The checkpoint in fp32, its prompts, and the sampler of a server that has proven to have it.

    directory: where files for the server go, which it has to be able to read.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_rows(args.data / "prompts.jsonl.gz", "prompt")[: 2 if args.quick else 16]
    prompts = [example.prompt_ids for example in encode_prompts(rows, tokenizer, 128).examples]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    ids, mask = (x.to(args.device) for x in pad_left(prompts, 0))
    shape = Shape(args.model.name, {}, len(prompts), ids.shape[1], 2 if args.quick else 40)
    server = Server(Client(args.vllm, timeout=TIMEOUT, patience=PATIENCE), directory=directory, bound=_BOUND)
    server.check(model, prompts, ids.shape[1] + shape.new_tokens, len(tokenizer))
    server.refresh(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    sampler = Endless(server, model, tokenizer, max_new_tokens=shape.new_tokens)
    return shape, Loaded(model, ids, mask), sampler, prompts


def turns(shape: Shape, loaded: Loaded, sampler: Endless, prompts: list[list[int]]) -> dict[str, Contender]:
    """Ours, `generate` and the server's, as calls."""

    def call(**options: Any) -> Contender:
        return Contender(lambda: sampler(prompts, **options))

    def twice() -> None:
        sampler(prompts, samples=1)
        sampler(prompts, samples=0, greedy=True)

    return contenders(shape, loaded) | {
        SERVED: call(samples=1),
        SERVED_GREEDY: call(samples=0, greedy=True),
        SERVED_FOLDED: call(samples=1, greedy=True),
        SERVED_TWICE: Contender(twice),
    }


def check(shape: Shape, everyone: dict[str, Contender]) -> int:
    """The number of greedy tokens in which server and own decoder agree; Disagreement where most do not.

    Two engines that round differently part for good where two tokens are equally likely.
    """
    mine, theirs = (everyone[name].run().greedy.response_ids for name in (GREEDY, SERVED_GREEDY))
    if theirs.shape != mine.shape:
        raise Disagreement(f"{shape.name}: expected {list(mine.shape)} greedy tokens, got {list(theirs.shape)}")
    agreed = int((mine == theirs).cumprod(dim=1).sum())
    if agreed < mine.numel() / 2:
        raise Disagreement(f"{shape.name}: only {agreed} of {mine.numel()} greedy tokens of the server are ours")
    return agreed


@torch.no_grad()
def measure(args: argparse.Namespace, device: CPU | CUDA) -> dict[str, Any]:
    """One result, as `bench.rollout` has them."""
    with tempfile.TemporaryDirectory() as directory:
        shape, loaded, sampler, prompts = load(args, Path(directory))
        everyone = turns(shape, loaded, sampler, prompts)
        drift, agreed = rollout.check(shape, loaded, everyone), check(shape, everyone)
        samples = take_turns(everyone, 2 if args.quick else min(args.rounds, 5), 0.0, device)
    times = {name: quantiles(seconds) for name, seconds in samples.items()}
    times[THEIRS_BOTH] = {key: times[THEIRS][key] + times[THEIRS_GREEDY][key] for key in ("median", "p20", "p80")}
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return {
        "name": shape.name,
        "shape": f"{shape.prompts} prompts of {shape.prompt_length}, {shape.new_tokens} new tokens, {parameters:,} "
        f"weights in {shape.precision}; {agreed} of {shape.prompts * shape.new_tokens} greedy tokens of the server are "
        "ours",
        "precision": shape.precision,
        "rows": {name: shape.prompts * (1 + (name in _BOTH)) for name in times},
        "new_tokens": shape.new_tokens,
        "rounds": len(samples[SAMPLED]),
        "seconds": times,
        "logprob_drift": drift,
        "greedy_agreed": agreed,
        "one_batch_against_two_calls": times[SERVED_TWICE]["median"] / times[SERVED_FOLDED]["median"],
    }


def run(args: argparse.Namespace) -> int:
    """`python -m bench rollout --vllm URL`; the exit code."""
    device = CUDA() if args.device == "cuda" else CPU()
    record = about_run()
    record["machine"] |= versions("transformers") | device.about()
    record |= {"results": [measure(args, device)], "bars": []}
    for title, table in rollout.tables(record).items():
        print_table(title, table)
    ratio = record["results"][0]["one_batch_against_two_calls"]
    print(f"ReMax's rows in two calls take {ratio:.2f} times as long as in one batch of requests")
    if args.out:
        write_text(args.out.with_suffix(".md"), rollout.markdown(record))
        write_text(args.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md")
    return 0
