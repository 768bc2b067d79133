"""Stages with LoRA, one base for all of PPO's models, and critics that are smaller or on the policy's trunk."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.config import GRPOConfig, PPOConfig, ReMaxConfig, RewardConfig, SFTConfig
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.passes import response_logits, token_values
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import ppo, remax, reward, sft
from rlhf_fast.stages.init import init_model
from rlhf_fast.stages.online import Online
from rlhf_fast.training import checkpoint
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.metrics import read_metrics
from tests.support.models import model_config
from tests.support.stages import STAGES, distance, interrupted, numbers, stage_config, weights

LORA = {"lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def lora_start(files, tiny_model, tmp_path_factory):
    """An SFT adapter and a reward adapter that began from it, both on the tiny model."""
    out = tmp_path_factory.mktemp("start")
    sft.train(stage_config(SFTConfig, files, tiny_model, out / "sft", learning_rate=1e-2, **LORA))
    reward.train(stage_config(RewardConfig, files, str(out / "sft"), out / "reward", learning_rate=1e-2, **LORA))
    return out


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_trains_adapters_and_resumes_bit_for_bit(name, files, tiny_model, tmp_path):
    module, cls = STAGES[name]
    config = stage_config(cls, files, tiny_model, tmp_path / "whole", save_steps=2, **LORA)
    module.train(config)
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    module.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    result = weights(tmp_path / "whole")
    assert all(".lora_" in key or key.endswith("score.weight") for key in result)
    assert distance(result, weights(cut)) == 0
    assert distance(result, weights(checkpoint.latest(cut))) > 0
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    held = run["static_bytes"]
    for role, count in run["trained_parameters"].items():
        assert held[role]["gradients"] == 4 * count
        assert 8 * count <= held[role]["optimizer"] < 8 * count + 1000
    if name in ("remax", "reinforce", "rloo", "grpo"):
        assert held["reference"] == {"weights": 0, "gradients": 0, "optimizer": 0}


def test_an_adapter_goes_on_being_trained_and_the_reference_is_its_start(lora_start, files, tiny_model, tmp_path):
    start = str(lora_start / "sft")
    config = stage_config(ReMaxConfig, files, start, tmp_path, eval_steps=2, eval_data=files["prompts"], **LORA)
    remax.train(config)
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert history[0]["eval/kl"] == 0
    assert history[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["eval/kl"] > 1e-3
    from_base = {"reference": start, "eval_steps": 4, "eval_data": files["prompts"]}
    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path / "from_base", **from_base, **LORA)
    remax.train(config)  # an adapter as a reference that is named
    assert read_metrics(tmp_path / "from_base" / "metrics.jsonl")[0]["eval/kl"] > 1e-3
    held = json.loads((tmp_path / "from_base" / "run.json").read_text())["static_bytes"]
    assert held["reference"]["weights"] == 4 * sum(t.numel() for t in weights(lora_start / "sft").values())
    settings = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, lora_start / "reward")]
    base = json.loads((lora_start / "sft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert {s["base_model_name_or_path"] for s in settings} == {base}
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("critic", ["model", "shared"])
def test_one_base_gives_the_numbers_of_four_models_in_the_memory_of_one(
    critic,
    lora_start,
    files,
    tiny_model,
    tmp_path,
):
    for shared in (False, True):
        config = stage_config(
            PPOConfig,
            files,
            str(lora_start / "sft"),
            tmp_path / str(shared),
            reward=str(lora_start / "reward"),
            critic=critic,
            share_base=shared,
            epochs=2,
            minibatches=2,
            eval_steps=4,
            eval_data=files["prompts"],
            save_steps=3,
            **LORA,
        )
        ppo.train(config)
    alone, together = (numbers(tmp_path / name) for name in ("False", "True"))
    assert len(alone) == len(together) == 5
    for before, after in zip(alone, together, strict=True):
        for key, value in before.items():
            assert after[key] == pytest.approx(value, rel=1e-3, abs=2e-5), key
    assert distance(weights(tmp_path / "False"), weights(tmp_path / "True")) < 1e-4
    base = load_policy(tiny_model)
    one = 4 * sum(t.numel() for t in (*base.parameters(), *base.buffers()))
    runs = [json.loads((tmp_path / name / "run.json").read_text())["static_bytes"] for name in ("False", "True")]
    four, held = ({role: parts["weights"] for role, parts in run.items()} for run in runs)
    adapter = held["policy"] - one
    assert 0 < adapter < 0.2 * one
    assert sum(held.values()) < one + 4.1 * adapter  # policy, value, reward and the reference's own
    assert sum(four.values()) > (3 if critic == "model" else 2) * one - 4 * base.lm_head.weight.numel()

    resumed = interrupted(tmp_path / "True", tmp_path / "resumed")
    ppo.train(dataclasses.replace(config, output_dir=str(resumed), resume=True))
    assert distance(weights(tmp_path / "True"), weights(resumed)) == 0


def test_a_reward_model_on_another_base_is_refused(lora_start, files, tiny_model, tmp_path, tokenizer):
    settings = model_config("llama", len(tokenizer))
    del settings["vocab_size"]
    init_model(settings, tokenizer, tmp_path / "other", seed=1)
    other, scorer = str(tmp_path / "other"), str(tmp_path / "scorer")
    load_scorer(other).save_pretrained(scorer)
    tokenizer.save_pretrained(scorer)
    for model, rewards in ((other, str(lora_start / "reward")), (str(lora_start / "sft"), scorer)):
        config = stage_config(PPOConfig, files, model, tmp_path / "out", reward=rewards, share_base=True, **LORA)
        with pytest.raises(ValueError, match="share_base: expected adapters on the policy's base"):
            ppo.train(config)


def test_shared_critic_is_one_pass_and_the_sum_of_both_gradients(files, tiny_model, tmp_path):
    config = stage_config(PPOConfig, files, tiny_model, tmp_path, critic="shared", value_coef=0.3, max_grad_norm=0.0)
    online = Online(config, "PPO")
    critic = ppo.load_critic(online)
    torch.nn.init.normal_(critic.model.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    run = SimpleNamespace(meter=Meter("cpu"))
    experience = online.collect(run.meter, 1)
    targets = ppo.advantages_and_returns(run, online, critic, experience)
    rollout, mask = experience.rollout, experience.rollout.response_mask

    passes = []
    hook = online.policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    ppo.joint_backward(run, online, critic, rollout, targets, mask.sum(), mask.sum())
    hook.remove()
    assert len(passes) == 1
    found = {name: p.grad for name, p in online.policy.named_parameters()}

    # The formulas in plain torch on a model of its own; ratio 1 and old value = new value, so nothing is clipped.
    policy, trunk = load_policy(tiny_model), load_scorer(tiny_model, head="zero")
    trunk.load_state_dict(policy.state_dict() | {"score.weight": critic.model.score.weight.detach()}, strict=False)
    logp = torch.log_softmax(response_logits(policy, rollout.sequences), -1)
    logp = logp.gather(-1, rollout.response_ids[..., None]).squeeze(-1)
    (-(targets.advantages * logp)[mask].sum() / mask.sum()).backward()
    values = token_values(trunk, rollout.sequences)
    (0.3 * 0.5 * (values - targets.returns)[mask].square().sum() / mask.sum()).backward()
    value_gradients = {name: p.grad for name, p in trunk.named_parameters()}
    for name, parameter in policy.named_parameters():
        expected = parameter.grad + (0 if value_gradients.get(name) is None else value_gradients[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(critic.model.score.weight.grad, value_gradients["score.weight"], rtol=1e-3, atol=1e-6)


def test_shared_critic_does_not_see_micro_batches(files, tiny_model, tmp_path):
    for micro in (None, 4):
        options = {"critic": "shared", "micro_batch_size": micro, "steps": 2}
        ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / str(micro), **options))
    for whole, parts in zip(numbers(tmp_path / "None"), numbers(tmp_path / "4"), strict=True):
        assert parts == pytest.approx(whole, rel=2e-4, abs=2e-5)


def test_shared_critic_learns_and_resumes(files, tiny_model, tmp_path):
    options = {"critic": "shared", "steps": 12, "save_steps": 10, "value_learning_rate": 1e-2, "value_coef": 1.0}
    config = stage_config(PPOConfig, files, tiny_model, tmp_path / "whole", **options)
    ppo.train(config)
    history = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert history[-1]["loss/value_avg"] < 0.5 * history[0]["loss/value_avg"]
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert run["static_bytes"]["value"]["weights"] == run["static_bytes"]["value"]["gradients"] == 4 * 48
    assert "value_update" not in run["phases"]
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    ppo.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    assert distance(weights(tmp_path / "whole"), weights(cut)) == 0


def test_a_smaller_critic(files, tiny_model, tmp_path, tokenizer):
    settings = model_config("gpt2", len(tokenizer)) | {"n_embd": 16, "n_layer": 1, "n_head": 2}
    del settings["vocab_size"]
    init_model(settings, tokenizer, tmp_path / "small", seed=1)
    config = stage_config(PPOConfig, files, tiny_model, tmp_path / "out", value_model=str(tmp_path / "small"), steps=12)
    ppo.train(dataclasses.replace(config, value_learning_rate=1e-2))
    history = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert history[-1]["loss/value_avg"] < 0.5 * history[0]["loss/value_avg"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["parameters"]["value"] < 0.25 * run["parameters"]["policy"]
    assert load_scorer(tmp_path / "out" / "value").config.model_type == "gpt2"

    other = load_tokenizer(tmp_path / "small")
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "checkpoint.json").unlink()  # as after an edit by hand
    with pytest.raises(ValueError, match="value_model: expected a model with the policy's tokenizer, found another in"):
        ppo.train(dataclasses.replace(config, output_dir=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (PPOConfig, {"share_base": True}, "lora_rank: expected > 0 with share_base"),
        (PPOConfig, {"critic": "shared", "value_model": "m"}, "value_model: expected none with the shared critic"),
        (PPOConfig, {"critic": "shared", "fused_head": False}, "fused_head: expected true with the shared critic"),
        (PPOConfig, {"minibatches": 3}, "minibatches: expected a divisor of batch_size=16, got 3"),
        (GRPOConfig, {"group_size": 5}, "group_size: expected >= 2 and a divisor"),
        (SFTConfig, {"lora_rank": -1}, "lora_rank: expected an integer >= 0, got -1"),
        (SFTConfig, {"lora_alpha": 8.0}, "lora_alpha: expected lora_rank above 0 beside it, got 8 with lora_rank=0"),
        (SFTConfig, {"lora_alpha": 0.0}, "lora_alpha: expected a number > 0, got 0.0"),
        (SFTConfig, {"optimizer_in_backward": True}, "max_grad_norm: expected 0 with optimizer_in_backward, got 1.0"),
        (
            PPOConfig,
            {"optimizer_in_backward": True, "max_grad_norm": 0.0, "minibatches": 2, "micro_batch_size": 4},
            "micro_batch_size: expected one micro-batch per step with optimizer_in_backward, 8 or more rows, got 4",
        ),
    ],
)
def test_bad_values(cls, options, message, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage_config(cls, files, tiny_model, tmp_path, **options)


def test_shared_critic_needs_a_head_on_hidden_states(files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.lm.objectives.output_head", lambda model: None)
    with pytest.raises(ValueError, match="critic: expected model, as no hidden states give the logits"):
        ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path, critic="shared"))
