"""Gradient variance: against gradients by plain autograd, and against exact enumeration of one-token completions."""

import json

import pytest
import torch

from rlhf_fast import exact
from rlhf_fast.config import ReMaxConfig
from rlhf_fast.lab.variance import Moments, gradient_moments, gradient_variance, token_weights
from rlhf_fast.stages.online import Online
from rlhf_fast.training.meter import Meter
from tests.support.stages import stage_config


def letters(prompts, completions):
    return [2.0 + 0.5 * len(completion) for completion in completions]


def test_moments_of_vectors():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments()
    for row in x:
        moments.add(row)
    assert moments.summary()["variance"] == pytest.approx(x.double().var(dim=0).sum().item(), rel=1e-5)
    assert moments.summary()["norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-6)


def test_gradient_variance_is_the_trace_of_the_covariance(files, tiny_model, tmp_path):
    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, gamma=1.0)
    measured = gradient_variance(config, batches=3)
    online = Online(config, "test", greedy=True)
    for name, use_baseline in (("REINFORCE", 0.0), ("ReMax", 1.0)):
        gradients = []
        for step in (1, 2, 3):
            e = online.collect(Meter("cpu"), step)
            weights = (e.scores - use_baseline * e.greedy_scores)[:, None]  # the policy is the reference: no KL
            logprobs = online.objectives.logprobs(e.rollout.sequences).logprobs
            (-(weights * logprobs).sum(1).mean()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in online.learner.parameters]).double())
            online.policy.zero_grad()
        stacked = torch.stack(gradients)
        assert measured[name]["variance"] == pytest.approx(stacked.var(dim=0).sum().item(), rel=1e-3)
        assert measured[name]["norm"] == pytest.approx(stacked.norm(dim=1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"micro_batch_size": 4}, {"fused_head": False}])
def test_micro_batches_and_the_kind_of_head_change_nothing(files, tiny_model, tmp_path, options):
    plain, other = (stage_config(ReMaxConfig, files, tiny_model, tmp_path, **given) for given in ({}, options))
    got, expected = gradient_variance(other, batches=2), gradient_variance(plain, batches=2)
    for name, figures in expected.items():
        assert got[name] == pytest.approx(figures, rel=1e-4)


def test_variances_are_those_of_enumerated_completions(tiny_model, tmp_path):
    """One prompt, one token: an eighth of the exact variance of one draw, or half that of a group of four's mean."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(8 * (json.dumps({"prompt": "the film was"}) + "\n"))
    config = ReMaxConfig(
        model=tiny_model, output_dir=str(tmp_path), train_data=str(prompts), reward=f"{__file__}:letters",
        batch_size=8, max_response_length=1,
    )  # fmt: skip
    online = Online(config, "test", greedy=True)
    grouped = Online(config, "test", samples=4)
    vocabulary = len(online.tokenizer)
    completions = exact.completions(vocabulary, 1)
    ids = torch.tensor([online.prompts[0].prompt_ids])
    logprobs = exact.causal_lm_logprobs(online.policy, ids, completions)[0]
    scores = exact.score_functions(logprobs, online.learner.parameters).double()
    words = online.tokenizer.batch_decode([[i] for i in range(vocabulary)], skip_special_tokens=True)
    rewards = torch.tensor(letters(None, words), dtype=scores.dtype)
    greedy = rewards[exact.greedy(logprobs, completions)]

    def weights(experience):
        e = experience
        baselines = {"none": 0 * e.scores, "greedy": e.greedy_scores, "5": 0 * e.scores + 5}
        return {name: token_weights(online, e, b, e.scores) for name, b in baselines.items()}

    def group_weights(e):
        others = (e.scores.view(-1, 4).sum(1, keepdim=True) - e.scores.view(-1, 4)) / 3
        return {"RLOO": token_weights(online, e, others.flatten(), e.scores)}

    rounds = range(1, 41)
    measured = gradient_moments(online, rounds, weights) | gradient_moments(grouped, rounds, group_weights)
    exactly = {
        name: exact.reinforce_moments(logprobs, scores, rewards, baseline=b).total_variance.item() / 8
        for name, b in {"none": 0.0, "greedy": greedy, "5": 5.0}.items()
    }
    exactly["RLOO"] = exact.rloo_moments(logprobs, scores, rewards, group_size=4).total_variance.item() / 2
    for name, truth in exactly.items():
        assert measured[name]["variance"] == pytest.approx(truth, rel=0.15)  # three standard errors over 40 batches
    assert exactly["greedy"] < exactly["5"] < exactly["RLOO"] < exactly["none"] / 10
