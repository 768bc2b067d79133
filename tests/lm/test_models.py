"""Forward passes: padding, pad ids and positions change nothing; scores sit on the last real token."""

import pytest
import torch

from rlhf_fast.lm.loading import load_policy, load_scorer, set_score_offset
from rlhf_fast.lm.passes import response_logits, sequence_scores, token_values
from rlhf_fast.lm.sequences import Sequences
from tests.support.models import ARCHITECTURES, random_policy, random_sequences


@pytest.fixture
def scorer(tiny_model):
    torch.manual_seed(0)
    return load_scorer(tiny_model)


def _unpadded(sequences: Sequences, row: int) -> Sequences:
    """One row without any padding."""
    p, r = sequences.prompt_mask[row], sequences.response_mask[row]
    prompt, response = sequences.prompt_ids[row, p][None], sequences.response_ids[row, r][None]
    return Sequences(prompt, torch.ones_like(prompt, dtype=bool), response, torch.ones_like(response, dtype=bool))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_logits_of_padded_rows_equal_those_of_the_row_alone(architecture):
    model, sequences = random_policy(architecture), random_sequences()
    with torch.no_grad():
        logits = response_logits(model, sequences)
        for row in range(len(sequences.prompt_ids)):
            alone = response_logits(model, _unpadded(sequences, row))[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_response_logits_are_the_models_own(architecture):
    model = random_policy(architecture)
    sequences = _unpadded(random_sequences(), 0)
    prompt = sequences.prompt_ids.shape[1]
    with torch.no_grad():
        expected = model(sequences.input_ids()).logits[:, prompt - 1 : -1]
        torch.testing.assert_close(response_logits(model, sequences), expected, rtol=1e-5, atol=1e-5)


def test_what_the_pad_slots_hold_is_irrelevant(scorer):
    sequences = random_sequences(seed=3)
    eos_as_pad = sequences._replace(
        prompt_ids=sequences.prompt_ids.masked_fill(~sequences.prompt_mask, 1),
        response_ids=sequences.response_ids.masked_fill(~sequences.response_mask, 1),
    )
    with torch.no_grad():
        for function in (sequence_scores, token_values):
            mask = sequences.response_mask if function is token_values else slice(None)
            assert torch.equal(function(scorer, sequences)[mask], function(scorer, eos_as_pad)[mask])


def test_score_is_read_at_the_last_real_token_whatever_the_padding(scorer):
    sequences = random_sequences(seed=1)
    with torch.no_grad():
        scores = sequence_scores(scorer, sequences)
        wider = Sequences(
            torch.nn.functional.pad(sequences.prompt_ids, (3, 0)),
            torch.nn.functional.pad(sequences.prompt_mask, (3, 0)),
            torch.nn.functional.pad(sequences.response_ids, (0, 4)),
            torch.nn.functional.pad(sequences.response_mask, (0, 4)),
        )
        torch.testing.assert_close(sequence_scores(scorer, wider), scores, rtol=1e-5, atol=1e-5)
        for row in range(len(scores)):
            alone = _unpadded(sequences, row)
            hidden = scorer.base_model(alone.input_ids()).last_hidden_state[0, -1]
            torch.testing.assert_close(scores[row], (scorer.score.weight @ hidden)[0], rtol=1e-5, atol=1e-5)


def test_value_of_a_state_does_not_see_its_action(scorer):
    sequences = random_sequences(seed=2)
    changed = sequences._replace(response_ids=torch.where(sequences.response_mask, 5, 0))
    with torch.no_grad():
        before, after = token_values(scorer, sequences), token_values(scorer, changed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1:], after[:, 1:])


def test_score_offset_shifts_scores_and_values_and_is_saved(scorer, tmp_path, tokenizer):
    sequences = random_sequences()
    with torch.no_grad():
        scores, values = sequence_scores(scorer, sequences), token_values(scorer, sequences)
        set_score_offset(scorer, 1.25)
        scorer.save_pretrained(tmp_path)
        loaded = load_scorer(tmp_path)
        torch.testing.assert_close(sequence_scores(loaded, sequences), scores - 1.25)
        torch.testing.assert_close(token_values(loaded, sequences), values - 1.25)


def test_scores_and_values_of_bf16_passes_are_not_bf16(scorer):
    sequences = random_sequences()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for scores in (sequence_scores(scorer, sequences), token_values(scorer, sequences)[sequences.response_mask]):
            assert scores.dtype == torch.float32
            assert (scores != scores.bfloat16().float()).float().mean() > 0.5


def test_new_heads(tiny_model):
    zero = load_scorer(tiny_model, head="zero")
    with torch.no_grad():
        assert sequence_scores(zero, random_sequences()).abs().max() == 0
    torch.manual_seed(0)
    weight = load_scorer(tiny_model).score.weight
    assert weight.shape == (1, 48)
    assert 0.5 / 7 < weight.std().item() < 2 / 7  # N(0, 1/(48 + 1))


def test_classifier_with_several_labels_is_refused(tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one label .* got 3 labels"):
        load_scorer(tmp_path)


def test_dropout_is_off_in_train_mode(tmp_path):
    random_policy("gpt2").save_pretrained(tmp_path)
    model, sequences = load_policy(tmp_path), random_sequences()
    assert model.training
    assert torch.equal(response_logits(model, sequences), response_logits(model, sequences))


def test_no_prompt_is_an_error():
    sequences = random_sequences()
    empty = sequences._replace(prompt_ids=sequences.prompt_ids[:, :0], prompt_mask=sequences.prompt_mask[:, :0])
    with pytest.raises(ValueError, match="prompt_ids: expected at least one prompt token"):
        response_logits(random_policy("llama"), empty)
