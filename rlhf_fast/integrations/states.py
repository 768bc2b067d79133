"""The last hidden states of the real tokens of a padded batch: by our packed passes, or as the model computes them.

A packed pass leaves padding out of every layer, and runs a layer's norms, gated MLP and rotary embedding as one kernel
each (`rlhf_fast.lm.packing`). Where a batch or a model does not fit, the model's own backbone runs, as without us.

Left out: passes on GPUs, which have no such kernels; batches that are packed already (`position_ids`); embeddings with
a hook, such as the noise of `neftune_noise_alpha`, because a hook would see another shape.

Shapes: B rows, L slots, M states, n real tokens, H hidden.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.fast_paths import not_taken
from rlhf_fast.lm.packing import can_pack, real_hidden
from rlhf_fast.lm.switches import difference, trial_rows
from rlhf_fast.ops.dispatch import has_kernel
from rlhf_fast.ops.private import has_forward_hooks

_KNOWN = {"input_ids", "attention_mask", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}
_shiftable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class States(NamedTuple):
    """States [M, H]; real [B, L] bool; where [n] int64: the places in `states` of the real tokens, row by row.

    outputs: what the backbone returned; None after a packed pass.
    """

    states: Tensor
    real: Tensor
    where: Tensor
    outputs: Any

    def of(self, per_slot: Tensor, fill: int) -> Tensor:
        """[M] for the states, of [B, L] for the slots; `fill` at states of no real token."""
        rest = torch.full((len(self.states),), fill, dtype=per_slot.dtype, device=per_slot.device)
        return rest.index_copy(0, self.where, per_slot[self.real])

    def to_slots(self, per_state: Tensor) -> Tensor:
        """[B, L] for the slots, of [M] for the states; 0 at slots of no real token."""
        return per_state.new_zeros(self.real.shape).masked_scatter(self.real, per_state[self.where])


def states_of(
    model: PreTrainedModel, args: tuple[Any, ...], inputs: dict[str, Any], read: Tensor, pack: bool
) -> States:
    """The states of a batch, of which those at `read` [B, L] bool will be read.

    args, inputs: what the model's backbone is called with. pack: take a packed pass where it fits.
    """
    backbone: Any = model.base_model
    if pack and not args and packs(model, inputs, read):
        mask_BL = inputs["attention_mask"].bool()
        states_MH, starts_B = real_hidden(backbone, inputs["input_ids"], mask_BL)
        nth_BL = mask_BL.long().cumsum(1) - 1
        return States(states_MH, mask_BL, (starts_B[:, None] + nth_BL)[mask_BL], None)
    outputs = backbone(*args, **inputs)
    hidden_BLH = outputs.last_hidden_state
    real = torch.ones(hidden_BLH.shape[:2], dtype=torch.bool, device=hidden_BLH.device)
    where = torch.arange(real.numel(), device=real.device)
    return States(hidden_BLH.flatten(0, 1), real, where, outputs)


def packs(model: PreTrainedModel, inputs: dict[str, Any], read: Tensor) -> bool:
    """Whether a packed pass takes this batch, and gives the numbers of the model's own pass at the slots to be read."""
    given = {name for name, value in inputs.items() if value is not None and value is not False}
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or given - _KNOWN or {"output_attentions", "output_hidden_states"} & given:
        return False
    if not has_kernel("packed_attention", ids) or mask.shape != ids.shape:
        return False
    real = mask.bool()
    begins = torch.cat([real[:, :1], real[:, 1:] & ~real[:, :-1]], dim=1).sum(1)
    if not bool((begins == 1).all()) or bool((read & ~real).any()):  # a gap in a row moves its positions
        return False
    if has_forward_hooks(model.get_input_embeddings()):  # NEFTune's noise depends on the shape of a batch
        not_taken("packed passes are", model, "its embeddings have a hook", "rows run padded")
        return False
    backbone: Any = model.base_model
    return can_pack(backbone) and (bool(real[:, 0].all()) or _can_shift(model))


def _can_shift(model: PreTrainedModel) -> bool:
    """Whether the model computes the same for a row whose padding on the left moves the row's positions.

    Trainers of other libraries pass no positions, so that a row behind padding counts its positions from there. Rotary
    models see the distances alone. Models with learned positions do not.
    """
    if model not in _shiftable:
        backbone: Any = model.base_model
        rows = trial_rows(backbone, (7, 11))
        ids, mask = (torch.zeros(2, 11, dtype=torch.long, device=rows[0].device) for _ in range(2))
        for n, row in enumerate(rows):
            ids[n, -row.shape[1] :], mask[n, -row.shape[1] :] = row[0], 1
        real = mask.bool()
        training = backbone.training
        backbone.eval()
        where = difference(
            backbone,
            lambda: backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[real],
            lambda: real_hidden(backbone, ids, real)[0],
            replaces=False,
        )
        backbone.train(training)
        _shiftable[model] = where is None
        if where is not None:
            not_taken("packed passes are", model, "padding on the left moves its rows", "such rows run padded")
    return _shiftable[model]
