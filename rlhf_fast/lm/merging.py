"""Taking an adapter off its model: added into the weights, or left behind.

A model whose output head is its input embedding has one weight for both. An adapter on one of the two belongs to that
one alone, so the head gets a weight of its own before the adapter is added. A trial compares the merged model with the
model that has its adapter still on. Where peft cannot merge an adapter, or merges something else, the run refuses it.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.lm.private import Part, unmark_adapter, untie, without_adapter
from rlhf_fast.lm.switches import agree, trial_rows


def merge(model: PreTrainedModel, name: str, path: object, tokens: tuple[int, ...] = ()) -> None:
    """Adds the adapter `name` into the weights of `model` and leaves a plain model.

    No other model may share the weights. path: where the adapter came from. tokens: ids whose embeddings the adapter
    changes.
    Raises ValueError where peft cannot merge the adapter, and where the merged model computes something else.
    """
    before = _trial(model, tokens)
    embedding, head = _embeddings(model)
    embedding, head = _bare(embedding, name), _bare(head, name)
    tied = None not in (embedding, head) and head is not embedding and head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    try:
        take_off(model, name, merge=True)
    except Exception as error:  # each kind of adapter has its own way to say that it cannot be merged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"model: expected an adapter that peft can merge, got {path}: {reason}") from error
    if tied:
        embedding, head = _embeddings(model)
        if torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        else:
            untie(model)
    after = _trial(model, tokens)
    if before is not None and (after is None or not agree(after, before)):
        raise ValueError(f"model: expected an adapter that peft can merge, got other logits with it merged: {path}")


def merged(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A plain model with the adapter `name` in its weights; `model` stays as it is.

    The adapted layers have weights of their own. All other weights are those of `model`.
    """
    adapted = [module for module in model.modules() if without_adapter(module, name, merge=False) is not None]
    own = {id(tensor) for module in adapted for tensor in (*module.parameters(), *module.buffers())}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own}
    twin = copy.deepcopy(model, shared)
    take_off(twin, name, merge=True)
    return twin


def take_off(model: PreTrainedModel, name: str, *, merge: bool) -> None:
    """Puts the plain layers back in place of the layers of adapter `name`. merge: with the adapter in their weights."""
    done = None
    for path, module in list(model.named_modules()):
        if done is not None and path.startswith(f"{done}."):
            continue  # a part of a layer that is plain again
        if (bare := without_adapter(module, name, merge=merge)) is not None:
            model.set_submodule(path, bare)
            done = path
    if done is None:
        raise ValueError("none of its layers holds it")
    unmark_adapter(model)


def _embeddings(model: PreTrainedModel) -> tuple[Part, Part]:
    """The input embedding, and the output head or None."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # the decoder half of Bart
        return None, None


def _bare(module: Part, name: str) -> Part:
    """The layer itself under its adapter, if any."""
    bare = None if module is None else without_adapter(module, name, merge=False)
    return module if bare is None else bare


@torch.no_grad()
def _trial(model: Part, tokens: tuple[int, ...]) -> Tensor | None:
    """The logits, or a classifier's last hidden states, of a row of eight tokens and of `tokens`; None of a model that
    cannot run here."""
    training = model.training
    model.eval()
    try:
        (ids,) = trial_rows(model, (8,))
        ids = torch.cat([ids, ids.new_tensor([tokens[:8]])], dim=1) if tokens else ids
        runs = model if _embeddings(model)[1] is not None else model.base_model
        out = runs(input_ids=ids, use_cache=False)
        return out.logits if runs is model else out[0]
    except Exception:  # whatever else the model wants; the first step says it
        return None
    finally:
        model.train(training)
