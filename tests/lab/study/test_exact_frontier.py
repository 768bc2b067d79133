"""The exact study: nothing lies above the frontier, envelopes by hand, best-of-N against every pair of draws."""

import json
import math

import pytest
import torch

from rlhf_fast import cli, exact
from rlhf_fast.lab.study.config import ExactStudyConfig
from rlhf_fast.lab.study.envelopes import envelope
from rlhf_fast.lab.study.exact_frontier import summary, train_all
from rlhf_fast.lab.study.exact_methods import OFFLINE, ONLINE, best_of
from rlhf_fast.lab.study.exact_world import learn_rewards, make_world, sample_pairs

SMALL = ExactStudyConfig(vocab_size=3, length=2, pairs=64, steps=6, eval_every=3, seeds=2)


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


def test_world(world):
    assert exact.expected_reward(world.ref_logprobs, world.rewards).item() == pytest.approx(0, abs=1e-12)
    assert exact.expected_reward(world.ref_logprobs, world.rewards.square()).item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(world.new_policy()(), world.ref_logprobs, atol=1e-12, rtol=0)


def test_pairs_follow_bradley_terry(world):
    """Both orders of every pair of completions, in the numbers expected; within 5 standard errors."""
    n = 200_000
    pairs = sample_pairs(world, n, torch.Generator().manual_seed(0))
    got = torch.zeros(81, dtype=torch.float64).index_add(0, pairs[:, 0] * 9 + pairs[:, 1], torch.ones(n).double()) / n
    p = world.ref_logprobs.exp()
    expected = (2 * p[:, None] * p * exact.bradley_terry(world.rewards)).flatten()
    assert ((got - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_learned_rewards_approach_the_true_ones(world):
    pairs = sample_pairs(world, 20_000, torch.Generator().manual_seed(0))
    learned = learn_rewards(world, pairs, 0.05)
    error = exact.expected_reward(world.ref_logprobs, (learned - world.rewards).square()).sqrt()
    assert error < 0.15  # the true reward's deviation is 1; 0.03 to 0.09 for seeds 0 to 9


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_two_over_every_pair_of_draws(world, ties):
    scores = world.rewards.round() if ties else world.rewards
    p = world.ref_logprobs.exp()
    expected = torch.zeros(9, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            if scores[i] == scores[j]:
                expected[i] += p[i] * p[j] / 2
                expected[j] += p[i] * p[j] / 2
            else:
                expected[i if scores[i] > scores[j] else j] += p[i] * p[j]
    torch.testing.assert_close(best_of(world, scores, 2).exp(), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(best_of(world, scores, 1), world.ref_logprobs, atol=1e-12, rtol=0)


def test_envelope_by_hand():
    points = [(1, 0.5, 1.0), (2, 0.2, 0.3), (3, 2.0, 0.9)]
    assert envelope(points, 0.0, [0.1, 0.2, 0.4, 0.5, 3.0]) == [0.0, 0.3, 0.3, 1.0, 1.0]
    assert envelope([(1, 0.5, -1.0)], 0.0, [1.0]) == [0.0]


def test_no_policy_lies_above_the_frontier(world):
    runs = train_all(world, SMALL, seed=0)
    strengths = sum(len(methods) for family in (OFFLINE, ONLINE) for methods in family.values())
    assert len(runs) == strengths + 3
    for one in runs:
        for _, kl, reward in one["points"]:
            if 1e-9 < kl < -math.log(world.ref_logprobs[world.rewards.argmax()].exp()) - 1e-9:
                beta = exact.beta_at_kl(world.ref_logprobs, world.rewards, kl)
                assert reward <= exact.frontier(world.ref_logprobs, world.rewards, [beta]).reward.item() + 1e-9


def test_a_policy_on_the_frontier_has_no_area_but_the_grid_s(world):
    """Points dense on the frontier: what is left is the step of the envelope between two of them."""
    betas = [10 ** (2 - i / 200) for i in range(800)]
    points = exact.frontier(world.ref_logprobs, world.rewards, betas)
    cloud = [(0, kl, reward) for kl, reward in zip(points.kl.tolist(), points.reward.tolist(), strict=True)]
    both = summary(world, [{"method": "DPO", "seed": seed, "points": cloud} for seed in (0, 1)])
    assert 0 <= both["methods"]["DPO"]["area"]["mean"] < 0.01
    assert both["methods"]["DPO"]["area"]["se"] == 0
    nothing = summary(world, [{"method": "DPO", "seed": seed, "points": []} for seed in (0, 1)])
    rewards = both["frontier"]["reward"]
    assert nothing["methods"]["DPO"]["area"]["mean"] == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.parametrize("name, expected", [("PPO-GT", 0.6), ("RLOO", 0.6), ("DPO", 0.4)])
def test_methods_raise_the_true_reward(world, name, expected):
    """By this many of the reference's deviations, on 20000 pairs; the best completion stands at more than 1.3."""
    config = ExactStudyConfig(vocab_size=3, length=2, pairs=20_000, steps=100)
    assert world.rewards.max() > 1.3
    generator = torch.Generator().manual_seed(1)
    data = sample_pairs(world, config.pairs, generator) if name in OFFLINE else world.rewards
    policy = world.new_policy()
    update = [*(OFFLINE | ONLINE)[name].values()][1](policy, world, data, config, generator)
    for _ in range(config.steps):
        update()
    assert exact.expected_reward(policy().detach(), world.rewards) > expected


def test_command(tmp_path, capsys):
    flags = ["--vocab-size", "3", "--length", "2", "--pairs", "64", "--steps", "3", "--eval-every", "3", "--seeds", "2"]
    assert cli.main(["study", "exact", "--out", str(tmp_path / "out"), *flags]) == 0
    record = json.loads((tmp_path / "out" / "exact.json").read_text())
    assert set(record["methods"]) == {*OFFLINE, *ONLINE, "RM optimum", "Best-of-N", "Best-of-N-GT"}
    assert all(len(method["area"]["seeds"]) == 2 for method in record["methods"].values())
    assert (tmp_path / "out" / "exact.png").stat().st_size > 0
    assert "exact frontier" in capsys.readouterr().out


@pytest.mark.parametrize("flag, message", [("--seeds=1", "at least 2"), ("--batch-size=6", "a multiple of 4")])
def test_bad_config(flag, message, capsys):
    assert cli.main(["study", "exact", flag]) == 2
    assert message in capsys.readouterr().err
