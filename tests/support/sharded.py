"""Runs in several processes: the losses of models in shards against one process's, on gloo.

    python -m tests.support.sharded      in processes that a launcher has started

Prints one line for each loss, `NAME: worst gradient difference`, from the first process.
"""

from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast import ops
from rlhf_fast.lm import packing
from rlhf_fast.lm.forward import within
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import idle, response_hidden
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sharding import full, gathered, is_part, pieces_of, shard, whole
from rlhf_fast.ranks import current
from rlhf_fast.training.learner import checkpoint_activations
from rlhf_fast.training.memory import static_bytes
from tests.support.models import model_config, random_policy, random_sequences

ROWS = 8
SEQUENCES = random_sequences(rows=ROWS)
PAIRS = random_sequences(rows=2 * ROWS, seed=1)
ADVANTAGES = torch.linspace(-1, 1, ROWS)
OLD = torch.linspace(-3, 0, ROWS * 6).view(ROWS, 6)
TRAINED = SEQUENCES.response_ids.masked_fill(~SEQUENCES.response_mask, -100)
TOKENS = SEQUENCES.response_mask.sum()


def objectives(model, fused=True):
    """Those of the model, made once, because making them is a pass of all processes."""
    name = f"objectives_{fused}"
    if not hasattr(model, name):
        setattr(model, name, Objectives(model, fused=fused))
    return getattr(model, name)


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


def longrope():
    """Its rows of more than seven tokens run apart from the others."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope |= {"original_max_position_embeddings": 7, "factor": 8.0}
    sizes = model_config("llama", 37) | {"rope_parameters": rope, "original_max_position_embeddings": 7}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | {"model_type": "phi3"})).train()


def alone():
    """A model whose rows run one by one."""
    model = policy()
    packing._packable[model.base_model] = packing._paddable[model.base_model] = False
    return model


def joint(model, rows):
    """PPO's policy loss and another on the same hidden states, in one pass."""
    made = objectives(model)

    def losses():
        part = SEQUENCES.rows(rows)
        hidden = response_hidden(model, part)
        out = made.ppo(part, OLD[rows], ADVANTAGES[rows], hidden=hidden, normalizer=TOKENS)
        return out.loss + hidden.square()[part.response_mask].sum() / 1e3

    return within(model, losses)


def sft(model, rows, fused=True):
    return objectives(model, fused).sft(SEQUENCES.rows(rows), TRAINED[rows], 40.0).loss


def reinforce(model, rows, fused=True):
    part = SEQUENCES.rows(rows)
    return objectives(model, fused).reinforce(part, ADVANTAGES[rows], normalizer=TOKENS).loss


def ppo(model, rows, fused=True):
    part = SEQUENCES.rows(rows)
    return objectives(model, fused).ppo(part, OLD[rows], ADVANTAGES[rows], normalizer=TOKENS).loss


def dpo(model, rows, fused=True):
    index = torch.arange(2 * ROWS).view(2, -1)[:, rows].flatten()
    refs = OLD.sum(dim=1)[rows], 2 * OLD.sum(dim=1)[rows]
    return objectives(model, fused).dpo(PAIRS.rows(index), refs, ROWS, beta=0.1).loss


def kto(model, rows, fused=True):
    part, refs, labels, kl = SEQUENCES.rows(rows), OLD.sum(dim=1)[rows], ADVANTAGES[rows] > 0, torch.tensor(0.5)
    return objectives(model, fused).kto(part, refs, labels, kl, ROWS, beta=0.1, loss_type="kto").loss


FUSED = (sft, reinforce, ppo, dpo, kto)  # in shards through the fused head, in one process through the logits
LOSSES = {
    **{loss.__name__: (policy, loss) for loss in FUSED},
    "sft, LongRoPE": (longrope, sft),
    "sft from logits, LongRoPE": (longrope, partial(sft, fused=False)),
    "sft, rows alone": (alone, sft),
    "sft, tied": (tied, sft),
    "sft, checkpointed": (checkpointed, sft),
    "sft, GPT-2": (lambda: random_policy("gpt2"), sft),
    "ppo from logits": (policy, partial(ppo, fused=False)),
    "log-probs": (
        policy,
        lambda m, r: (objectives(m).logprobs(SEQUENCES.rows(r)).logprobs * ADVANTAGES[r, None]).sum() / 10,
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
    mine = [slice(0, 2), slice(2, 3)] if ranks.first else [slice(3, ROWS)]
    for name, (make, loss) in LOSSES.items():
        one = make()
        (partial(loss, fused=False) if loss in FUSED else loss)(one, slice(0, ROWS)).backward()
        truth = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        many = make()
        shard(many, "full")
        for _ in range(2):  # the second pass meets what the first left
            many.zero_grad()
            loss(many, mine[0]).backward()
            (loss(many, mine[1]) if ranks.first else idle(many)).backward()  # idle passes add nothing
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
        assert state.keys() == truth.keys()
        assert [name for name in truth if not torch.equal(state[name], truth[name])] == []
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
            made = Objectives(many)
            for _ in range(1 + 2 * current().rank):
                with whole(many):
                    assert (made.logprobs(SEQUENCES).logprobs - truth).abs().max() < 1e-5
            assert not any(map(is_part, many.parameters()))
        assert all(map(is_part, many.parameters()))
        if trained:
            assert (made.logprobs(SEQUENCES).logprobs - truth).abs().max() < 1e-5
            assert all(map(is_part, many.parameters()))


def check_refusal():
    """A weight in shards from outside is refused by name, by every operation on hidden states."""
    many = policy()
    shard(many, "full")
    hidden, ids, per_row = torch.ones(2, 3, 48), torch.ones(2, 3, dtype=torch.long), torch.ones(2)
    weight, mask, plain = many.lm_head.weight, torch.ones(2, 3, dtype=torch.bool), torch.ones(37, 48)
    arguments = {
        "linear_token_logprobs": (hidden, weight, ids),
        "linear_sft_loss": (hidden, weight, ids),
        "linear_reinforce_loss": (hidden, weight, ids, per_row, mask),
        "linear_ppo_loss": (hidden, weight, ids, hidden[..., 0], per_row, mask),
        "linear_dpo_loss": (hidden, weight, ids, per_row[:1], per_row[:1]),
        "linear_kto_loss": (hidden, weight, ids, per_row, per_row > 0, None),
        "linear_loss": (hidden, weight, ids, lambda logprobs, entropy: -logprobs),
        "linear_token_kl": (hidden, weight, hidden, plain, ids),
    }
    assert arguments.keys() == {name for name in ops.__all__ if name.startswith("linear_")}
    expected = "expected a plain tensor, got a DTensor; call the loss inside the forward of its FSDP module"
    for name, given in [*arguments.items(), ("linear_token_kl", (hidden, plain, hidden, weight, ids))]:
        argument = "ref_weight" if given[1] is plain else "weight"
        try:
            getattr(ops, name)(*given)
        except ValueError as error:
            assert str(error) == f"{argument}: {expected}", (name, error)
        else:
            raise AssertionError(f"a DTensor went into {name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
