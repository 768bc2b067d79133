"""Every name that the package uses of torch, transformers and peft and they do not promise: an upgrade fails here.

The package itself goes on without most of them, only slower (`ops.private`, `lm.private`); that it computes the same
numbers then is tested here too.
"""

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import Module
from transformers import DynamicCache

import rlhf_fast
from rlhf_fast.lm import adapters, layers, packing
from rlhf_fast.ops import private
from rlhf_fast.rollout import engine
from tests.support.models import random_policy

IMPORTED = {
    "torch._C:_dispatch_keys": "dispatch.call: whether a tensor is an ordinary one of the CPU",
    "torch._C:DispatchKeySet.raw_repr": "dispatch.call: two sets of keys compared in one step",
    "torch._C:_len_torch_dispatch_stack": "dispatch.call: whether a mode is to see the operator",
    "torch._C:_len_torch_function_stack": "dispatch.call: whether a mode is to see the function",
    "torch._C:_are_functorch_transforms_active": "dispatch.call: vmap, grad and their like",
    "torch._C._autograd:_profiler_enabled": "dispatch.call: the profiler lists operators",
    "torch._C:_get_tracing_state": "dispatch.call: torch.jit.trace records operators",
    "torch._C:_AutoDispatchBelowAutograd": "gradients: an operator's kernel called from its autograd function",
    "torch._C:_after_autograd_keyset": "gradients: the same",
    "torch._ops:OpOverload.redispatch": "gradients: the same",
    "torch.autograd.forward_ad:_current_level": "gradients: no search for tangents outside forward mode",
    "torch._functorch.utils:enable_single_level_autograd_function": "gradients: derivatives under torch.func",
    "torch.autograd.forward_ad:_set_fwd_grad_enabled": "gradients: no transform in a transform gets a silent zero",
    "torch.autograd:Function._backward_cls": "gradients: the name that grad_fn shows",
    "torch._subclasses.fake_tensor:FakeTensor": "checks: tensors whose numbers cannot be read",
    "torch._subclasses.fake_tensor:FakeTensorMode": "plan: a pass without its memory",
    "torch.utils._python_dispatch:TorchDispatchMode": "tensor_bytes: sees every operator",
    "torch:UntypedStorage._cdata": "tensor_bytes: which tensors share a storage",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "sharding: a root that has not run",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init": "sharding: the same",
    "transformers.pytorch_utils:Conv1D": "blocks, adapters: GPT-2's linear layer",
    "transformers:DynamicCache.reorder_cache": "decoders: samples of one prompt; rows that have ended leave",
    "transformers:PreTrainedModel.base_model_prefix": "models: the trunk under a head",
    "transformers:PreTrainedModel.gradient_checkpointing_enable": "run: activations computed again",
    "transformers:PreTrainedModel._from_config": "families, plan: a model of a class that no Auto class maps to",
    "transformers.modeling_layers:GenericForSequenceClassification": "families: a score head on any trunk",
    "transformers.conversion_mapping:get_checkpoint_conversion_mapping": "families: names of weights in files",
    "transformers.conversion_mapping:register_checkpoint_conversion_mapping": "families: the same",
    "peft.tuners.tuners_utils:BaseTunerLayer.merge": "adapters: added into the weights",
    "peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer": "adapters: taken off again",
    "peft.utils:ModulesToSaveWrapper": "adapters: the score head beside an adapter",
    "peft.utils.other:AuxiliaryTrainingWrapper.unload_and_optionally_merge_module": "merging: whole modules, tokens",
    "peft.tuners.lora.layer:ParamWrapper.unload_and_optionally_merge_module": "merging: experts",
    "transformers:PreTrainedModel.get_expanded_tied_weights_keys": "merging: a head with a weight of its own",
    "peft:inject_adapter_in_model": "adapters: on a model that stays a plain one",
    "peft:load_peft_weights": "adapters: read",
    "peft:set_peft_model_state_dict": "adapters: read",
    "peft:get_peft_model_state_dict": "adapters: which weights one has",
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORTED)
def test_imported(name):
    assert resolve_name(name) is not None, IMPORTED[name]


LLAMA = {
    "config._attn_implementation": "packing: which attention runs, changed for one pass",
    "model.rotary_emb": "blocks: tables of the rotary embedding",
    "model.embed_tokens": "blocks: the first layer",
    "model.norm.variance_epsilon": "layers, blocks: of an RMS norm",
    "model.layers.0.input_layernorm": "layers, blocks: parts of a layer, by name",
    "model.layers.0.post_attention_layernorm": "layers, blocks: parts of a layer, by name",
    "model.layers.0.self_attn.q_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.self_attn.k_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.self_attn.v_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.self_attn.o_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.self_attn.head_dim": "layers: of the heads",
    "model.layers.0.self_attn.scaling": "layers, blocks: of attention's scores",
    "model.layers.0.self_attn.attention_dropout": "layers: refuses dropout",
    "model.layers.0.mlp.gate_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.mlp.up_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.mlp.down_proj": "layers, blocks: parts of a layer, by name",
    "model.layers.0.mlp.act_fn": "layers, blocks: parts of a layer, by name",
    "model.gradient_checkpointing": "packing: refuses layers that run again",
}
GPT2 = {
    "transformer.wte": "blocks: the first layer",
    "transformer.wpe": "blocks: positions",
    "transformer.ln_f": "blocks: the last norm",
    "transformer.h.0.ln_1": "blocks: parts of a layer, by name",
    "transformer.h.0.ln_2": "blocks: parts of a layer, by name",
    "transformer.h.0.attn.c_attn": "blocks: parts of a layer, by name",
    "transformer.h.0.attn.c_proj": "blocks: parts of a layer, by name",
    "transformer.h.0.attn.scaling": "blocks: of attention's scores",
    "transformer.h.0.mlp.c_fc": "blocks: parts of a layer, by name",
    "transformer.h.0.mlp.c_proj": "blocks: parts of a layer, by name",
    "transformer.h.0.mlp.act": "blocks: parts of a layer, by name",
    "transformer.h.0.attn.attn_dropout.p": "models: turns dropout off",
}
OPT = {
    "model.decoder.embed_tokens": "blocks: the first layer",
    "model.decoder.embed_positions.offset": "blocks: positions",
    "model.decoder.final_layer_norm": "blocks: the last norm",
    "model.decoder.project_in": "blocks: refuses the 350M model's layout",
    "model.decoder.layers.0.self_attn_layer_norm": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.final_layer_norm": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.self_attn.q_proj": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.self_attn.out_proj": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.self_attn.scaling": "blocks: of attention's scores",
    "model.decoder.layers.0.fc1": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.fc2": "blocks: parts of a layer, by name",
    "model.decoder.layers.0.activation_fn": "blocks: parts of a layer, by name",
}
PARTS = {"llama": LLAMA, "gpt2": GPT2, "opt": OPT}


def part(owner: object, name: str) -> object:
    """attrgetter, which also takes the numbers of layers in a list."""
    for step in name.split("."):
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner


@pytest.mark.parametrize(("architecture", "name"), [(kind, name) for kind, names in PARTS.items() for name in names])
def test_part_of_a_model(architecture, name):
    """None is a value here: of a projection that a model of this size lacks."""
    part(random_policy(architecture), name)


ON_A_LORA_LAYER = {
    "base_layer": "the layer under the adapter",
    "lora_A": "that it is a LoRA adapter",
    "active_adapters": "which adapters count",
    "disable_adapters": "refuses adapters switched off",
    "merged": "refuses adapters that are in the weight already",
    "lora_variant": "refuses DoRA and its like",
    "get_delta_weight": "what the adapter adds",
}


@pytest.mark.parametrize("name", ON_A_LORA_LAYER)
def test_part_of_an_adapter(name):
    model = random_policy("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), model)
    assert hasattr(model.model.layers[0].mlp.up_proj, name), f"blocks: {ON_A_LORA_LAYER[name]}"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_seen(name):
    """layers, blocks: modules that somebody watches are called as they are."""
    module = Module()
    assert not getattr(module, name)
    register = {
        "_forward_hooks": module.register_forward_hook,
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_backward_hooks": module.register_full_backward_hook,
        "_backward_pre_hooks": module.register_full_backward_pre_hook,
    }
    register[name](lambda *_: None)
    assert getattr(module, name) and private.has_hooks(module)
    assert private.has_forward_hooks(module) == ("forward" in name)


def test_keys_and_values_of_a_cache():
    model, cache = random_policy("llama"), DynamicCache()
    model(input_ids=torch.arange(6).view(2, 3), past_key_values=cache, use_cache=True)
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 3, 12)] * 2
    assert [layer.values.shape for layer in cache.layers] == [(2, 2, 3, 12)] * 2


def test_marks_of_an_adapter(tmp_path):
    """adapters: `save_pretrained` of a model so marked saves the adapter alone."""
    model = random_policy("llama")
    adapters.put_on(model, "nowhere", adapters.LoRA(rank=2, alpha=4, seed=0), trainable=True)
    assert model._hf_peft_config_loaded and model.peft_config["default"].r == 2
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()


def test_torch_lacks_nothing():
    assert private.MISSING == [] and private.BYPASS and private.REDISPATCH


@pytest.mark.parametrize("architecture", PARTS)
def test_the_fast_paths_are_taken(architecture):
    """What only speed would show: a mask check or a renamed layer upstream turns one of them off without an error."""
    model = random_policy(architecture)
    assert packing.can_pack(model.base_model)
    assert layers.has_known_layers(model.base_model) == (architecture == "llama")
    with torch.no_grad():
        assert isinstance(engine.decoder(model, 4), engine.StaticDecoder)


def test_private_names_of_torch_stand_in_one_file():
    package = Path(rlhf_fast.__file__).parent
    private_name = re.compile(r"torch(\.\w+)*\._(?!_)|_subclasses|_python_dispatch")
    users = [path.relative_to(package) for path in package.rglob("*.py") if private_name.search(path.read_text())]
    assert users == [Path("ops/private.py")]


# Without the names

NUMBERS = """
import sys, operator
missing, real = sys.argv[1:], operator.attrgetter

def attrgetter(name):
    looks = sys._getframe(1).f_globals["__name__"] == "rlhf_fast.ops.private"
    if looks and ("all" in missing or name in missing):
        raise AttributeError(name)
    return real(name)

operator.attrgetter = attrgetter
import torch
import rlhf_fast
from rlhf_fast.ops import private
operator.attrgetter = real
"""
CALLS = """
def results():
    torch.manual_seed(0)
    x = torch.randn(4, 7, requires_grad=True)
    weight = torch.randn(11, 3, requires_grad=True)
    old, mask, ids = x.detach().sin(), x > -1, (x > 0).long()
    hidden = torch.stack([x, x.sin(), x.cos()], -1)
    logits = hidden @ weight.t()
    head = hidden, weight, ids
    outputs = [
        *rlhf_fast.token_logprobs(logits, ids),
        *rlhf_fast.token_kl(logits, logits.detach().cos(), ids)[:3],
        rlhf_fast.ppo_loss(x, old, old, mask).loss,
        rlhf_fast.kl_penalty(x, old, "k3"),
        rlhf_fast.dpo_loss(x[0], x[1], old[0], old[1]).losses,
        (x * rlhf_fast.gae(x, old, mask).advantages),
        rlhf_fast.linear_token_logprobs(*head).logprobs,
        rlhf_fast.linear_ppo_loss(*head, old, old, mask).loss,
    ]
    for output in outputs:
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        output.backward(weights, retain_graph=True)
    return [*outputs, x.grad, weight.grad]

print(len(private.MISSING), private.BYPASS, private.REDISPATCH)
print(*(value.hex() for result in results() for value in result.flatten().tolist()))
"""


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["_C._dispatch_keys", "autograd.forward_ad._current_level"], "2 False True"),
        (["_ops.OpOverload.redispatch", "_subclasses.fake_tensor.FakeTensor"], "2 True False"),
        (["all"], None),
    ],
)
def test_without_a_name_the_numbers_are_the_same(missing, expected):
    run = [sys.executable, "-c", NUMBERS + CALLS, *missing]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, numbers = done.stdout.splitlines()
    of_operations = [name for name in IMPORTED if re.match(r"torch(?!\.distributed)", name)]
    assert found == (expected or f"{len(of_operations)} False False")
    scope = {"torch": torch, "rlhf_fast": rlhf_fast, "private": private, "print": lambda *_: None}
    exec(CALLS, scope)
    here = [value.hex() for result in scope["results"]() for value in result.flatten().tolist()]
    assert numbers.split() == here


@pytest.mark.parametrize(
    ("name", "needed_by"),
    [
        ("_subclasses.fake_tensor.FakeTensorMode", "the plan of memory"),
        ("utils._python_dispatch.TorchDispatchMode", "the counter of tensors' bytes"),
    ],
)
def test_what_cannot_be_replaced_says_so_on_use(monkeypatch, name, needed_by):
    monkeypatch.setattr(private, "attrgetter", lambda _: attrgetter("no such name"))
    monkeypatch.setattr(private, "MISSING", [])
    stub = private._needed(name, needed_by)
    with pytest.raises(RuntimeError, match=f"has no torch.{name}, which {needed_by} needs"):
        stub()
