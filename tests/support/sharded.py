"""Runs in several processes: the losses of models sharded by FSDP2 against one process's, on gloo.

    python tests/support/sharded.py RANK SIZE FILE      FILE: where the processes meet

Prints one line for each loss, `NAME: worst gradient difference`, from rank 0.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoModelForSequenceClassification

from rlhf_fast.lm.forward import enter_by, within
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import response_hidden
from rlhf_fast.lm.scores import Scores
from rlhf_fast.training.memory import static_bytes
from tests.support.models import random_policy, random_sequences

ROWS = 8
SEQUENCES = random_sequences(rows=ROWS)
ADVANTAGES = torch.linspace(-1, 1, ROWS)
OLD = torch.linspace(-3, 0, ROWS * 6).view(ROWS, 6)
TRAINED = SEQUENCES.response_ids.masked_fill(~SEQUENCES.response_mask, -100)
TOKENS = SEQUENCES.response_mask.sum()


def policy():
    return random_policy("llama").float().train()


def scorer():
    torch.manual_seed(0)
    config = random_policy("llama").config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).train()


def shard(model, mesh):
    """A unit for each layer and the root; gradients are summed over the ranks."""
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (*model.base_model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    enter_by(model, register_fsdp_forward_method)
    return model


def joint(model, rows):
    """PPO's policy loss and another on the same hidden states, in one pass."""
    objectives = Objectives(model)

    def losses():
        part = SEQUENCES.rows(rows)
        hidden = response_hidden(model, part)
        out = objectives.ppo(part, OLD[rows], ADVANTAGES[rows], hidden=hidden, normalizer=TOKENS)
        return out.loss + hidden.square()[part.response_mask].sum() / 1e3

    return within(model, losses)


LOSSES = {
    "sft": (policy, lambda m, r: Objectives(m).sft(SEQUENCES.rows(r), TRAINED[r], 40.0).loss),
    "reinforce": (
        policy,
        lambda m, r: Objectives(m).reinforce(SEQUENCES.rows(r), ADVANTAGES[r], normalizer=TOKENS).loss,
    ),
    "ppo": (
        policy,
        lambda m, r: Objectives(m).ppo(SEQUENCES.rows(r), OLD[r], ADVANTAGES[r], normalizer=TOKENS).loss,
    ),
    "ppo from logits": (
        policy,
        lambda m, r: Objectives(m, fused=False).ppo(SEQUENCES.rows(r), OLD[r], ADVANTAGES[r], normalizer=TOKENS).loss,
    ),
    "log-probs": (
        policy,
        lambda m, r: (Objectives(m).logprobs(SEQUENCES.rows(r)).logprobs * ADVANTAGES[r, None]).sum() / 10,
    ),
    "joint": (policy, joint),
    "scores": (scorer, lambda m, r: (Scores(m).of(SEQUENCES.rows(r)) * ADVANTAGES[r]).sum()),
    "values": (
        scorer,
        lambda m, r: Scores(m).values(SEQUENCES.rows(r)).square()[SEQUENCES.response_mask[r]].sum(),
    ),
}


def main(rank: int, size: int, meeting_place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=size)
    mesh, share = init_device_mesh("cpu", (size,)), ROWS // size
    mine = slice(rank * share, (rank + 1) * share)
    for name, (make, loss) in LOSSES.items():
        one = make()
        loss(one, slice(0, ROWS)).backward()
        truth = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        many = shard(make(), mesh)
        for _ in range(2):  # the second pass meets what the first left
            many.zero_grad()
            loss(many, mine).backward()
        got = {name: p.grad.full_tensor() for name, p in many.named_parameters() if p.grad is not None}
        assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
        largest = max(g.abs().max() for g in truth.values())
        worst = max((got[n] - g).abs().max() for n, g in truth.items()) / largest
        if rank == 0:
            print(f"{name}: {worst:.1e}", flush=True)
        held = static_bytes({"": many})[""]
        whole = sum(p.nbytes for p in one.parameters())
        assert whole / size * 0.9 < held["weights"] < whole * 0.8 and held["gradients"] > 0, held
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
