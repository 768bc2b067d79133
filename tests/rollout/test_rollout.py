"""Decoding against transformers' generate, against exact probabilities, and against teacher-forced passes."""

import pytest
import torch

from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.ops.truncation import unpacked
from rlhf_fast.rollout.generate import eos_token_ids, generate
from tests.support.models import ARCHITECTURES, random_policy, random_sequences
from tests.support.templates import byte_tokenizer

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
    rollout = _generate(model, sequences, samples=2, temperature=0.8).sampled
    with torch.no_grad():
        forced = Objectives(model, temperature=0.8).logprobs(rollout.sequences)
    torch.testing.assert_close(rollout.logprobs, forced.logprobs, rtol=0, atol=2e-4)
    torch.testing.assert_close(rollout.entropy, forced.entropy, rtol=0, atol=2e-4)


def test_rows_end_with_eos_and_finished_rows_leave_no_trace():
    model, sequences = random_policy("llama", vocab_size=5), random_sequences(rows=32, vocab_size=5)
    rollout = _generate(model, sequences, temperature=4.0, seed=1).sampled
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
    rollout = _generate(model, sequences, samples=n, max_new_tokens=1, temperature=3.0).sampled
    with torch.no_grad():
        logits = model(sequences.prompt_ids[:, sequences.prompt_mask[0]]).logits[0, -1]
    expected = torch.softmax(logits.double() / 3.0, dim=-1) * n
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=11)
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 29.6  # 10 degrees of freedom, p = 0.001


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}])
def test_truncated_rollouts_keep_the_sets_they_drew_from(options):
    """Through rows that leave the batch: each token is in its set, and the log-probs are those of the set."""
    model, sequences = random_policy("llama"), random_sequences(rows=4)
    options |= {"temperature": 3.0, "samples": 3, "greedy": True}
    both = _generate(model, sequences, eos_ids=range(1, 12), **options)
    for rollout in both:
        kept, mask = unpacked(rollout.kept, 37), rollout.response_mask
        assert 1 < kept[mask].sum(-1).float().mean() < 30
        assert kept.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)[mask].all()
        with torch.no_grad():
            out = Objectives(model, temperature=3.0).logprobs(rollout.sequences, kept=rollout.kept)
        torch.testing.assert_close(out.logprobs, rollout.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.entropy, rollout.entropy, rtol=1e-5, atol=1e-5)
    assert both.sampled.rows(slice(2)).kept.shape[0] == 2
    for without in (
        _generate(model, sequences, temperature=3.0),
        _generate(model, sequences, with_kept=False, top_k=3),
    ):
        assert without.sampled.kept is None


def test_same_seed_same_tokens():
    model, sequences = random_policy("llama"), random_sequences(rows=4)
    first, second, other = (_generate(model, sequences, temperature=5.0, seed=seed).sampled for seed in (7, 7, 8))
    assert torch.equal(first.response_ids, second.response_ids)
    assert torch.equal(first.logprobs, second.logprobs)
    assert not torch.equal(first.response_ids[:, :3], other.response_ids[:, :3])


def test_tokens_do_not_depend_on_the_batch():
    model, sequences = random_policy("llama"), random_sequences(rows=8, seed=2)
    together = _generate(model, sequences, temperature=5.0, samples=2, greedy=True)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    shuffled = _generate(model, sequences.rows(order), temperature=5.0, samples=2, greedy=True)
    for prompt in range(8):
        alone = _generate(model, sequences.rows(slice(prompt, prompt + 1)), temperature=5.0, samples=2)
        place = int((order == prompt).nonzero())
        for sample in range(2):
            row = _completion(together.sampled, 2 * prompt + sample)
            assert row == _completion(shuffled.sampled, 2 * place + sample) == _completion(alone.sampled, sample)
        assert _completion(together.greedy, prompt) == _completion(shuffled.greedy, place)


def test_padding_does_not_change_the_tokens():
    model, sequences = random_policy("llama"), random_sequences(rows=4)
    more = torch.nn.functional.pad(sequences.prompt_ids, (3, 0)), torch.nn.functional.pad(sequences.prompt_mask, (3, 0))
    padded = _generate(model, sequences._replace(prompt_ids=more[0], prompt_mask=more[1]), temperature=5.0).sampled
    plain = _generate(model, sequences, temperature=5.0).sampled
    assert [_completion(padded, i) for i in range(4)] == [_completion(plain, i) for i in range(4)]


def test_equal_prompts_get_different_samples():
    model, sequences = random_policy("llama"), random_sequences(rows=1)
    rollout = _generate(model, sequences.rows(torch.tensor([0, 0])), temperature=5.0, samples=2).sampled
    assert len({tuple(_completion(rollout, i)) for i in range(4)}) == 4


def test_greedy_rows_can_end_sooner():
    model, sequences = random_policy("llama"), random_sequences(rows=6, seed=4)
    whole = _generate(model, sequences, greedy=True)
    capped = _generate(model, sequences, greedy=True, greedy_max_new_tokens=3)
    for i in range(6):
        assert _completion(capped.sampled, i) == _completion(whole.sampled, i)
        assert _completion(capped.greedy, i) == _completion(whole.greedy, i)[:3]
    assert capped.greedy.response_mask.sum(dim=1).max() == 3
    assert torch.equal(capped.greedy.finished, whole.greedy.finished & (whole.greedy.response_mask.sum(dim=1) <= 3))


def _completion(rollout, row):
    return rollout.response_ids[row][rollout.response_mask[row]].tolist()


def test_a_prompts_samples_are_consecutive():
    model, sequences = random_policy("llama"), random_sequences(rows=3)
    generation = _generate(model, sequences, samples=2, greedy=True)
    assert torch.equal(generation.sampled.prompt_ids, sequences.prompt_ids.repeat_interleave(2, dim=0))
    assert torch.equal(generation.greedy.prompt_ids, sequences.prompt_ids)


def test_bad_arguments():
    model, sequences = random_policy("llama"), random_sequences()
    with pytest.raises(ValueError, match="prompt_mask: expected left-padded prompts"):
        generate(model, sequences.prompt_ids, sequences.prompt_mask.flip(1), max_new_tokens=2, eos_ids=[1], pad_id=0)
    with pytest.raises(ValueError, match="samples: expected at least one row"):
        _generate(model, sequences, samples=0)
    with pytest.raises(ValueError, match="greedy_max_new_tokens: expected at least 1, got 0"):
        _generate(model, sequences, greedy=True, greedy_max_new_tokens=0)


def test_eos_ids_come_from_tokenizer_and_generation_config(tokenizer):
    model = random_policy("llama")
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [5, 9]
    assert eos_token_ids(model, tokenizer) == [1, 5, 9]
    gemma = byte_tokenizer("gemma")
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, gemma) == gemma.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
