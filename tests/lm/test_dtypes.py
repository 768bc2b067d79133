"""bf16 weights: the numbers of autocast for frozen models beside fp32 weights, and of transformers in plain bf16."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_fast.lm import dtypes
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.scores import Scores
from tests.support.models import ARCHITECTURES, random_policy, random_sequences


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """A model whose weights are bf16 numbers."""
    directory = tmp_path_factory.mktemp(request.param)
    random_policy(request.param).to(torch.bfloat16).save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def test_a_mixed_model_gives_the_numbers_of_fp32_weights_under_autocast(saved):
    sequences = random_sequences()
    mixed, full = (load_policy(saved, dtype=dtype, trainable=False) for dtype in ("mixed", "fp32"))
    mine = Objectives(mixed).logprobs(sequences).logprobs
    objectives = Objectives(full)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = objectives.logprobs(sequences).logprobs
        again = Objectives(mixed).logprobs(sequences).logprobs  # inside another autocast
    assert torch.equal(mine, theirs) and torch.equal(mine, again)
    assert (mine - objectives.logprobs(sequences).logprobs).abs().max() > 1e-4  # bf16 was really used
    small = 0.8 if "gemma" in saved else 0.6  # Gemma's embeddings, which scale their rows, are fp32
    assert sum(p.nbytes for p in mixed.parameters()) < small * sum(p.nbytes for p in full.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_that_bf16_cannot_hold_change_nothing_either(name, tmp_path):
    random_policy(name).save_pretrained(tmp_path)
    sequences = random_sequences()
    mixed, full = (load_policy(tmp_path, dtype=dtype, trainable=False) for dtype in ("mixed", "fp32"))
    objectives = Objectives(full)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = objectives.logprobs(sequences).logprobs
    assert torch.equal(Objectives(mixed).logprobs(sequences).logprobs, theirs)
    assert sum(p.nbytes for p in mixed.parameters()) < sum(p.nbytes for p in full.parameters())


@torch.no_grad()
def test_bf16_weights_give_the_log_probs_of_transformers(saved):
    sequences = random_sequences()
    model = load_policy(saved, dtype="bf16", trainable=False)
    mine = Objectives(model).logprobs(sequences).logprobs
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64).eval()
    errors = []
    for row in range(len(mine)):
        prompt = sequences.prompt_ids[row][sequences.prompt_mask[row]]
        ids = torch.cat([prompt, sequences.response_ids[row][sequences.response_mask[row]]])
        both = (of(input_ids=ids[None]).logits[0].double().log_softmax(-1) for of in (plain, exact))
        theirs, truth = (x[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :, 0] for x in both)
        errors.append(((mine[row, : len(truth)] - truth).abs().max(), (theirs - truth).abs().max()))
    mine_error, their_error = (max(column).item() for column in zip(*errors, strict=True))
    assert mine_error < 1.5 * their_error + 0.02


@torch.no_grad()
def test_scores_of_bf16_weights_are_not_bf16(saved):
    torch.manual_seed(0)
    for dtype in ("bf16", "mixed"):
        scorer = load_scorer(saved, dtype=dtype, trainable=False)
        scores = Scores(scorer).of(random_sequences())
        assert scores.dtype == torch.float32
        assert (scores != scores.bfloat16().float()).float().mean() > 0.5


def test_a_mixed_model_is_freed_with_its_last_use(saved):
    model = load_policy(saved, dtype="mixed", trainable=False)
    Objectives(model)
    weight = weakref.ref(next(model.parameters()))
    gc.disable()
    try:
        del model
        assert weight() is None  # without the garbage collector, which runs whenever it likes
    finally:
        gc.enable()


def test_a_model_that_autocast_does_not_know_keeps_fp32_weights(recwarn):
    model = random_policy("llama")
    odd = nn.Parameter(torch.ones(3, 3))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: torch.mm(inputs[0][0], odd))
    dtypes.cast(model, "mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "bf16 weights under autocast are not used for LlamaForCausalLM: a pass raises RuntimeError" in str(
        recwarn.list[0].message
    )
