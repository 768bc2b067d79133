"""transformers' Trainer with our passes and loss: the numbers of 20 steps are those of the plain Trainer."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from rlhf_fast.integrations import states
from rlhf_fast.integrations.trainer import FusedTrainer, sft_loss
from tests.support.models import model_config
from tests.support.trainers import PLAIN, assert_same_training, policy, text, tokenizer


def rows(number):
    r = random.Random(2)
    found = [tokenizer()(text(r.randint(3, 12), r))["input_ids"] for _ in range(number)]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in found]


def collate(batch):
    """Padded on the right."""
    width = max(len(row["input_ids"]) for row in batch)
    padded = {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    return padded | {"attention_mask": (torch.arange(width) < lengths).long()}


def made(kind, tmp_path, model, *, func=None, **options):
    torch.manual_seed(4)
    args = TrainingArguments(**PLAIN | {"output_dir": str(tmp_path)} | options)
    data = {"train_dataset": rows(80), "eval_dataset": rows(9), "data_collator": collate}
    return kind(model, args=args, compute_loss_func=func, **data)


def adapted():
    torch.manual_seed(5)
    return get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def mixture():
    """Experts whose load is balanced."""
    torch.manual_seed(6)
    sizes = model_config("llama", 64) | {"num_local_experts": 4, "output_router_logits": True}
    sizes.pop("model_type")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))


@pytest.mark.parametrize(
    ("model", "options", "packed"),
    [
        (policy, {"gradient_accumulation_steps": 2}, True),
        (policy, {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}, True),
        (adapted, {"activation_checkpointing": True, "max_steps": 3}, False),
        (adapted, {"label_smoothing_factor": 0.2, "max_steps": 3}, True),
        (mixture, {"max_steps": 3}, False),
        (lambda: policy("gemma2"), {"max_steps": 3}, False),
        (lambda: policy("gpt2"), {"max_steps": 1}, True),
    ],
)
def test_the_numbers_are_those_of_the_plain_trainer(model, options, packed, tmp_path, monkeypatch):
    plain, fused = (made(kind, tmp_path, model(), **options) for kind in (Trainer, FusedTrainer))
    for trainer in (plain, fused):
        for module in trainer.model.modules():  # GPT-2's dropout draws other masks in a packed pass
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    calls, usual = [], states.real_hidden
    monkeypatch.setattr(states, "real_hidden", lambda *args, **kwargs: calls.append(1) or usual(*args, **kwargs))
    assert_same_training(plain, fused, steps=options.get("max_steps", 20))
    assert bool(calls) == packed
    theirs, ours = (trainer.evaluate() for trainer in (plain, fused))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_function_alone_has_the_numbers_of_the_plain_trainer(accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 10}
    plain = made(Trainer, tmp_path, policy(), **options)
    changed = made(Trainer, tmp_path, policy(), func=sft_loss, **options)
    assert_same_training(plain, changed, steps=10)


def test_no_logits_are_made_in_training_and_evaluation_has_them(tmp_path):
    trainer = made(FusedTrainer, tmp_path, policy())
    batch = collate(rows(3))
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert not seen
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert seen and outputs.logits.shape == (*batch["input_ids"].shape, 64)
    torch.testing.assert_close(loss, outputs.loss, rtol=1e-5, atol=1e-6)
    assert loss.grad_fn is not None


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^label_smoothing_factor: expected 0 .* soft cap, got 0.1$"):
        made(FusedTrainer, tmp_path, policy("gemma2"), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="^trainer: expected use_liger_kernel=False"):
        made(FusedTrainer, tmp_path, policy(), use_liger_kernel=True)
    odd = policy()
    odd.config.logit_scale = 0.5  # which Llama does not read
    with pytest.raises(ValueError, match="^trainer.model: expected its own loss on a short row, got numbers that"):
        made(FusedTrainer, tmp_path, odd)
