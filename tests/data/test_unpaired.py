"""Rows with one labelled completion: what is checked, token ids, and which completion is the unrelated one."""

import pytest

from rlhf_fast.data.encoding import encode_unpaired
from rlhf_fast.data.rows import load_rows
from tests.support.text import EOS, A, B, C, D, E

ROWS = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "c d", "label": False},
    {"prompt": "e", "completion": "d", "label": True},
    {"prompt": "a", "completion": "e", "label": False},
]


def test_rows_are_read_as_they_are(tmp_path):
    assert load_rows(ROWS, "unpaired") == ROWS


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "a", "completion": "b"}, "missing label; a row of kind unpaired needs prompt, completion, label"),
        ({"prompt": "a", "label": True}, "missing completion; a row of kind unpaired needs prompt, completion, label"),
        ({"prompt": "a", "completion": "b", "label": 1}, "label: expected true or false, got 1"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label: expected true or false, got 'yes'"),
        ({"prompt": "a", "completion": 3, "label": True}, "completion: expected a string, got int"),
    ],
)
def test_a_malformed_row_names_the_column(row, error):
    with pytest.raises(ValueError) as raised:
        load_rows([ROWS[0], row], "unpaired")
    assert str(raised.value) == f"row 2: {error}"


def test_examples_and_their_unrelated_completions(tokenizer):
    encoded = encode_unpaired(ROWS, tokenizer, 99, 99)
    assert encoded.truncated == 0
    assert [(e.prompt_ids, e.completion_ids, e.label) for e in encoded.examples] == [
        ([A], [B, EOS], True),
        ([A], [C, D, EOS], False),
        ([E], [D, EOS], True),
        ([A], [E, EOS], False),
    ]
    # The next row with another prompt: row 3 for rows 1, 2 and 4, and row 4 for row 3.
    assert [e.unrelated for e in encoded.examples] == [
        ([A], [D, EOS]),
        ([A], [D, EOS]),
        ([E], [E, EOS]),
        ([A], [D, EOS]),
    ]


def test_long_rows_are_cut_and_counted(tokenizer):
    encoded = encode_unpaired([{**ROWS[0], "prompt": "a b c d"}, ROWS[2]], tokenizer, 4, 99)
    assert (encoded.truncated, encoded.cut_prompts, encoded.cut_answers) == (1, 1, 1)
    assert encoded.examples[0].prompt_ids == [B, C, D] and encoded.examples[0].unrelated == ([B, C, D], [D])


def test_one_prompt_alone_is_an_error(tokenizer):
    with pytest.raises(
        ValueError, match="^row 1: prompt: expected rows with at least two different prompts, found one"
    ):
        encode_unpaired(ROWS[:2], tokenizer, 99, 99)
