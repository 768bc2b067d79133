"""Enumeration: counts worked out by hand, probabilities that sum to 1, a causal LM against its own greedy decoding."""

import pytest
import torch

from rlhf_fast import exact
from tests.support.models import random_policy
from tests.support.worlds import random_tabular

VOCABULARY = 5


def test_completions_of_one_length():
    tokens, mask, _ = exact.completions(2, 2)
    assert tokens.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert mask.all()
    assert exact.completions(3, 1).tokens.tolist() == [[0], [1], [2]]


def test_completions_that_an_eos_ends():
    tokens, mask, _ = exact.completions(2, 3, eos_token_id=0)
    written = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    assert written == [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    # V = 4: 1 that stops at once, 3 after one token, 9 after two, 27 with 3 tokens before the end
    assert len(exact.completions(4, 3, eos_token_id=2).tokens) == 1 + 3 + 9 + 27


@pytest.mark.parametrize("eos_token_id", [None, 1])
def test_tabular_probabilities(eos_token_id):
    completions = exact.completions(3, 3, eos_token_id=eos_token_id)
    policy = random_tabular(completions, (2,))
    torch.testing.assert_close(policy().logsumexp(-1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    # by hand: the prefix (2, 0) is the 1 + 3 + 3 * 2 + 0 = 10th of the heap
    row = completions.tokens.tolist().index([2, 0, 1])
    soft = policy.logits[1].softmax(-1)
    by_hand = soft[0, 2] * soft[3, 0] * soft[10, 1]
    torch.testing.assert_close(policy()[1, row].exp(), by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("eos_token_id", [None, 1])
def test_tabular_fits_any_distribution(eos_token_id):
    completions = exact.completions(3, 3, eos_token_id=eos_token_id)
    generator = torch.Generator().manual_seed(3)
    logprobs = torch.randn(2, len(completions.tokens), generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs[0, 5:] = -torch.inf
    logprobs = logprobs.log_softmax(-1)
    policy = exact.TabularPolicy(completions, (2,))
    policy.set_logprobs(logprobs)
    torch.testing.assert_close(policy().exp(), logprobs.exp(), atol=1e-12, rtol=0)


def test_greedy_goes_token_by_token():
    completions = exact.completions(2, 2)
    likeliest_is_last = torch.tensor([0.3, 0.3, 0.0, 0.4], dtype=torch.float64).log()
    assert exact.greedy(likeliest_is_last, completions) == 0  # 0 leads by 0.6 to 0.4, whatever follows
    assert exact.greedy(likeliest_is_last.expand(2, 3, 4), completions).shape == (2, 3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_causal_lm(architecture):
    model = random_policy(architecture, VOCABULARY).double()
    completions = exact.completions(VOCABULARY, 3, eos_token_id=1)
    prompts = torch.tensor([[0, 2, 3], [4, 2, 2]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    with torch.no_grad():
        logprobs = exact.causal_lm_logprobs(model, prompts, completions, prompt_mask=mask)
    torch.testing.assert_close(logprobs.logsumexp(-1), torch.zeros(2, dtype=torch.float64), atol=1e-8, rtol=0)
    for prompt, row in ((prompts[:1, 1:], logprobs[0]), (prompts[1:], logprobs[1])):
        ids, total = prompt, 0.0
        for _ in range(3):  # its greedy completion, a token at a time
            with torch.no_grad():
                step = model(ids).logits[0, -1].log_softmax(-1)
            ids, total = torch.cat([ids, step.argmax()[None, None]], 1), total + step.max()
            if ids[0, -1] == 1:
                break
        best = exact.greedy(row, completions)
        assert completions.tokens[best][completions.mask[best]].tolist() == ids[0, prompt.shape[1] :].tolist()
        torch.testing.assert_close(row[best], total, atol=1e-8, rtol=0)


def test_causal_lm_temperature_and_gradient():
    model = random_policy("llama", VOCABULARY).double()
    completions, prompt = exact.completions(VOCABULARY, 1), torch.tensor([[2, 3]])
    logprobs = exact.causal_lm_logprobs(model, prompt, completions, temperature=0.5)
    torch.testing.assert_close(logprobs[0], (2 * model(prompt).logits[0, -1]).log_softmax(-1), atol=1e-8, rtol=0)
    logprobs[0, 0].backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_bad_input():
    with pytest.raises(ValueError, match="length: expected at most 1048576 completions, got 7"):
        exact.completions(8, 7)
    with pytest.raises(ValueError, match=r"eos_token_id: expected in \[0, 3\), got 3"):
        exact.completions(3, 2, eos_token_id=3)
    completions = exact.completions(3, 2)
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[\.\.\., 9\], got \[8\]"):
        exact.greedy(torch.zeros(8), completions)
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[2, 9\], got \[9\]"):
        exact.TabularPolicy(completions, (2,)).set_logprobs(torch.zeros(9))
    with pytest.raises(ValueError, match="model: expected a vocabulary of 3 tokens, as completions, got 5"):
        exact.causal_lm_logprobs(random_policy("llama", VOCABULARY), torch.tensor([[1]]), completions)
