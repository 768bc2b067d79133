"""The policy losses that a config names: denominators, options, dynamic sampling, and the numbers of a stage."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.config import GRPOConfig, PPOConfig, ReinforceConfig
from rlhf_fast.ops import gae, grpo_advantages, length_adaptive_lambda, whiten
from rlhf_fast.ranks import Ranks
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages import dynamic, grpo, ppo
from rlhf_fast.stages.clipped import denominator, loss_options, scores_less_kl
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.metrics import read_metrics
from tests.support.stages import PARITY, stage_config

OWN = {"model": "m", "output_dir": "o", "train_data": "t", "reward": "f.py:r"}


def online(cls=GRPOConfig, **options):
    config = cls(**OWN, **options)
    return SimpleNamespace(config=config, device=torch.device("cpu"), kl=SimpleNamespace(coef=0.1))


@pytest.mark.parametrize(
    "loss_type, expected",
    [("grpo", 8), ("sapo", 8), ("luspo", 8), ("dr_grpo", 8 * 5), ("bnpo", 13), ("dapo", 31 / 2), ("cispo", 31 / 2)],
)
def test_denominators(loss_type, expected):
    """16 completions of 5 tokens at most in two minibatches; 13 tokens in this minibatch, 31 in the round."""
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    run = online(loss_type=loss_type, batch_size=16, minibatches=2, max_response_length=5, group_size=2, **level)
    assert denominator(run, torch.tensor(13), torch.tensor(31)).item() == expected


def test_options():
    ref, per_row, per_token = torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3)
    dapo = loss_options(online(loss_type="dapo", clip_high=0.28, delta=4.0, kl_in="reward"), per_row, ref)
    assert dapo == dict(importance_sampling_level="token", reduction="token_mean", clip=(0.2, 0.28), dual_clip=4.0)
    gspo = loss_options(online(importance_sampling_level="sequence", clip=3e-4, clip_high=4e-4), per_row, ref)
    assert gspo["clip"] == (3e-4, 4e-4) and gspo["importance_sampling_level"] == "sequence"
    assert (gspo["kl_estimator"], gspo["kl_coef"], gspo["ref_logprobs"] is ref) == ("k3", 0.1, True)
    weighed = loss_options(online(importance_sampling_level="sequence"), per_token, ref)
    assert weighed["importance_sampling_level"] == "sequence_token"  # a server's tokens keep their own weights
    cispo = loss_options(online(loss_type="cispo", clip_high=4.0, kl_in="reward"), per_row, ref)
    assert (cispo["objective"], cispo["clip"], cispo["reduction"]) == ("cispo", 4.0, "token_mean")
    sapo = loss_options(online(loss_type="sapo", sapo_temperature_neg=1.5, kl_in="reward"), per_row, ref)
    assert (sapo["objective"], sapo["sapo_temperature"], sapo["reduction"]) == ("sapo", (1.0, 1.5), "sequence_mean")
    assert loss_options(online(PPOConfig), per_token, ref) == dict(
        importance_sampling_level="token", reduction="token_mean", clip=(0.2, 0.2), dual_clip=None
    )


def some_rollout(B=4, T=3):
    mask = torch.arange(T) < torch.tensor([3, 1, 2, 3]).repeat(B // 4)[:, None]
    ids = torch.arange(B * T).view(B, T)
    return Rollout(ids, mask, ids, mask, -torch.rand(B, T) * mask, torch.rand(B, T) * mask, mask[:, -1])


def test_kl_in_the_reward():
    """The scores are less kl_coef times the KL of the completion; in the loss they stay as they are."""
    rollout, ref = some_rollout(), -torch.rand(4, 3)
    experience = Experience(rollout, torch.randn(4), None, ref, {})
    kl = torch.where(rollout.response_mask, rollout.logprobs - ref, 0.0).sum(1)
    got = scores_less_kl(online(kl_in="reward"), experience)
    torch.testing.assert_close(got, experience.scores - 0.1 * kl)
    assert scores_less_kl(online(), experience) is experience.scores


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (GRPOConfig, {"loss_type": "cispo", "clip": 0.3}, "clip: expected its default with loss_type cispo, .* 0.3"),
        (GRPOConfig, {"loss_type": "sapo", "clip_high": 0.3}, "clip_high: expected none with loss_type sapo, got 0.3"),
        (GRPOConfig, {"loss_type": "sapo", "delta": 2.0}, "delta: expected none with loss_type sapo, .* got 2.0"),
        (GRPOConfig, {"sapo_temperature_pos": 2.0}, "sapo_temperature_pos: expected loss_type sapo beside it"),
        (GRPOConfig, {"loss_type": "luspo"}, "importance_sampling_level: expected sequence or sequence_token with"),
        (GRPOConfig, {"loss_type": "vespo"}, "loss_type: expected one of grpo, .* got 'vespo'"),
        (GRPOConfig, {"kl_estimator": "k1"}, "kl_estimator: expected k2, k3 or abs with kl_in loss, .* got k1"),
        (
            GRPOConfig,
            {"kl_in": "reward", "use_bias_correction_kl": True},
            "use_bias_correction_kl: expected kl_in loss",
        ),
        (
            GRPOConfig,
            {"importance_sampling_level": "sequence", "use_bias_correction_kl": True},
            "use_bias_correction_kl: expected importance_sampling_level token beside it, got sequence",
        ),
        (
            PPOConfig,
            {"importance_sampling_level": "sequence"},
            "importance_sampling_level: expected token or sequence_t",
        ),
        (PPOConfig, {"soft_punish_cache": 65}, "soft_punish_cache: expected at most max_response_length=64, got 65"),
        (ReinforceConfig, {"kl_to_go": True, "gamma": 0.9}, "gamma: expected 1 with kl_to_go, got 0.9"),
    ],
)
def test_options_that_do_not_fit(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**OWN, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "clip": 0.01, "scale_rewards": "none"},
        {"loss_type": "cispo", "use_bias_correction_kl": True, "kl_estimator": "k1"},
        {"loss_type": "dr_grpo", "soft_punish_cache": 4, "scale_rewards": "batch"},
    ],
)
def test_micro_batches_change_nothing(options, files, tiny_model, tmp_path):
    """Two steps on one rollout, so that the ratios of the second are not 1."""
    options |= {"steps": 1, "seed": 3, "group_size": 4, "minibatches": 2, "learning_rate": 1e-2}
    for micro in (None, 4):
        own = options | {"micro_batch_size": micro}
        grpo.train(stage_config(GRPOConfig, files, tiny_model, tmp_path / str(micro), **own))
    whole, parts = (read_metrics(tmp_path / m / "metrics.jsonl")[0] for m in ("None", "4"))
    assert abs(whole["val/ratio"] - 1) > 1e-6 or whole["policy/approxkl_avg"] > 1e-6
    for key, value in whole.items():
        if not key.startswith(("time/", "memory/", "val/logprob_drift")):
            assert parts[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


def test_vapo_has_a_lambda_for_the_advantages_and_another_for_the_returns():
    rewards, values, mask = torch.randn(3, 9), torch.randn(3, 9), torch.rand(3, 9) < 0.8
    lam = length_adaptive_lambda(mask.sum(1), 0.3)
    out = gae(rewards, values, mask, lam=lam, value_lam=1.0)
    torch.testing.assert_close(out.returns, gae(rewards, values, mask, lam=1.0).returns)
    for row, of_row in enumerate(lam.tolist()):
        one = slice(row, row + 1)
        alone = gae(rewards[one], values[one], mask[one], lam=of_row)
        torch.testing.assert_close(out.advantages[one], alone.advantages)


def test_ppo_takes_vapo_s_lambdas(files, tiny_model, tmp_path):
    options = {"value_lam": 1.0, "length_adaptive_alpha": 0.5, "kl_in": "loss", "loss_type": "sapo", "epochs": 1}
    config = stage_config(PPOConfig, files, tiny_model, tmp_path, **options)
    run = Online(config, "test")
    experience, critic = run.collect(Meter("cpu"), 1), ppo.load_critic(run)
    targets = ppo.advantages_and_returns(SimpleNamespace(meter=Meter("cpu")), run, critic, experience)
    mask, rewards = experience.rollout.response_mask, torch.zeros_like(targets.values)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask)), last] = experience.scores  # the KL is in the loss
    lam = length_adaptive_lambda(mask.sum(1), 0.5)
    expected = gae(rewards, targets.values, mask, lam=lam)
    torch.testing.assert_close(targets.advantages, whiten(expected.advantages, mask))
    torch.testing.assert_close(targets.returns, gae(rewards, targets.values, mask, lam=1.0).returns)
    assert (lam < 0.95).all()


class TestDynamicSampling:
    def test_even_prompts(self):
        scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
        assert dynamic.even(scores, 2).tolist() == [True, False, True]

    def test_replaced(self):
        """Prompt 1 of 2 is even; of the second batch, longer by a token, prompt 2 alone is not."""
        first, longer = some_rollout(), some_rollout(T=4)
        scores, more = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.2, 0.3])
        a = dynamic.Drawn(first, scores, None, {"x": scores.double()})
        got = dynamic.replaced(a, dynamic.Drawn(longer, more, None, {"x": more.double()}), 2, 99, Ranks())
        assert got.scores.tolist() == pytest.approx([0.2, 0.3, 0.0, 1.0])
        assert got.parts["x"].tolist() == pytest.approx([0.2, 0.3, 0.0, 1.0])
        assert got.rollout.response_ids.tolist() == [*longer.response_ids[2:].tolist(), [6, 7, 8, 99], [9, 10, 11, 99]]
        assert got.rollout.prompt_ids[2].tolist() == [99, 6, 7, 8]
        assert got.rollout.response_mask.sum(1).tolist() == [2, 3, 2, 3]
        assert torch.equal(got.rollout.logprobs[:2], longer.logprobs[2:])

    @pytest.mark.parametrize("size", [2, 3])
    def test_several_processes_replace_what_one_replaces(self, size):
        """Prompts 0, 1 and 4 of 6 are even; of the second batch 2 and 5 are not, which other processes have sampled."""
        scores, more = torch.arange(12.0), torch.ones(12)
        scores[[1, 3, 9]] -= 1
        more[[4, 11]] = 0.5
        a = dynamic.Drawn(some_rollout(12), scores, None, {"x": scores.double()})
        b = dynamic.Drawn(some_rollout(12, T=4), more, None, {"x": more.double()})
        whole = dynamic.replaced(a, b, 2, 99, Ranks())
        assert whole.scores.tolist() == [0.5, 1.0, 1.0, 0.5, *scores[4:].tolist()]

        def one(ranks):
            own = torch.arange(6)[ranks.part(6)]
            return dynamic.replaced(a.prompts(own, 2), b.prompts(own, 2), 2, 99, ranks)

        parts = in_threads(size, one)
        assert [len(part.scores) for part in parts] == [12 // size] * size
        for name, x in whole.rollout._asdict().items():
            assert x is None or torch.equal(torch.cat([getattr(part.rollout, name) for part in parts]), x), name
        assert torch.equal(torch.cat([part.scores for part in parts]), whole.scores)
        assert torch.equal(torch.cat([part.parts["x"] for part in parts]), whole.parts["x"])

    @pytest.mark.parametrize("batches", [1, 3])
    def test_a_round_samples_until_no_prompt_is_even(self, batches, files, tiny_model, tmp_path):
        """A reward of a random bit: of 8 prompts with two samples half are even. A constant one: all, to the end."""
        options = {"group_size": 2, "max_num_gen_batches": batches, "max_response_length": 4, "kl_coef": 0.0}
        left = []
        for reward in (PARITY, f"{__file__}:zero"):
            config = stage_config(GRPOConfig, files, tiny_model, tmp_path, **options, reward=reward)
            experience = Online(config, "test", samples=2).collect(Meter("cpu"), 1)
            left.append(dynamic.even(experience.scores, 2).sum().item())
        assert experience.batches == batches and left[1] == 8
        assert left[0] > 0 if batches == 1 else left[0] < 3


def in_threads(size, act):
    """What act(ranks) returns in each of `size` threads that stand for processes."""
    shared, barrier = [None] * size, threading.Barrier(size, timeout=30)

    class Thread(Ranks):
        def gather(self, value):
            shared[self.rank] = value
            barrier.wait()
            found = list(shared)
            barrier.wait()
            return found

    with ThreadPoolExecutor(size) as pool:
        return [*pool.map(lambda rank: act(Thread(rank, size)), range(size))]


def zero(prompts, completions):
    return [0.0] * len(completions)


def test_scale_of_advantages():
    scores = torch.tensor([0.0, 1.0, 3.0, 7.0])
    centred = torch.tensor([-0.5, 0.5, -2.0, 2.0])
    torch.testing.assert_close(grpo_advantages(scores, 2, scale_rewards="none"), centred)
    torch.testing.assert_close(grpo_advantages(scores, 2, scale_rewards="batch"), centred / (scores.std() + 1e-4))
    with pytest.raises(ValueError, match="scale_rewards: expected one of group, batch, none, got 'row'"):
        grpo_advantages(scores, 2, scale_rewards="row")
