"""Every method that samples, pairs and evaluations through a server: their numbers, and how a run ends without it."""

import json

import pytest
import torch

from rlhf_fast.config import DPOConfig, OnlineDPOConfig, PairsConfig, PPOConfig, ReMaxConfig
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.methods import METHODS
from rlhf_fast.rollout.vllm.client import ServerError
from rlhf_fast.stages import dpo, pairs, remax
from rlhf_fast.training import checkpoint
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.stopped import Diverged
from tests.support.fake_vllm import FakeVLLM
from tests.support.ranks import train_in
from tests.support.stages import REWARD, STAGES, distance, stage_config, weights


@pytest.fixture(scope="module")
def fake(tiny_model):
    with FakeVLLM(tiny_model) as server:
        yield server


@pytest.fixture(autouse=True)
def plain(fake):
    fake.__dict__.update(shift=0.0, deaf="", faults=[])


def served(fake: FakeVLLM, **options):
    small = {"max_response_length": 6, "vllm_timeout": 20.0, "vllm_patience": 0.5}
    return {"sampler": "vllm", "vllm_url": fake.url, **small, **options}


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.online])
def test_every_online_method_trains(name, fake, files, tiny_model, tmp_path):
    module, config_class = STAGES[name]
    module.train(stage_config(config_class, files, tiny_model, tmp_path, steps=2, **served(fake)))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["mismatch/mean"] < 1e-5 and row["mismatch/max"] < 1e-4 and row["mismatch/ess"] > 0.9999
        assert row.get("mismatch/cut", 0) == 0 and ("mismatch/cut" in row) == (name != "online-dpo")
        assert row.get("val/logprob_drift", 0) < 1e-4 and row["objective/entropy"] > 1
    trained = load_policy(tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), fake.first.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(fake.model.parameters(), fake.first.parameters(), strict=True))
    assert fake.version.endswith("-2")  # the weights of the first round and of the second
    assert not list(tmp_path.glob(".rlhf_fast-writing*"))


def test_an_evaluation_samples_from_the_weights_of_its_step(fake, files, tiny_model, tmp_path):
    options = served(fake, steps=2, eval_data=files["prompts"], eval_steps=1)
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, **options))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["eval/entropy"] > 1 for row in rows) and rows[0]["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["eval/kl"] > 0
    trained = load_policy(tmp_path)
    for a, b in zip(trained.parameters(), fake.model.parameters(), strict=True):
        assert torch.equal(a, b)  # the last evaluation has pushed the last update
    assert fake.version.endswith("-3")  # one push for every version of the weights


def test_a_shift_of_the_server_is_reported_weighed_and_bounded(fake, files, tiny_model, tmp_path):
    fake.shift = 0.05
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path / "a", steps=1, **served(fake)))
    row = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert row["mismatch/mean"] == pytest.approx(0.05, abs=1e-4) and row["val/logprob_drift"] < 1e-4
    options = served(fake, mismatch="none", steps=1)
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path / "b", **options))
    plain = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    assert row["loss/policy_avg"] == pytest.approx(plain["loss/policy_avg"] * 2.718281828**-0.05, rel=1e-3)
    options = served(fake, steps=1, max_mismatch=0.04)
    with pytest.raises(Diverged, match="differ by 0.05 nats a token, more than max_mismatch=0.04"):
        remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path / "c", **options))


def test_a_server_that_goes_ends_the_run_with_a_checkpoint(fake, files, tiny_model, tmp_path):
    options = served(fake, steps=3)
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path / "whole", **options))

    class Listener(remax.Listener):
        def log(self, step, row):
            if step == 1:
                fake.faults += [("/v1/completions", "busy")] * 500

    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path / "cut", **options)
    with pytest.raises(ServerError, match="got none in 0.5 s of tries: 503"):
        remax.train(config, listeners=[Listener()])
    assert checkpoint.latest(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-1"
    fake.faults.clear()
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path / "cut", resume=True, **options))
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0


def test_stale_weights_end_the_run_with_a_checkpoint(fake, files, tiny_model, tmp_path):
    class Listener(remax.Listener):
        def log(self, step, row):
            fake.deaf = "all"

    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, **served(fake, steps=3))
    with pytest.raises(ServerError, match="expected the policy's"):
        remax.train(config, listeners=[Listener()])
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"


LORA = {"lora_rank": 2, "lora_alpha": 8.0}
SEVERAL = {  # the run in one process, and its options beside those of a run in two processes
    "adapter": ({**LORA}, {"shard": "full"}),  # first, because the server has to have the base
    "plain": ({}, {"shard": "full"}),
    "ahead": ({"rollouts_ahead": 1}, {}),
}


def test_two_processes_train_as_one(fake, files, tiny_model, tmp_path):
    options = served(fake, steps=2, batch_size=4, vllm_patience=5.0, max_grad_norm=0.0, max_mismatch=1.0)
    fake.lora = True

    def config(name: str, **more):
        return stage_config(ReMaxConfig, files, tiny_model, tmp_path / name, **options | more)

    def job(name: str):
        made = config(f"two_{name}", **SEVERAL[name][0], **SEVERAL[name][1])
        return "remax", {field: getattr(made, field) for field in made.__dataclass_fields__}

    fake.restart()
    for name in SEVERAL:
        remax.train(config(f"one_{name}", **SEVERAL[name][0]))
    fake.restart()
    results = train_in(2, [job(name) for name in SEVERAL], tmp_path)
    fake.lora = False
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    for name in SEVERAL:
        alone, several = tmp_path / f"one_{name}", tmp_path / f"two_{name}"
        one, two = (read_metrics(path / "metrics.jsonl") for path in (alone, several))
        for a, b in zip(one, two, strict=True):
            for key in ("objective/scores", "objective/length", "objective/kl", "loss/policy_avg"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), (name, key)
        assert distance(weights(alone), weights(several)) < 1e-4


def test_pairs_and_the_evaluation_of_an_offline_method(fake, files, tiny_model, tmp_path):
    fake.model.load_state_dict(fake.first.state_dict())  # other tests have trained it
    options = {"model": tiny_model, "prompts": files["prompts"], "reward": REWARD}
    pairs.sample(PairsConfig(output=str(tmp_path / "p.jsonl"), **options, **served(fake)))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) > 16 and all(row["chosen"] != row["rejected"] for row in rows)
    again = PairsConfig(output=str(tmp_path / "q.jsonl"), **options, **served(fake))
    pairs.sample(again)
    assert (tmp_path / "q.jsonl").read_text() == (tmp_path / "p.jsonl").read_text()
    evaluated = {"eval_data": files["prompts"], "eval_reward": REWARD, "max_length": 28}
    config = stage_config(DPOConfig, files, tiny_model, tmp_path / "dpo", **evaluated, **served(fake))
    dpo.train(config)
    found = [row for row in read_metrics(tmp_path / "dpo" / "metrics.jsonl") if "eval/kl" in row]
    assert len(found) == 2 and found[0]["eval/kl"] == pytest.approx(0, abs=1e-6) and found[1]["eval/kl"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "vllm"}, "vllm_url: expected the address of a server"),
        ({"vllm_url": "http://a:1"}, "vllm_url: expected sampler vllm beside it, got http://a:1 with local"),
        ({"sampler": "vllm", "vllm_url": "a:1"}, "vllm_url: expected an address such as http://127.0.0.1:8000"),
        ({"sampler": "vllm", "vllm_url": "http://a:1", "top_k": 5}, "top_k: expected 0 with sampler vllm"),
        ({"sampler": "vllm", "vllm_url": "http://a:1", "top_p": 0.9}, "top_p: expected 1 with sampler vllm"),
        ({"sampler": "vllm", "vllm_url": "http://a:1", "temperature": 1e-3}, "temperature: expected 0.01 or more"),
        (
            {"sampler": "vllm", "vllm_url": "http://a:1", "vllm_transfer": "nccl", "lora_rank": 2},
            "vllm_transfer: expected files with lora_rank",
        ),
        ({"mismatch": "token_mask"}, "mismatch: expected sampler vllm beside it, got token_mask"),
        ({"mismatch_cap": 3.0}, "mismatch_cap: expected a mismatch to correct beside it, got 3 alone"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, words, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"^{words}"):
        stage_config(PPOConfig, files, tiny_model, tmp_path, **options)


def test_online_dpo_takes_no_weights(fake, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="^mismatch: expected none, because DPO learns from pairs of any policy"):
        stage_config(OnlineDPOConfig, files, tiny_model, tmp_path, mismatch="token_mask", **served(fake))
