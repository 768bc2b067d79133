"""Runs in several processes: the losses of models in shards against one process's, on gloo.

    python -m tests.support.sharded      in processes that a launcher has started

Prints one line for each loss, `NAME: worst gradient difference`, from the first process.
"""

import torch
from transformers import AutoModelForSequenceClassification

from rlhf_fast.lm.forward import within
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import idle, response_hidden
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sharding import full, gathered, is_part, pieces_of, shard, whole
from rlhf_fast.ops import linear_sft_loss
from rlhf_fast.ranks import current
from rlhf_fast.training.learner import checkpoint_activations
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


def tied():
    model = policy()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def scorer():
    torch.manual_seed(0)
    config = random_policy("llama").config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).train()


def checkpointed():
    model = policy()
    checkpoint_activations(model)
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


def ppo(fused):
    return lambda m, r: Objectives(m, fused=fused).ppo(SEQUENCES.rows(r), OLD[r], ADVANTAGES[r], normalizer=TOKENS).loss


def sft(model, rows):
    return Objectives(model).sft(SEQUENCES.rows(rows), TRAINED[rows], 40.0).loss


LOSSES = {
    "sft": (policy, sft),
    "sft, tied": (tied, sft),
    "sft, checkpointed": (checkpointed, sft),
    "sft, GPT-2": (lambda: random_policy("gpt2"), sft),
    "reinforce": (
        policy,
        lambda m, r: Objectives(m).reinforce(SEQUENCES.rows(r), ADVANTAGES[r], normalizer=TOKENS).loss,
    ),
    "ppo": (policy, ppo(True)),
    "ppo from logits": (policy, ppo(False)),
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


def main() -> None:
    ranks = current()
    mine = ranks.part(ROWS)
    for name, (make, loss) in LOSSES.items():
        one = make()
        loss(one, slice(0, ROWS)).backward()
        truth = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        many = make()
        shard(many, "full")
        for _ in range(2):  # the second pass meets what the first left
            many.zero_grad()
            loss(many, mine).backward()
            idle(many).backward()  # adds nothing
        got = {name: full(p.grad) for name, p in many.named_parameters() if p.grad is not None}
        assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
        largest = max(g.abs().max() for g in truth.values())
        worst = max((got[n] - g).abs().max() for n, g in truth.items()) / largest
        if ranks.first:
            print(f"{name}: {worst:.1e}", flush=True)
        held = static_bytes({"": many})[""]
        total = sum(p.nbytes for p in one.parameters())
        assert total / ranks.size * 0.9 < held["weights"] < total * 0.8 and held["gradients"] > 0, held
        check_state(one, many)
    check_whole()
    check_refusal()


def check_state(one, many):
    """The state of all processes' parts is one process's, in the first process alone."""
    state, truth = gathered(pieces_of(many, 1 << 40)[0]), one.state_dict()
    if current().first:
        assert state.keys() == truth.keys() and all(map(torch.equal, state.values(), truth.values()))
        assert len({id(x) for x in state.values()}) == len({x.data_ptr() for x in truth.values()})
    else:
        assert state is None


@torch.no_grad()
def check_whole():
    """Inside `whole` a process makes as many passes as it likes; no pass leaves anything whole behind."""
    for trained in (True, False):
        one, many = policy(), policy().requires_grad_(trained)
        shard(many, "full")
        truth = Objectives(one).logprobs(SEQUENCES).logprobs
        with whole(many):
            objectives = Objectives(many)
            for _ in range(1 + 2 * current().rank):
                with whole(many):
                    assert (objectives.logprobs(SEQUENCES).logprobs - truth).abs().max() < 1e-5
            assert not any(map(is_part, many.parameters()))
        assert all(map(is_part, many.parameters()))
        if trained:
            assert (objectives.logprobs(SEQUENCES).logprobs - truth).abs().max() < 1e-5
            assert all(map(is_part, many.parameters()))


def check_refusal():
    """A weight in shards from outside is refused by name."""
    many = policy()
    shard(many, "full")
    try:
        linear_sft_loss(torch.ones(2, 3, 48), many.lm_head.weight, torch.ones(2, 3, dtype=torch.long))
    except ValueError as error:
        said = "weight: expected a plain tensor, got a DTensor; call the loss inside the forward of its FSDP module"
        assert str(error) == said, error
    else:
        raise AssertionError("a DTensor went into a fused loss")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
