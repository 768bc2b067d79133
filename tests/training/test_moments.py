"""The state of an optimizer is one of these weights, or an error that names the weight; no kernel reads another one."""

import copy

import pytest
import torch
from torch import nn

from rlhf_fast.config import SFTConfig
from rlhf_fast.lm import manifest
from rlhf_fast.stages import sft
from rlhf_fast.training import checkpoint
from rlhf_fast.training.moments import check_state
from rlhf_fast.training.optimizers import make_optimizer
from tests.support.stages import interrupted, stage_config

KINDS = {"adamw": torch.float32, "adamw_8bit": torch.float32, "masters": torch.bfloat16}


def trained(kind, width=64):
    """(optimizer after a step, its weights by name)"""
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    weights = {"wide": torch.randn(width, 128), "bias": torch.randn(width)}
    named = {name: nn.Parameter(x.to(KINDS[kind])) for name, x in weights.items()}
    optimizer = "adamw_8bit" if kind == "adamw_8bit" else "adamw"
    config = SFTConfig(model="m", output_dir="out", train_data="rows", optimizer=optimizer)
    made = make_optimizer(config, list(named.values()), 1e-2)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made, {parameter: name for name, parameter in named.items()}


def moments(state):
    """The dict that holds the moments of the first weight, and their names."""
    entry = state.get("inner", state)["state"][0]
    entry = entry.get("__bnb_optimizer_quant_state__", entry)
    return entry, [name for name in ("exp_avg", "exp_avg_sq", "state1", "state2") if name in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_state_is_taken(kind):
    optimizer, names = trained(kind)
    state = copy.deepcopy(optimizer.state_dict())
    check_state(optimizer, state, names)
    optimizer.load_state_dict(state)
    for a, b in zip(moments(optimizer.state_dict())[0].values(), moments(state)[0].values(), strict=True):
        assert a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 128])
def test_other_widths(kind, width):
    optimizer, names = trained(kind)
    other = trained(kind, width)[0].state_dict()
    with pytest.raises(ValueError, match=rf"state.pt: \w+: expected .* of shape \[64.* got shape \[{width}"):
        check_state(optimizer, other, names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["transposed", "half", "integers", "sparse", "missing", "a list", "no entries"])
def test_moments_of_another_kind(kind, change):
    optimizer, names = trained(kind)
    for which in range(2):
        state = copy.deepcopy(optimizer.state_dict())
        entry, keys = moments(state)
        key = keys[which]
        change_of = {
            "transposed": lambda x: x.t(),
            "half": lambda x: x.half(),
            "integers": lambda x: x.int(),
            "sparse": lambda x: x.to_sparse(),
            "missing": lambda x: None,
            "a list": lambda x: x.tolist(),
            "no entries": lambda x: x[:0],
        }
        entry[key] = change_of[change](entry[key])
        with pytest.raises(ValueError, match=rf"state.pt: wide: expected {key} of shape \[64, 128\] and dtype torch"):
            check_state(optimizer, state, names)


def test_scales_of_8_bits():
    optimizer, names = trained("adamw_8bit")
    for key, shape in (("absmax1", [32]), ("absmax2", [32]), ("qmap1", [256]), ("qmap2", [256])):
        state = copy.deepcopy(optimizer.state_dict())
        entry, _ = moments(state)
        entry[key] = entry[key][:-1]
        with pytest.raises(ValueError, match=rf"state.pt: wide: expected {key} of shape \[{shape[0]}\]"):
            check_state(optimizer, state, names)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_in_another_order_becomes_the_weights(kind):
    """A moment of one number, expanded: a kernel would read past its end."""
    optimizer, names = trained(kind)
    state = optimizer.state_dict()
    entry, keys = moments(state)
    entry[keys[0]] = entry[keys[0]][:1, :1].expand(64, 128)
    check_state(optimizer, state, names)
    assert entry[keys[0]].is_contiguous() and (entry[keys[0]] == entry[keys[0]][0, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_other_counts_and_forms(kind):
    optimizer, names = trained(kind)

    def refused(message, change):
        state = copy.deepcopy(optimizer.state_dict())
        change(state, state.get("inner", state))
        with pytest.raises(ValueError, match=f"state.pt: .*{message}"):
            check_state(optimizer, state, names)

    refused("expected (state and param_groups|masters and inner), got", lambda whole, inner: whole.popitem())
    refused(r"groups of \[1, 1\] weights, got \[1\]", lambda whole, inner: inner["param_groups"].pop())
    refused("weights 0 to 1, got a state of weight 7", lambda whole, i: i["state"].update({7: i["state"][0]}))
    refused("lr of the weights to be a float, got str", lambda whole, i: i["param_groups"][0].update(lr="1"))
    refused("number of steps of wide, got NoneType", lambda whole, i: i["state"][0].update(step=None))
    if kind == "masters":
        refused("the fp32 copies of 2 weights, got 1", lambda whole, i: whole["masters"].pop())
        refused(r"wide: expected the fp32 copy of shape \[64, 128\]", lambda whole, i: whole["masters"].reverse())


def test_a_resumed_run_names_the_weight(files, tiny_model, tmp_path):
    """Also where the checkpoint's checksums say that it is whole."""
    config = stage_config(SFTConfig, files, tiny_model, tmp_path / "whole", save_steps=2)
    sft.train(config)
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    path = checkpoint.latest(cut)
    state = checkpoint.load_state(path)
    state["policy"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, path / "state.pt")
    manifest.write(path, manifest.of_files(path))
    resumed = stage_config(SFTConfig, files, tiny_model, cut, save_steps=2, resume=True)
    with pytest.raises(ValueError, match=r"state.pt: \S+weight: expected exp_avg of shape .*, got shape \[3\]"):
        sft.train(resumed)
    del state["policy"]
    torch.save(state, path / "state.pt")
    manifest.write(path, manifest.of_files(path))
    with pytest.raises(ValueError, match="state.pt: expected the state of policy, found none"):
        sft.train(resumed)
