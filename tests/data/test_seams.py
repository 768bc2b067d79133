"""Ids of prompt and answer are those of the whole text; samples' texts give their ids again."""

import random

import pytest

from rlhf_fast.data import encoding as data
from rlhf_fast.data.rows import load_rows
from rlhf_fast.data.seams import split, tokenize
from rlhf_fast.lab.world import build_tokenizer
from tests.support.templates import byte_tokenizer, piece_tokenizer
from tests.support.text import word_tokenizer

TOKENIZERS = {
    "bytes": byte_tokenizer("plain words"),
    **{prepend: piece_tokenizer("mistral", prepend) for prepend in ("legacy", "first", "always", "never")},
}


class WithoutPlaces:
    """A tokenizer that does not know its tokens' places, as slow tokenizers do not."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, **options):
        encoded = self.tokenizer(texts, **options)
        encoded._encodings = None
        return encoded


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("places", [True, False])
def test_whole_texts(name, places):
    """Against the definition: the ids of the whole text, if the prompt's own ids begin them."""
    tokenizer, draw = TOKENIZERS[name], random.Random(0)
    words = ["Blue", "Red", " ", "  ", "\n", "\n\n", "a", " joy", "was", "=", "4", " B", "</s>", "l", "ue", "x", " was"]
    texts = ["".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(300)]
    borders = [draw.randint(0, len(text)) for text in texts]
    rows = [(text, border) for text, border in zip(texts, borders, strict=True) if "</s>" not in text[border - 3 :][:6]]
    found = split(tokenizer if places else WithoutPlaces(tokenizer), *zip(*rows, strict=True))  # type: ignore[arg-type]
    seams = 0
    for (text, border), (ids, length) in zip(rows, found, strict=True):
        head, whole = ids_of(tokenizer, text[:border]), ids_of(tokenizer, text)
        assert ids[:length] == head, (text, border)
        if whole[: len(head)] == head:
            assert ids == whole, (text, border)
        else:
            seams += 1
    assert 0 < seams < len(rows) / 2


def test_a_token_across_the_border_is_no_answer_behind_the_prompt():
    tokenizer = byte_tokenizer("plain words")
    assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "2+2=4")) == ["2", "+", "2", "=4"]
    rows = load_rows([{"prompt": "2+2=", "completion": "4"}, {"prompt": "It is ", "completion": "Blue"}], "sft")
    examples = data.encode_sft(rows, tokenizer, 99, 99).examples
    shown = ["".join(tokenizer.convert_ids_to_tokens(e.input_ids)) for e in examples]
    assert shown == ["2+2=4<eos>", "ItĠisĠBlue<eos>"]
    answers = [tokenizer.convert_ids_to_tokens([t for t, on in zip(*e, strict=True) if on]) for e in examples]
    assert answers == [["4", "<eos>"], ["B", "lue", "<eos>"]]
    pieces = piece_tokenizer("mistral", "first")
    rows = load_rows([{"prompt": "It is ", "completion": "Blue"}], "sft")
    (example,) = data.encode_sft(rows, pieces, 99, 99).examples
    assert pieces.convert_ids_to_tokens(example.input_ids)[-4:] == ["s", "▁", "Blue", "</s>"]  # no second space


def test_spans_within_a_text():
    tokenizer = byte_tokenizer("plain words")
    ((ids, spans, clean),) = tokenize(tokenizer, ["x=4 Blue\n\n"], [[(2, 3), (4, 8), (8, 10)]])
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "=4", "ĠB", "lue", "ĊĊ"]
    assert (spans, clean) == ([(1, 2), (2, 4), (4, 5)], False)  # tokens that stand partly inside
    assert tokenize(tokenizer, [], []) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_samples_have_texts_that_give_their_ids_again(name):
    tokenizer = TOKENIZERS[name]
    prompts, eos = ["The film was", "It is ", "x"], tokenizer.eos_token_id
    wanted = [" a joy", "Blue", "Blue a"]
    pairs = data.encode_texts(prompts, wanted, [True, False, True], tokenizer, 99, 99)
    assert [pair[1][-1] == eos for pair in pairs] == [True, False, True]
    assert data.continuations(prompts, pairs, [True, False, True], tokenizer) == wanted


def test_words_that_are_joined_without_a_space_stay_words():
    """The prompts and the completions of a word tokenizer hold no space at their border."""
    tokenizer = build_tokenizer()
    (example,) = data.encode_sft([{"prompt": "the film was", "completion": "good ."}], tokenizer, 99, 99).examples
    assert tokenizer.decode(example.input_ids) == "the film was good . <eos>"
    pair = [([tokenizer.convert_tokens_to_ids("the")], tokenizer("film was")["input_ids"])]
    assert data.continuations(["the"], pair, [False], tokenizer) == ["film was"]
    assert tokenize(word_tokenizer(), ["a b"], [[(1, 3)]])[0].spans == [(1, 2)]
