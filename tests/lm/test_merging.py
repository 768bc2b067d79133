"""Adapters that peft has made: the function that peft computes, merged, kept on, and saved again, or one line."""

import json
import re
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.lm import adapters
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.saving import save_model
from rlhf_fast.rollout import engine
from tests.support.models import random_sequences

LORA = LoRA(4, 8.0, seed=0)
IDS = torch.tensor([[5, 9, 33, 36, 12, 4, 6, 17]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
BASES = {
    "tied": ("llama", GATED | {"tie_word_embeddings": True}),
    "untied": ("llama", GATED | {"tie_word_embeddings": False, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}


def lora(modules="all-linear", **options):
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=modules, **options)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PLAIN = {  # training may go on with these
    "head": ("tied", lora(["q_proj", "lm_head"])),
    "embedding": ("tied", lora(["q_proj", "embed_tokens"])),
    "head_and_embedding": ("tied", lora(["q_proj", "embed_tokens", "lm_head"])),
    "tokens": ("tied", lora(["q_proj"], trainable_token_indices=[5, 9])),
    "tokens_apart": ("untied", lora(["q_proj"], trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [6]})),
    "saved_embedding": ("tied", lora(["q_proj"], modules_to_save=["embed_tokens"])),
    "saved_head": ("tied", lora(["q_proj"], modules_to_save=["lm_head"])),
    "saved_both": ("tied", lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "dora": ("untied", lora(use_dora=True)),
    "rslora": ("untied", lora(use_rslora=True)),
    "its_bias": ("untied", lora(["q_proj"], lora_bias=True)),
    "patterns": ("untied", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, lora_dropout=0.3)),
    "one_layer": ("untied", lora(["q_proj"], layers_to_transform=[1])),
    "gpt2_tokens": ("gpt2", lora(["c_attn"], fan_in_fan_out=True, trainable_token_indices=[5, 9])),
    "parameter": ("untied", lora(["v_proj"], target_parameters=["q_proj.weight"])),
    "experts": ("mixtral", lora()),
    "some_experts": ("gpt_oss", lora(["q_proj"], target_parameters=EXPERTS)),
}
MERGED = {  # these are merged alone
    "tied_adapters": ("tied", lora(["embed_tokens"], ensure_weight_tying=True)),
    "bias": ("untied", lora(["q_proj"], bias="all")),
    "pissa": ("untied", lora(["q_proj"], init_lora_weights="pissa")),
    "adalora": ("untied", peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)),
    "ia3": ("untied", peft.IA3Config(task_type="CAUSAL_LM")),
    "vera": ("untied", peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])),
    "oft": ("untied", peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=0, oft_block_size=8)),
    "new_tokens": ("tied", peft.TrainableTokensConfig(token_indices=[5, 9])),
}
REFUSED = {
    "prompts": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "expected an adapter that changes weights in .*prompts, got PROMPT_TUNING",
    ),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "expected an adapter that changes weights in .*prefix, got PREFIX_TUNING",
    ),
    "alora": (lora(["q_proj"], alora_invocation_tokens=[1, 2]), "got LoRA that waits for its alora_invocation_tokens"),
    "replicated": (lora(["q_proj"], layer_replication=[[0, 2], [1, 2]]), "keeps its base's layers in .*replicated"),
}


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def made(tmp_path):
    """made(base, config): the folders of a base and of an adapter on it with random weights."""

    def make(base, config):
        torch.manual_seed(0)
        kind, settings = BASES[base]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(plain(tmp_path / "base"), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def by_peft(base, adapter):
    return PeftModel.from_pretrained(plain(base), str(adapter)).eval()


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", PLAIN | MERGED)
def test_a_merged_adapter_is_pefts_function(name, made, tmp_path):
    base, adapter = made(*(PLAIN | MERGED)[name])
    truth = logits(by_peft(base, adapter))
    assert (truth - logits(plain(base))).abs().max() > 0.01
    model = load_policy(adapter)
    assert all(parameter.requires_grad for parameter in model.parameters())
    close(logits(model), truth)
    save_model(model, tmp_path / "out")
    close(logits(plain(tmp_path / "out")), truth)


@pytest.mark.parametrize("name", PLAIN)
def test_training_goes_on_with_pefts_function(name, made, tmp_path):
    base, adapter = made(*PLAIN[name])
    truth, bare, sequences = by_peft(base, adapter), logits(plain(base)), random_sequences(rows=3)
    policy = load_policy(adapter, lora=LORA)
    reference = load_policy(adapter, trainable=False, shared=policy)
    without = load_policy(base, trainable=False, shared=policy)
    expected = logits(truth)
    for model, theirs in ((policy, expected), (reference, expected), (without, bare)):
        close(logits(model), theirs)
    own = Objectives(policy.train()).logprobs(sequences).logprobs
    with torch.no_grad():
        close(own, Objectives(truth.base_model.model, fused=False).logprobs(sequences).logprobs)
        decoders = [engine.decoder(policy.eval(), 3), engine.CacheDecoder(truth.base_model.model)]
        prompts = sequences.prompt_ids, sequences.prompt_mask, 1
        close(*(decoder.prefill(*prompts) for decoder in decoders))
        for token in (3, 8):
            close(*(decoder.step(torch.full((3,), token)) for decoder in decoders))
    own.sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.add_(0.05)
    moved = logits(policy)
    assert (moved - expected).abs().max() > 0.01
    close(logits(reference), expected)
    close(logits(without), bare)
    save_model(policy, tmp_path / "out")
    close(logits(by_peft(base, tmp_path / "out")), moved)
    close(logits(load_policy(tmp_path / "out", lora=LORA)), moved)


@pytest.mark.parametrize("name", MERGED)
def test_training_on_is_refused_where_the_base_would_change(name, made):
    base, adapter = made(*MERGED[name])
    with pytest.raises(ValueError, match="^lora_rank: expected plain LoRA to train on .* got .*; leave"):
        load_policy(adapter, lora=LORA)
    policy = load_policy(base, lora=LORA)  # a reference with such an adapter gets a base of its own
    close(logits(load_policy(adapter, trainable=False, shared=policy)), logits(by_peft(base, adapter)))
    close(logits(policy), logits(plain(base)))


@pytest.mark.parametrize("name", ["head", "saved_head", "tokens", "experts", "ia3"])
@torch.no_grad()
def test_a_scorer_on_a_language_models_adapter(name, made):
    base, adapter = made(*(PLAIN | MERGED)[name])
    states = by_peft(base, adapter).base_model.model.base_model(input_ids=IDS)[0]
    close(load_scorer(adapter, trainable=False).base_model.eval()(input_ids=IDS)[0], states)


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_do_not_change_weights(name, made, tmp_path):
    config, message = REFUSED[name]
    _, adapter = made("untied", config)
    adapter.rename(tmp_path / name)
    for options in ({}, {"lora": LORA}):
        with pytest.raises(ValueError, match=f"^model: .*{message}"):
            load_policy(tmp_path / name, **options)


def test_a_merge_that_computes_something_else(made, monkeypatch):
    _, adapter = made(*PLAIN["patterns"])
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *_: torch.tensor(0.01))
    with pytest.raises(ValueError, match="^model: expected an adapter that .* merge, got other logits .*adapter$"):
        load_policy(adapter)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda *_: (_ for _ in ()).throw(RuntimeError("no way")))
    with pytest.raises(ValueError, match="^model: expected an adapter that peft can merge, got .*adapter: no way$"):
        load_policy(adapter)


def test_files_that_do_not_fit(made, tmp_path):
    _, adapter = made(*PLAIN["patterns"])
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def changed(**changes):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(adapter, tmp_path / "changed")
        (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps(settings | changes))
        return tmp_path / "changed"

    nested = changed(base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="expected a model as the base .*changed, got another adapter"):
        load_policy(nested)
    for changes in ({"target_modules": ["nothing"]}, {"peft_type": "NOTHING"}):
        with pytest.raises(
            ValueError, match="^model: expected an adapter that fits .*changed, got .*(nothing|NOTHING)"
        ):
            load_policy(changed(**changes))
    (changed() / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights in .*changed, found no adapter_model.safetensors"):
        load_policy(tmp_path / "changed")
    shutil.copytree(adapter, tmp_path / "several" / "one")
    with pytest.raises(ValueError, match="expected a model or one adapter in .*several, got several: .*one"):
        load_policy(tmp_path / "several")


def test_an_embedding_of_another_size(made, tmp_path):
    base, adapter = made(*PLAIN["saved_both"])
    model = plain(base)
    model.resize_token_embeddings(40)
    peft.get_peft_model(model, PLAIN["saved_both"][1]).save_pretrained(tmp_path / "larger")
    settings = json.loads((tmp_path / "larger" / "adapter_config.json").read_text())
    (tmp_path / "larger" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(base)})
    )
    with pytest.raises(ValueError, match=r"expected the shapes of .*, \(37, 32\) .*, got \(40, 32\)"):
        load_policy(tmp_path / "larger")


FOREVER = "(.*.*.*.*.*.*.*.*.*.*.*.*)*!"


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("target_modules", FOREVER, rf"that are tried on every module within 0\.2 s, got '{re.escape(FOREVER)}'"),
        ("rank_pattern", {FOREVER: 2}, rf"that are tried on every module within 0\.2 s, got '{re.escape(FOREVER)}'"),
        ("exclude_modules", "q_(proj", r"got 'q_\(proj' \(missing \), unterminated subpattern at position 2\)"),
    ],
)
def test_regular_expressions_that_never_end_or_are_none(field, value, got, made, monkeypatch):
    monkeypatch.setattr(adapters, "_PATIENCE", 0.2)
    _, adapter = made(*PLAIN["rslora"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    expected = f"model: expected {field} in {adapter}/adapter_config.json to hold regular expressions"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)},? {got}$"):
        load_policy(adapter)
