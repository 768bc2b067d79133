"""`python -m bench ranks`: what two processes send is what the documents promise, to the byte; the computed table."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from bench.__main__ import main
from bench.ranks import computed, report
from bench.ranks.formula import GATHER, NUMBERS, SCATTER, Sizes, Work, collectives, differences
from bench.ranks.groups import Contender, Group
from bench.ranks.process import DECODING
from bench.ranks.traffic import Traffic
from tests.support.ranks import once
from tests.support.traffic import COUNTS, counted

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    return once(tmp_path_factory, "traffic", counted)[1]


@pytest.mark.parametrize("name", COUNTS)
def test_collectives_and_bytes_are_those_of_the_formula(name, sent):
    assert sent[name]["differences"] == []
    assert DECODING not in sent[name]["phases"]
    shards = COUNTS[name][1] != "none"
    assert (GATHER in sent[name]["found"], SCATTER in sent[name]["found"]) == (shards, shards)


def test_a_step_exchanges_numbers_once(sent):
    assert sent["sft"]["found"][NUMBERS]["count"] == sent["sft in shards"]["found"][NUMBERS]["count"] == 1
    assert sent["remax in shards"]["found"][NUMBERS]["count"] == 2  # a round's, and its step's
    assert sent["ppo"]["found"][NUMBERS]["count"] == 2 + 4  # whitening too; four steps
    assert all(one["found"][NUMBERS]["bytes"] <= one["found"][NUMBERS]["count"] * 2 * 2048 for one in sent.values())


def test_gradients_are_sent_once_for_a_step(sent):
    (size,) = {kinds["all-reduce"]["bytes"] for kinds in (sent["sft"]["found"],)}
    sizes = 32 * 300 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # embeddings; layers with their norms; last norm
    assert size == 4 * (sizes + 2 + 2 * 9) and sent["sft"]["found"]["all-reduce"]["count"] == 1


def test_three_times_the_weights_at_most_for_a_micro_batch():
    sizes = Sizes(4, 4000, 1000, 4, 4, 5000, 30)
    kinds = collectives(Work("sft", micro_batches=3), {"policy": sizes}, shards=True)
    assert kinds[GATHER] == {"count": 3 * 9, "bytes": 3 * 4 * 9000} and kinds[SCATTER]["bytes"] == 3 * 4 * 5000
    assert kinds[GATHER]["bytes"] + kinds[SCATTER]["bytes"] <= 3 * 3 * sizes.weights


def test_what_is_not_as_promised_is_named():
    found = {GATHER: {"count": 2, "bytes": 8}, NUMBERS: {"count": 1, "bytes": 5000}}
    promised = {GATHER: {"count": 1, "bytes": 8}, NUMBERS: {"count": 1, "bytes": 0}}
    lines = ["all-gather: 2 count, expected 1", "numbers: 5,000 bytes, expected 4,096"]
    assert differences(found, promised, 2) == lines


def test_traffic_counts_every_kind_by_its_phase(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x = torch.zeros(4)
        with Traffic() as traffic:
            dist.all_reduce(x)
            with traffic.phase("rollout"):
                dist.all_gather([torch.zeros(4)], x)
                with traffic.numbers():
                    dist.all_reduce(x[:1])
            dist.reduce_scatter(torch.zeros(4), [x])
        counted = traffic.take()
    finally:
        dist.destroy_process_group()
    one = {"count": 1, "bytes": 16}
    assert counted == {
        "outside of phases": {"all-reduce": one, "reduce-scatter": one},
        "rollout": {"all-gather": one, "numbers": {"count": 1, "bytes": 4}},
    }
    assert traffic.take() == {}


def test_a_contender_that_ends_early_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no luck in $RANK of $WORLD_SIZE >&2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    group = Group(Contender("broken", 2, 1), [], tmp_path / "log", "cpu")
    with pytest.raises(RuntimeError, match="broken ended early:\nno luck in 0 of 2\n\nno luck in 1 of 2"):
        group.hear()


def test_the_computed_table_is_in_the_documents_as_the_command_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "ranks", "--computed"])
    assert main() == 0
    assert capsys.readouterr().out in (ROOT / "docs/processes.md").read_text()


def test_computed_seconds_by_hand():
    setting, (near, far) = computed.Setting("sft", computed.Model("m", 2, 8, 2), 4, 8, 1), computed.MACHINES
    assert computed.compute_seconds(setting, near) == pytest.approx(6 * 10 * 4 / (0.4 * 989e12))
    gathered, scattered, norm = (2 * 8 + 2) * 2, 10 * 4, 2 * 4 * (9 * 2 + 3)  # the norm is added up: twice around
    inside = (gathered + scattered + norm) * 7 / 8 / (0.7 * 450e9)
    assert computed.sending_seconds(setting, near, "full") == pytest.approx(inside)
    hybrid = inside + scattered / (0.7 * 50e9)
    assert computed.sending_seconds(setting, far, "hybrid") == pytest.approx(hybrid)
    added = 2 * 4 * (10 + 9 * 2 + 3)  # twice around; a number for each parameter goes with the gradients
    assert computed.sending_seconds(setting, far, "none") == pytest.approx(added * 15 / 16 / (0.7 * 50e9))


def test_bars_name_what_is_missed():
    result = {"stage": "sft", "case": "toy", "faster": {"2 replicas": 1}, "ratios": {"2 replicas": {"median": 0.85}}}
    result["traffic"] = {"2 replicas": {"differences": ["all-gather: 2 count, expected 1"]}}
    speed, traffic = report.bar_rows([result])
    assert (speed["bar"], speed["measured"], speed["met"]) == (">= 0.9x", "0.85x", "NO")
    assert (traffic["measured"], traffic["met"]) == ("all-gather: 2 count, expected 1", "NO")
