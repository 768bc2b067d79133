"""Decoding against transformers' generate, against exact probabilities, and against teacher-forced passes."""

import pytest
import torch
from tiny_models import ARCHITECTURES, random_policy, random_sequences

from rlhf_fast.objectives import Objectives
from rlhf_fast.rollout import eos_token_ids, generate

EOS, PAD = 1, 0


def _generate(model, sequences, **options):
    defaults = {"max_new_tokens": 12, "eos_ids": [EOS], "pad_id": PAD}
    return generate(model, sequences.prompt_ids, sequences.prompt_mask, **{**defaults, **options})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rows_equal_generate_token_for_token(architecture):
    model, sequences = random_policy(architecture), random_sequences(rows=6, seed=4)
    expected = model.generate(
        input_ids=sequences.prompt_ids,
        attention_mask=sequences.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[:, sequences.prompt_ids.shape[1] :]
    for samples in (0, 2):  # alone, and folded into a decode with sampled rows
        greedy = _generate(model, sequences, samples=samples, greedy=True).greedy
        ids = torch.nn.functional.pad(greedy.response_ids, (0, 12 - greedy.response_ids.shape[1]))
        assert torch.equal(ids[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_logprobs_equal_a_teacher_forced_pass(architecture):
    model, sequences = random_policy(architecture), random_sequences(rows=8, seed=5)
    generator = torch.Generator().manual_seed(0)
    rollout = _generate(model, sequences, samples=2, temperature=0.8, generator=generator).sampled
    with torch.no_grad():
        forced = Objectives(model, temperature=0.8).logprobs(rollout.sequences)
    torch.testing.assert_close(rollout.logprobs, forced.logprobs, rtol=0, atol=2e-4)
    torch.testing.assert_close(rollout.entropy, forced.entropy, rtol=0, atol=2e-4)


def test_rows_end_with_eos_and_finished_rows_leave_no_trace():
    model, sequences = random_policy("llama", vocab_size=5), random_sequences(rows=32, vocab_size=5)
    rollout = _generate(model, sequences, generator=torch.Generator().manual_seed(1), temperature=4.0).sampled
    lengths = rollout.response_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 1  # rows finish at different times, so the batch was compacted
    for row, length in enumerate(lengths.tolist()):
        ids = rollout.response_ids[row, :length].tolist()
        assert rollout.response_mask[row, :length].all()
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == rollout.finished[row].item()
        assert rollout.finished[row] or length == 12
        assert (rollout.response_ids[row, length:] == PAD).all()
        assert (rollout.logprobs[row, length:] == 0).all()
        assert (rollout.entropy[row, length:] == 0).all()


def test_sampled_tokens_follow_the_exact_probabilities():
    model, sequences = random_policy("llama", vocab_size=11), random_sequences(rows=1, vocab_size=11)
    n = 8000
    generator = torch.Generator().manual_seed(0)
    rollout = _generate(model, sequences, samples=n, max_new_tokens=1, temperature=3.0, generator=generator).sampled
    with torch.no_grad():
        logits = model(sequences.prompt_ids[:, sequences.prompt_mask[0]]).logits[0, -1]
    expected = torch.softmax(logits.double() / 3.0, dim=-1) * n
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=11)
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 29.6  # 10 degrees of freedom, p = 0.001


def test_same_generator_state_same_tokens():
    model, sequences = random_policy("llama"), random_sequences(rows=4)
    first, second, other = (
        _generate(model, sequences, temperature=5.0, generator=torch.Generator().manual_seed(seed)).sampled
        for seed in (7, 7, 8)
    )
    assert torch.equal(first.response_ids, second.response_ids)
    assert torch.equal(first.logprobs, second.logprobs)
    assert not torch.equal(first.response_ids[:, :3], other.response_ids[:, :3])


def test_a_prompts_samples_are_consecutive():
    model, sequences = random_policy("llama"), random_sequences(rows=3)
    generation = _generate(model, sequences, samples=2, greedy=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generation.sampled.prompt_ids, sequences.prompt_ids.repeat_interleave(2, dim=0))
    assert torch.equal(generation.greedy.prompt_ids, sequences.prompt_ids)


def test_bad_arguments():
    model, sequences = random_policy("llama"), random_sequences()
    with pytest.raises(ValueError, match="prompt_mask: expected left-padded prompts"):
        generate(model, sequences.prompt_ids, sequences.prompt_mask.flip(1), max_new_tokens=2, eos_ids=[1], pad_id=0)
    with pytest.raises(ValueError, match="samples: expected at least one row"):
        _generate(model, sequences, samples=0)


def test_eos_ids_come_from_tokenizer_and_generation_config(tokenizer):
    model = random_policy("llama")
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [5, 9]
    assert eos_token_ids(model, tokenizer) == [1, 5, 9]
