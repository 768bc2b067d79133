"""Benches of a vLLM server, against a fake one: what they report, a few tokens each."""

import gzip
import json
from argparse import Namespace
from pathlib import Path

import pytest

from bench import ahead, served
from bench.device import CPU
from tests.support.fake_vllm import FakeVLLM


@pytest.fixture
def args(tiny_model, tmp_path):
    with gzip.open(tmp_path / "prompts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in ("one", "two three", "four", "five six"))
    with FakeVLLM(tiny_model) as fake:
        paths = {"model": Path(tiny_model), "data": tmp_path, "vllm": fake.url, "out": tmp_path / "out.json"}
        yield Namespace(**paths, device="cpu", quick=True, rounds=2)


def test_a_server_beside_our_decoder_and_generate(args):
    found = served.measure(args, CPU())
    assert found["greedy_agreed"] == 2 * 2 and found["rows"][served.SERVED_FOLDED] == 4
    names = {served.SERVED, served.SERVED_GREEDY, served.SERVED_FOLDED, served.SERVED_TWICE}
    assert names <= set(found["seconds"]) and all(x["median"] > 0 for x in found["seconds"].values())
    assert found["one_batch_against_two_calls"] > 0 and found["logprob_drift"] < 1e-3


def test_rounds_in_turn_and_one_ahead(args, capsys):
    assert ahead.run(args) == 0
    found = json.loads(args.out.read_text())["results"]
    assert 0 < found["push"] < found["seconds"]["turn"]["round"]["median"] and found["training"] > 0
    in_turn = found["sampling"] + found["training"] + found["push"]
    best = max(found["sampling"], found["training"]) + found["push"]
    assert found["expected_speed_up"] == pytest.approx(in_turn / best)
    assert "speed-up" in capsys.readouterr().out and "# One round ahead" in args.out.with_suffix(".md").read_text()
