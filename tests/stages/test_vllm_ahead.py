"""One round ahead: which weights sample which round, the same bits twice, after an end, and after a server's end."""

import shutil
import time

import pytest
import torch

from rlhf_fast.config import OnlineDPOConfig, PPOConfig, ReMaxConfig
from rlhf_fast.lm import manifest
from rlhf_fast.methods import METHODS
from rlhf_fast.rollout.vllm.client import ServerError
from rlhf_fast.stages import ppo, remax
from rlhf_fast.training import checkpoint
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.stopped import Diverged
from tests.support.fake_vllm import FakeVLLM
from tests.support.stages import STAGES, distance, numbers, stage_config, weights

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def fake(tiny_model):
    with FakeVLLM(tiny_model) as server:
        yield server


@pytest.fixture(autouse=True)
def plain(fake):
    fake.restart()
    fake.__dict__.update(shift=0.0, deaf="", faults=[], asked=[])


def ahead(fake: FakeVLLM, **options):
    small = {"max_response_length": 5, "batch_size": 8, "steps": 3, "max_mismatch": 1.0}
    server = {"sampler": "vllm", "vllm_url": fake.url, "vllm_timeout": 20.0, "vllm_patience": 0.5}
    return {**small, **server, "rollouts_ahead": 1, **options}


def events(fake: FakeVLLM) -> list[str]:
    """Pushes by their numbers, and sampled rows by the number of the push that they come from."""
    found, push = [], "0"
    for route, body in fake.asked:
        if route == "/update_weight_version":
            push = body["new_version"].rpartition("-")[2]
            found.append(f"push {push}")
        elif route == COMPLETIONS and "seed" in body and "prompt_logprobs" not in body:
            found.append(f"from {push}")
    return found[found.index("push 1") :]  # before, an earlier run's requests may still be answered


class Watch(Listener):
    """When a round is scored, its successor's requests are under way: training waits for them here."""

    def __init__(self, fake: FakeVLLM, requests: int, rounds: int) -> None:
        self.fake, self.requests, self.rounds = fake, requests, rounds

    def collected(self, step, experience):
        end = time.monotonic() + 20
        asked = self.requests * min(step + 1, self.rounds)
        while sum(event.startswith("from") for event in events(self.fake)) < asked and time.monotonic() < end:
            time.sleep(0.002)
        assert events(self.fake)[-1] == f"from {step if step < self.rounds else step - 1}"


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.online])
def test_every_method_samples_round_t_plus_1_from_the_weights_after_t_minus_1(name, fake, files, tiny_model, tmp_path):
    module, config_class = STAGES[name]
    config = stage_config(config_class, files, tiny_model, tmp_path, **ahead(fake, seed=5))
    requests = {"remax": 16, "ppo": 8, "reinforce": 8, "rloo": 2, "grpo": 1, "online-dpo": 4}[name]
    module.train(config, listeners=[Watch(fake, requests, 3)])
    pushes = [(1, 2 * requests), (2, requests)]
    assert events(fake) == [event for push, rows in pushes for event in [f"push {push}", *[f"from {push}"] * rows]]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["mismatch/mean"] < 1e-5  # the weights that train have sampled
    for row in rows[1:]:  # an update lies between
        assert row["mismatch/mean"] < 0.5
        updated = row["mismatch/mean"] > 1e-4 and row["mismatch/kl"] > 0
        assert updated or name in ("online-dpo", "rloo")  # a round of few prompts may hold equal scores, and no update
        assert row.get("val/logprob_drift", 0) < 1e-4
    assert not list(tmp_path.glob(".rlhf_fast-[pw]*"))


def test_the_correction_is_pi_of_now_over_the_policy_that_sampled(fake, files, tiny_model, tmp_path):
    seen = []

    class Look(Listener):
        def collected(self, step, experience):
            seen.append(experience)

    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, **ahead(fake, steps=2, mismatch_cap=1.01))
    remax.train(config, listeners=[Look()])
    rollout, used = seen[1].rollout, seen[1].weights
    ratio = (rollout.logprobs - rollout.sampler_logprobs).exp().clamp(max=1.01)
    assert (used - ratio)[rollout.response_mask].abs().max() < 1e-6
    assert (ratio - 1)[rollout.response_mask].abs().max() > 1e-3
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["mismatch/cut"] > 0


def test_the_same_seeds_give_the_same_bits_however_slow_the_server_is(fake, files, tiny_model, tmp_path):
    options = evaluated(fake, epochs=1)
    ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "a", **options))
    fake.restart()
    fake.nap = 0.1
    fake.faults += [(COMPLETIONS, "slow")] * 10
    ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "b", **options))
    assert not fake.faults and distance(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def evaluated(fake: FakeVLLM, **options):
    prompts = [{"prompt": text} for text in ("one two", "three", "four five six")]
    return ahead(fake, batch_size=4, eval_data=prompts, eval_steps=2, **options)


@pytest.fixture(scope="module")
def whole(fake, files, tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    remax.train(stage_config(ReMaxConfig, files, tiny_model, directory, **evaluated(fake)))
    return directory


def test_a_resumed_run_trains_on_the_rows_that_older_weights_have_sampled(whole, fake, files, tiny_model, tmp_path):
    class Break(Listener):
        def collected(self, step, experience):
            if step == 2:
                raise RuntimeError("away")

    options = evaluated(fake)
    with pytest.raises(RuntimeError, match="away"):
        remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, **options), listeners=[Break()])
    place = checkpoint.latest(tmp_path)
    assert place == tmp_path / "checkpoint-1" and not (tmp_path / ".rlhf_fast-pushed").exists()
    shutil.copytree(tmp_path, tmp_path.with_name("lost"))
    fake.restart()
    fake.asked.clear()
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, resume=True, **options))
    assert events(fake)[:9] == ["push 1", *["from 1"] * 8]  # round 3, from the weights after update 1
    assert numbers(tmp_path) == numbers(whole) and distance(weights(tmp_path), weights(whole)) == 0

    lost = tmp_path.with_name("lost") / place.name
    state = torch.load(lost / "state.pt", weights_only=True)
    assert state["rounds"]["step"] == 2 and len(state["rounds"]["rows"]) == 8
    torch.save({**state, "rounds": {"step": 0, "rows": []}}, lost / "state.pt")
    manifest.write(lost, manifest.of_files(lost))
    config = stage_config(ReMaxConfig, files, tiny_model, lost.parent, resume=True, **options)
    with pytest.warns(UserWarning, match="rollouts_ahead: the rows of round 2 are lost"):
        remax.train(config)


def test_a_server_that_goes_owes_a_round_from_weights_that_are_kept(whole, fake, files, tiny_model, tmp_path):
    class Break(Listener):
        def collected(self, step, experience):
            if step == 2:  # round 3 is under way
                fake.restart()  # its rows are thrown away
                fake.faults += [(COMPLETIONS, "busy")] * 1000

    options = evaluated(fake)
    with pytest.raises(ServerError, match="got none in 0.5 s of tries: 503"):
        remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, **options), listeners=[Break()])
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    fake.faults.clear()
    fake.restart()
    fake.asked.clear()
    remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, resume=True, **options))
    assert events(fake)[:9] == ["push 1", *["from 1"] * 8]  # from the weights after update 1
    assert numbers(tmp_path)[-1] == numbers(whole)[-1] and distance(weights(tmp_path), weights(whole)) == 0
    assert not (tmp_path / ".rlhf_fast-pushed").exists()


def test_a_server_that_is_started_again_gets_the_older_weights_back(whole, fake, files, tiny_model, tmp_path):
    class Restart(Listener):
        def collected(self, step, experience):
            if step == 2:
                fake.restart()

    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, **evaluated(fake))
    remax.train(config, listeners=[Restart()])
    again = events(fake)
    assert again.count("push 2") == 2 and again.count("push 3") == 1  # W_1 once more, and W_2 for the evaluation
    assert numbers(tmp_path) == numbers(whole) and distance(weights(tmp_path), weights(whole)) == 0


def test_an_update_that_moves_too_far_ends_the_run(fake, files, tiny_model, tmp_path):
    options = ahead(fake, steps=2, max_mismatch=1e-4)
    with pytest.raises(Diverged, match="one update moves the policy too far to sample a round ahead"):
        remax.train(stage_config(ReMaxConfig, files, tiny_model, tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollouts_ahead": 1}, "rollouts_ahead: expected 0 with sampler local"),
        ({"rollouts_ahead": 2}, "rollouts_ahead: expected an integer from 0 to 1, got 2"),
        ({"mismatch": "none"}, "mismatch: expected weights beside rollouts_ahead 1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, words, files, tiny_model, tmp_path):
    server = {"sampler": "vllm", "vllm_url": "http://a:1", "rollouts_ahead": 1} if "mismatch" in options else {}
    with pytest.raises(ValueError, match=f"^{words}"):
        stage_config(PPOConfig, files, tiny_model, tmp_path, **server | options)
    dpo = {"sampler": "vllm", "vllm_url": "http://a:1", "rollouts_ahead": 1, "mismatch": "none"}
    assert stage_config(OnlineDPOConfig, files, tiny_model, tmp_path, **dpo).correction == "none"
