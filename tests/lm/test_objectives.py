"""A policy's losses from hidden states are those from its logits: on every architecture, and through whole stages."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from rlhf_fast.config import DPOConfig, PPOConfig, ReMaxConfig, SFTConfig
from rlhf_fast.lm.objectives import Objectives, output_head
from rlhf_fast.lm.passes import response_hidden, response_logits
from rlhf_fast.ops import ppo_loss, reinforce_loss, sample_tokens
from rlhf_fast.ops.truncation import unpacked
from rlhf_fast.stages import dpo, ppo, remax, sft
from tests.support.models import ARCHITECTURES, random_policy, random_sequences
from tests.support.stages import stage_config


def all_losses(objectives, sequences):
    generator = torch.Generator().manual_seed(0)
    shape = sequences.response_ids.shape
    old, advantages = (torch.randn(shape, generator=generator) for _ in range(2))
    refs = tuple(torch.randn(shape[0] // 2, generator=generator) for _ in range(2))
    ids = sequences.response_ids.masked_fill(~sequences.response_mask, -100)
    return {
        "sft": objectives.sft(sequences, ids, 7.0),
        "reinforce": objectives.reinforce(sequences, advantages, reduction="sequence_sum"),
        "ppo": objectives.ppo(sequences, old - 4, advantages, clip=0.2),
        "dpo": objectives.dpo(sequences, refs, 3.0, beta=0.2),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_and_unfused_agree(architecture):
    sequences = random_sequences(rows=4)
    results = []
    for fused in (True, False):
        model = random_policy(architecture)
        objectives = Objectives(model, temperature=0.7, fused=fused)
        assert (objectives.head is not None) == fused
        outputs, gradients = all_losses(objectives, sequences), {}
        for name, out in outputs.items():
            model.zero_grad()
            out.loss.backward()
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            assert gradients[name].norm() > 1e-3
        with torch.no_grad():
            logprobs = objectives.logprobs(sequences)
        results.append((outputs, gradients, logprobs))
    for name in results[0][0]:
        for a, b in zip(results[0][0][name], results[1][0][name], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(results[0][1][name], results[1][1][name], rtol=1e-4, atol=1e-5)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def truncated_rollout(model, prompts, steps, **options):
    """Sequences drawn token by token, the log-probs and sets they were drawn with."""
    rows, drawn = len(prompts.prompt_ids), []
    ids = torch.zeros(rows, steps, dtype=torch.int64)
    sequences = prompts._replace(response_ids=ids, response_mask=torch.ones(rows, steps, dtype=torch.bool))
    for t in range(steps):
        with torch.no_grad():
            logits = response_logits(model, sequences)[:, t]
        drawn.append(sample_tokens(logits, generator=torch.Generator().manual_seed(t), **options))
        ids[:, t] = drawn[-1].tokens
    return sequences, torch.stack([x.logprobs for x in drawn], 1), torch.stack([x.kept for x in drawn], 1)


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.5}])
@pytest.mark.parametrize("fused", [True, False])
def test_truncated_samples_are_trained_on_the_sets_they_were_drawn_from(options, fused):
    """At once the sampler's log-probs; later, of a policy that has moved, the softmax over the same sets."""
    model, temperature = random_policy("llama"), 0.7
    rollout = truncated_rollout(model, random_sequences(rows=4), 5, temperature=temperature, **options)
    sequences, decoded, kept = rollout
    objectives = Objectives(model, temperature=temperature, fused=fused)
    ppo = {"old_logprobs": decoded, "advantages": torch.linspace(-1, 2, 20).view(4, 5), "kept": kept}
    assert (objectives.logprobs(sequences, kept=kept).logprobs - decoded).abs().max() < 1e-5
    assert objectives.ppo(sequences, **ppo).approx_kl < 1e-9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    outside = ~unpacked(kept, model.config.vocab_size)
    assert outside.any(-1).all()
    logits = response_logits(model, sequences).double().masked_fill(outside, -torch.inf)
    truth = torch.log_softmax(logits / temperature, -1).gather(-1, sequences.response_ids[..., None]).squeeze(-1)
    outs = objectives.reinforce(sequences, ppo["advantages"], kept=kept), objectives.ppo(sequences, **ppo)
    losses = (
        reinforce_loss(truth, ppo["advantages"], sequences.response_mask),
        ppo_loss(truth, decoded, ppo["advantages"], sequences.response_mask).loss,
    )
    for out, loss in zip(outs, losses, strict=True):
        torch.testing.assert_close(out.logprobs.double(), truth.detach(), rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (out.loss, loss)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_a_soft_cap_is_applied():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=0.5))
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    head, sequences = output_head(model), random_sequences(vocab_size=64)
    assert head.softcap == 0.5
    with torch.no_grad():
        assert response_logits(model, sequences).abs().max() > 0.4
        for a, b in zip(
            Objectives(model).logprobs(sequences), Objectives(model, fused=False).logprobs(sequences), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_that_scales_its_logits_goes_through_them():
    model = AutoModelForCausalLM.from_config(CohereConfig(**SHAPE, logit_scale=0.25))
    assert output_head(model) is None
    sequences = random_sequences(vocab_size=64)
    with torch.no_grad():
        logits = response_logits(model, sequences)
        plain = response_hidden(model, sequences) @ model.get_output_embeddings().weight.t()
        torch.testing.assert_close(logits[sequences.response_mask], plain[sequences.response_mask] * 0.25)
        out = Objectives(model).logprobs(sequences)
    expected = torch.log_softmax(logits, -1).gather(-1, sequences.response_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.logprobs, expected.where(sequences.response_mask, 0.0))


@pytest.mark.parametrize(
    ("stage", "config"), [(sft, SFTConfig), (ppo, PPOConfig), (remax, ReMaxConfig), (dpo, DPOConfig)]
)
def test_the_switch_changes_no_metric(stage, config, files, tiny_model, tmp_path):
    runs = []
    for fused in (True, False):
        output = tmp_path / str(fused)
        options = {"learning_rate": 1e-4, "fused_head": fused}
        stage.train(stage_config(config, files, tiny_model, output, **options))
        runs.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert len(runs[0]) == len(runs[1]) >= 4
    for a, b in zip(*runs, strict=True):
        for name, value in a.items():
            if not name.startswith(("time/", "memory/")) and name != "val/logprob_drift":
                assert b[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
