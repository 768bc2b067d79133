"""Every pass enters its model by `within`: outside a pass the weights are NaN here, and no result shows it."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from rlhf_fast.lm.forward import call, enter_by, one_pass, within
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import response_hidden, response_logits, sequence_scores, token_values
from rlhf_fast.lm.scores import Scores
from rlhf_fast.rollout.sampler import LocalSampler
from tests.support.models import random_policy, random_sequences
from tests.support.text import word_tokenizer

SEQUENCES = random_sequences()
TRAINED = SEQUENCES.response_ids.masked_fill(~SEQUENCES.response_mask, -100)
ADVANTAGES = torch.linspace(-1, 1, 5)
OLD = torch.linspace(-3, 0, 30).view(5, 6)
REFS = torch.tensor([-9.0, -8.0]), torch.tensor([-7.0, -6.0])


def sealed(model: nn.Module) -> nn.Module:
    """`model` with weights that are NaN except while a pass runs; `model.entered` counts the passes."""
    whole = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    model.entered = 0

    def register(root: nn.Module, name: str) -> None:
        entry = getattr(root, name)

        def opened(*args):
            root.entered += 1
            for parameter, values in whole.items():
                parameter.data.copy_(values)
            try:
                return entry(*args)
            finally:
                for parameter in whole:
                    parameter.data.fill_(float("nan"))

        setattr(root, name, opened)

    enter_by(model, register)
    within(model, lambda: None)  # from now on the weights are NaN
    return model


def scorer() -> nn.Module:
    torch.manual_seed(0)
    config = random_policy("llama").config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def values_of(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [x for x in out if isinstance(x, torch.Tensor)]


PASSES = {
    "response_logits": lambda m: response_logits(m, SEQUENCES)[SEQUENCES.response_mask],
    "response_hidden": lambda m: response_hidden(m, SEQUENCES)[SEQUENCES.response_mask],
    "logprobs": lambda m: Objectives(m).logprobs(SEQUENCES),
    "sft": lambda m: Objectives(m).sft(SEQUENCES, TRAINED, 7.0),
    "reinforce": lambda m: Objectives(m).reinforce(SEQUENCES, ADVANTAGES),
    "ppo": lambda m: Objectives(m).ppo(SEQUENCES, OLD, ADVANTAGES),
    "dpo": lambda m: Objectives(m).dpo(SEQUENCES.rows(slice(0, 4)), REFS, 2.0),
    "logits, logprobs": lambda m: Objectives(m, fused=False).logprobs(SEQUENCES),
    "logits, ppo": lambda m: Objectives(m, fused=False).ppo(SEQUENCES, OLD, ADVANTAGES),
}
SCORES = {
    "sequence_scores": lambda m: sequence_scores(m, SEQUENCES),
    "token_values": lambda m: token_values(m, SEQUENCES)[SEQUENCES.response_mask],
    "of": lambda m: Scores(m).of(SEQUENCES),
    "values": lambda m: Scores(m).values(SEQUENCES)[SEQUENCES.response_mask],
    "values_of": lambda m: Scores(m).values_of(torch.ones(2, 3, 48)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PASSES | SCORES)
def test_a_pass_reads_weights_inside_only(name):
    make = scorer if name in SCORES else lambda: random_policy("llama")
    function = (PASSES | SCORES)[name]
    expected = values_of(function(make()))
    for _ in range(2):  # nothing is kept from one pass to the next
        model = sealed(make())
        found = values_of(function(model))
        assert all(parameter.isnan().all() for parameter in model.parameters())
        assert model.entered > 1  # the first closed the seal
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_the_kl_enters_both_models(fused):
    plain = [Objectives(random_policy("llama", seed=seed), fused=fused) for seed in (0, 1)]
    shut = [Objectives(sealed(random_policy("llama", seed=seed)), fused=fused) for seed in (0, 1)]
    assert torch.equal(shut[0].kl(shut[1], SEQUENCES), plain[0].kl(plain[1], SEQUENCES))


@torch.no_grad()
def test_a_value_head_on_a_trunk_enters_by_the_trunks_root():
    model, policy = scorer(), random_policy("llama")
    model.model = policy.model
    expected = Scores(model).of(SEQUENCES)
    shut = Scores(model, root=sealed(policy))
    assert torch.equal(shut.of(SEQUENCES), expected) and not Scores(model).of(SEQUENCES).isfinite().any()


def test_a_pass_inside_a_pass_of_the_same_model_is_a_plain_call():
    model = sealed(nn.Linear(2, 2))
    double = one_pass(lambda m, x: call(m, input=x) * 2)
    assert torch.equal(within(model, double, model, torch.ones(2)), within(model, lambda: model(torch.ones(2)) * 2))
    assert model.entered == 3  # the seal's and two


def test_an_error_in_a_pass_leaves_the_model_enterable():
    model = sealed(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError):
        within(model, lambda: 1 / 0)
    assert within(model, lambda: model.weight.isfinite().all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_model_gets_the_positions_of_left_padded_rows(architecture, fused):
    """The object that torch.compile returns hides the arguments of its model's forward."""
    model = random_policy(architecture)
    compiled = torch.compile(model, backend="eager")
    mine, truth = (Objectives(m, fused=fused).logprobs(SEQUENCES).logprobs for m in (compiled, model))
    assert (mine - truth).abs().max() < 2e-6
    prompts = [[5, 6, 7, 8], [9]]
    drawn, expected = (
        LocalSampler(m, word_tokenizer(pad_token="<pad>", eos_token="<eos>"), max_new_tokens=4)(prompts, seed=1)
        for m in (compiled, model)
    )
    assert (drawn.sampled.logprobs - expected.sampled.logprobs).abs().max() < 2e-6
