"""TRL's trainers with our passes and heads inside: the numbers of 20 steps are those of the plain trainer."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from rlhf_fast.integrations import states
from rlhf_fast.integrations import trl as trl_integration
from rlhf_fast.integrations.trl import accelerate_trainer
from rlhf_fast.lm import fast_paths
from tests.support.trainers import (
    assert_same_training,
    history,
    made,
    policy,
    refused,
    tokenizer,
)

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
HEAD = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A directory with a policy, from which TRL loads the reference too."""
    directory = tmp_path_factory.mktemp("policy")
    policy().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def packed_passes(monkeypatch):
    """The number of packed passes so far."""
    calls = []
    usual = states.real_hidden
    monkeypatch.setattr(states, "real_hidden", lambda *args, **kwargs: calls.append(1) or usual(*args, **kwargs))
    return calls


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("SFT", {"gradient_accumulation_steps": 2, "max_steps": 10}, True),
        ("SFT", {"adapter": LORA, "gradient_checkpointing": True, "loss_type": "dft"}, False),
        ("SFT", {"packing": True, "max_length": 24}, False),
        ("DPO", {"label_smoothing": 0.1, "loss_type": "robust", "use_weighting": True}, True),
        ("DPO", {"adapter": LORA, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, True),
        ("RLOO", {"temperature": 0.7}, True),
        ("GRPO", {"num_iterations": 2, "loss_type": "dapo", "entropy_coef": 0.01}, True),
        ("Reward", {"center_rewards_coefficient": 0.1}, True),
    ],
)
def test_a_changed_trainer_has_the_numbers_of_a_plain_one(name, options, passes, start, tmp_path, packed_passes):
    plain, changed = (made(name, tmp_path, start, **options) for _ in range(2))
    accelerate_trainer(changed)
    packed_passes.clear()
    assert_same_training(plain, changed, steps=options.get("max_steps", 20))
    assert bool(packed_passes) == passes


def steps(name, tmp_path, model, number=2, **options):
    return made(name, tmp_path, model, max_steps=number, **options)


@pytest.mark.parametrize("adapter", [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), HEAD])
def test_other_adapters_of_peft(adapter, start, tmp_path):
    plain, changed = (steps("SFT", tmp_path, start, adapter=adapter) for _ in range(2))
    accelerate_trainer(changed)
    assert_same_training(plain, changed, steps=2)


def test_kto(start, tmp_path):
    plain, changed = (steps("KTO", tmp_path, start) for _ in range(2))
    accelerate_trainer(changed)
    assert_same_training(plain, changed, steps=2)


def test_under_autocast_the_numbers_are_those_of_bf16(start, tmp_path):
    """TRL rounds the logits to bf16, and this package does not."""
    plain, changed = (steps("DPO", tmp_path, start, bf16=True) for _ in range(2))
    accelerate_trainer(changed)
    assert_same_training(plain, changed, steps=2, tolerance=0.05)


def test_learned_positions_keep_their_padding_on_the_left(tmp_path, monkeypatch):
    """GPT-2 counts positions from the padding, so that rows of GRPO run as TRL pads them."""
    monkeypatch.setattr(fast_paths, "_said", set())
    policy("gpt2").save_pretrained(tmp_path / "gpt2")
    changed = steps("GRPO", tmp_path, str(tmp_path / "gpt2"), beta=0.0)
    plain = steps("GRPO", tmp_path, str(tmp_path / "gpt2"), beta=0.0)
    with pytest.warns(UserWarning, match="padding on the left moves its rows"):
        accelerate_trainer(changed)
        assert_same_training(plain, changed, steps=2)


def test_the_end_of_a_block_restores_the_trainer(start, tmp_path, packed_passes):
    trainer, other = (steps("SFT", tmp_path, start) for _ in range(2))
    forward = trainer.model.forward
    with accelerate_trainer(trainer):
        with pytest.raises(ValueError, match="not accelerated yet; call restore"):
            accelerate_trainer(trainer)
        assert trainer.model.forward != forward
        packed_passes.clear()
        history(other)
        assert not packed_passes  # another trainer keeps its own forward
        history(trainer)
        assert packed_passes
    assert trainer.model.forward == forward
    packed_passes.clear()
    history(trainer)
    assert not packed_passes
    accelerate_trainer(trainer).restore()


def test_a_forward_that_accelerate_has_wrapped_is_restored_too(start, tmp_path, packed_passes):
    trainer = steps("SFT", tmp_path, start, bf16=True)
    with accelerate_trainer(trainer):
        wrapped = trainer.accelerator.prepare_model(trainer.model)
    packed_passes.clear()
    row = torch.tensor([[5, 6, 7, 8]])
    out = wrapped(input_ids=row, attention_mask=torch.ones_like(row), labels=row, fused_lm_head=True)
    assert out.log_probs.shape == (1, 3) and not packed_passes


def test_packed_false_leaves_the_layers_alone(start, tmp_path, packed_passes):
    trainer = steps("SFT", tmp_path, start)
    accelerate_trainer(trainer, packed=False)
    history(trainer)
    assert not packed_passes


def test_generation_is_the_models_own(start, tmp_path):
    trainer = made("SFT", tmp_path, start)
    row = torch.tensor([[5, 6, 7]])
    before = trainer.model.generate(row, max_new_tokens=4, do_sample=False)
    accelerate_trainer(trainer)
    assert torch.equal(trainer.model.generate(row, max_new_tokens=4, do_sample=False), before)


def test_what_does_not_fit_is_refused_in_one_line(start, tmp_path, monkeypatch):
    plain = Trainer(policy(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    refused(plain, r"one of TRL's SFTTrainer, .*, RewardTrainer, got transformers\.trainer\.Trainer$")
    trainer = made("SFT", tmp_path, start)
    for options, message in {
        ("use_liger_kernel", True): "use_liger_kernel=False, because Liger replaces the same layers, got True$",
        ("torch_compile", True): "torch_compile=False, because losses run eagerly, got True$",
        ("activation_offloading", True): "activation_offloading=False, because it has not been tried .*, got True$",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(trainer.args, *options)
            refused(trainer, message)
    for sharding in ("DeepSpeed", "FSDP"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, f"is_{sharding.lower()}_enabled", True)
            refused(trainer, f"whole weights in every process, got {sharding}$")
    with monkeypatch.context() as patch:
        patch.setattr(trl_integration, "version", lambda _: "1.17.0")
        refused(trainer, r"a trainer of TRL 1\.16, got TRL 1\.17\.0$")
    with monkeypatch.context() as patch:
        config = AutoConfig.for_model("t5", vocab_size=37, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
        patch.setattr(trainer, "model", AutoModelForSeq2SeqLM.from_config(config))
        refused(trainer, "a decoder, got the encoder-decoder T5ForConditionalGeneration$")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "hf_device_map", {"model.embed_tokens": 0, "model": 0, "lm_head": "cpu"}, False)
        refused(trainer, "all weights on one device, got a device map of 0, cpu$")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "full_tensor", lambda weight: weight, raising=False)
        refused(trainer, "whole weights in every process, got DTensors$")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model.config, "logit_scale", 0.5, raising=False)
        refused(trainer, "TRL's log_probs on a short row, got numbers that differ by")
    head = trainer.model.lm_head
    for change, message in {
        "eight bits": r"a floating-point weight \[V, H\], got Linear of torch\.int8$",
        "adapted": "no adapter on the last layer",
    }.items():
        trainer.model.lm_head = torch.nn.Linear(48, 64)
        if change == "adapted":  # TRL refuses such an adapter where it makes it
            trainer.model.lm_head.lora_A = torch.nn.ModuleDict()
        else:
            weight = torch.ones(64, 48, dtype=torch.int8)
            trainer.model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        refused(trainer, message)
    trainer.model.lm_head = head
    accelerate_trainer(trainer)
