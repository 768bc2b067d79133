"""Online DPO: which sample is chosen, ln 2 where policy and reference are one, and scores that rise."""

import math
from pathlib import Path

import pytest
import torch

from rlhf_fast.config import OnlineDPOConfig
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.ops import dpo_loss
from rlhf_fast.stages import online_dpo
from rlhf_fast.stages.online import Online
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.run import Run
from tests.support.stages import REWARD, distance, stage_config, weights


def test_the_higher_score_is_chosen_and_a_tie_is_left_out():
    scores = torch.tensor([1.0, 2.0, 0.5, 0.5, 3.0, -1.0])
    chosen, rejected = online_dpo.preferred(scores)
    assert chosen.tolist() == [1, 4] and rejected.tolist() == [0, 5]
    assert all(len(rows) == 0 for rows in online_dpo.preferred(torch.zeros(4)))


def test_the_first_step_has_no_margin_and_scores_rise(files, tiny_model, tmp_path):
    config = stage_config(OnlineDPOConfig, files, tiny_model, tmp_path, steps=40, batch_size=32, learning_rate=4e-3)
    online_dpo.train(config)
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss/policy_avg"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-5 and 0 < first["pairs"] <= 16
    assert first["val/logprob_drift"] < 1e-5
    assert last["objective/scores"] > first["objective/scores"] + 0.05


@pytest.mark.parametrize("options", [{"micro_batch_size": 4}, {"fused_head": False}, {"micro_batch_size": 2}])
def test_micro_batches_and_the_head_change_nothing(options, files, tiny_model, tmp_path):
    for name, more in (("plain", {}), ("other", options)):
        online_dpo.train(stage_config(OnlineDPOConfig, files, tiny_model, tmp_path / name, **more))
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "other")) < 5e-6


def test_the_gradient_is_that_of_dpo_on_the_pairs(files, tiny_model, tmp_path):
    config = stage_config(
        OnlineDPOConfig, files, tiny_model, tmp_path, micro_batch_size=4, max_grad_norm=0.0, kl_coef=0.2, beta=0.7
    )
    online = Online(config, "test", samples=2)
    with torch.no_grad():  # a reference of its own, so that the KL counts
        for parameter in online.reference.parameters():
            parameter.mul_(1.05)
    experience = online.collect(Meter("cpu"), 1)
    rollout, mask = experience.rollout, experience.rollout.response_mask
    new = Objectives(online.policy, fused=False).logprobs(rollout.sequences).logprobs
    refs = torch.where(mask, experience.ref_logprobs, 0.0).sum(1)
    kl = torch.where(mask, rollout.logprobs, 0.0).sum(1) - refs
    scores = (experience.scores - 0.2 * kl).view(-1, 2)
    decided = scores[:, 0] != scores[:, 1]
    order = scores.sort(dim=1, descending=True).indices[decided]
    logps, pair_refs = (x.view(-1, 2)[decided].gather(1, order) for x in (new.sum(1), refs))
    loss = dpo_loss(logps[:, 0], logps[:, 1], pair_refs[:, 0], pair_refs[:, 1], beta=0.7).losses.mean()
    expected = torch.autograd.grad(loss, online.learner.parameters)
    norms = []
    online.learner.optimizer.register_step_pre_hook(
        lambda *_: norms.extend(p.grad.clone() for p in online.learner.parameters)
    )
    chosen, rejected = online_dpo.preferred(scores.flatten())
    with Run(config, "test", 1, learners={"policy": online.learner}, tokenizer=online.tokenizer) as run:
        metrics = online_dpo.step(online, run, rollout, refs, chosen, rejected)
    assert metrics["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-5)
    for found, truth in zip(norms, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"optimizer_in_backward": True, "max_grad_norm": 0.0}])
def test_rounds_without_a_preference_change_nothing(options, files, tiny_model, tmp_path):
    reward = REWARD.replace("shortness", "constant")
    online_dpo.train(
        stage_config(OnlineDPOConfig, files, tiny_model, tmp_path, reward=reward, weight_decay=0.1, **options)
    )
    assert distance(weights(Path(tiny_model)), weights(tmp_path)) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["pairs"] for row in rows] == [0] * 4 and all(row["grad_norm"] == 0 for row in rows)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 7), ("micro_batch_size", 3)])
def test_odd_numbers_make_no_pairs(name, value, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: expected an even number, since two completions make a pair, got"):
        stage_config(OnlineDPOConfig, files, tiny_model, tmp_path, **{"batch_size": 12, name: value})
