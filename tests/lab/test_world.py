"""The sentiment world: the reward by hand, the variance it was designed for, determinism."""

import math
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_fast.data.encoding import load_rows
from rlhf_fast.lab import world


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was good .", 0.6),
        ("critics loathed the plot .", -0.6),
        ("the plot was really good .", 1.0),  # intensifier
        ("the plot was somewhat bad .", -0.3),  # softener
        ("the plot was not good .", -0.3),  # negation: -0.5 * 0.6
        ("the plot was never truly awful .", 0.5),  # -0.5 * -1
        ("i never mildly liked the cast .", -0.15),  # -0.5 * 0.3
        ("the plot was good but the cast was bad .", -0.3),  # 0.25 * 0.6 + 0.75 * -0.6
        ("the plot was bad but it opened on a friday .", -0.15),  # 0.25 * -0.6
        ("it opened on a friday but i loved the cast .", 0.45),  # 0.75 * 0.6
        ("the plot was good . the cast was good .", 0.6),  # a polarity word counts once
        ("the plot was good . the cast was great .", 1.2),
        ("the plot was not good . i really loved the acting but the music was bad .", -0.5),  # of the docstring
        ("it takes place in paris .", 0.0),
        ("the plot was good", 0.0),  # the sentence is not finished
        ("the plot was good . the cast was great", 0.6),
        ("the plot was good but the cast was great but i loved the music .", 0.0),  # two contrasts
        ("the plot was very good .", 0.0),  # garbage from here on: not in the lexicon
        ("the plot was really truly good .", 0.0),
        ("the plot was really not good .", 0.0),
        ("i not liked the plot .", 0.0),
        ("the plot good .", 0.0),
        ("the was good .", 0.0),
        ("the good was plot .", 0.0),
        ("i loved plot .", 0.0),
        ("good great brilliant .", 0.0),
        ("the plot was good.", 0.0),  # "good." is a word of its own
        ("The plot was good .", 0.0),
        (". . but but . the", 0.0),
        ("\u00fcn\u00ef <eos> \U0001f600 \x00 .", 0.0),
        ("", 0.0),
        ("the plot was really good but . the cast was great .", 0.85),  # 0.25 * 1 + 0.75 * 0, then 0.6
        ("the plot was zzz . the cast was good .", 0.6),  # garbage does not spoil its neighbours
        ("the plot was really good truly . the cast was good .", 0.6),  # nor use up a polarity word
    ],
)
def test_polarity_by_hand(text, expected):
    assert world.polarity(text) == pytest.approx(expected, abs=1e-12)


def test_reward_joins_prompt_and_completion():
    prompts, completions = ["the plot was", "the plot was bad"], ["really good .", "but i truly loved the cast ."]
    sums = [1.0, 0.25 * -0.6 + 0.75]
    expected = [1 / (1 + math.exp(-s)) for s in sums]
    assert world.true_reward(prompts, completions, topic=["x", "y"]) == pytest.approx(expected, abs=1e-12)
    assert world.true_reward(["the plot was bad ."], [""]) == pytest.approx([1 / (1 + math.exp(0.6))])
    assert world.true_reward([""], [""]) == [0.5]


def test_repetition_does_not_pay():
    once = world.polarity("the plot was really good .")
    assert world.polarity("the plot was really good . " * 50) == once
    assert world.polarity("the plot was really good but the plot was really good . " * 50) == 0.25


def test_prompt_explains_most_of_the_reward():
    rows = world.sft_rows(4000, seed=0)
    rewards = np.array(world.true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows]))
    assert abs(rewards.mean() - 0.5) < 0.02
    # What any function of the prompt explains is a lower bound; here, the reward of the prompt's finished opinions.
    so_far = np.array(world.true_reward([row["prompt"] + " ." for row in rows], [""] * len(rows)))
    assert np.corrcoef(so_far, rewards)[0, 1] ** 2 > 0.5
    assert np.mean(so_far < 0.4) > 0.2
    assert np.mean(so_far > 0.6) > 0.2
    assert np.mean(so_far == 0.5) > 0.05


def test_completion_can_turn_every_verdict():
    prompts = [row["prompt"] for row in world.prompt_rows(500, seed=1)]
    praise = (
        ". the film was truly superb . i really adored the cast . the music was truly stunning . "
        "the ending was absolutely perfect . critics really praised the script ."
    )
    assert np.mean(world.true_reward(prompts, [praise] * 500)) > 0.95
    assert np.mean(world.true_reward(prompts, ["."] * 500)) == pytest.approx(0.5, abs=0.02)


def reviews(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [world._review(rng) for _ in range(n)]


def test_reviews_are_grammatical_and_of_the_right_length():
    for review in reviews(300, seed=2):
        prompt, completion = world.split_prompt(review, random.Random(0))
        assert f"{prompt} {completion}" == review
        assert 8 <= len(prompt.split()) <= 18
        assert 4 <= len(completion.split()) <= 37
        for sentence in review.removesuffix(" .").split(" . "):
            for clause in sentence.split(" but "):
                words = clause.split()
                opinion = world.polarity(f"{clause} .") != 0
                assert opinion != (words[0] in ("it", "a") or words[:2] == ["i", "saw"])
        polar = [word for word in review.split() if word in world.ADJECTIVES or word in world.VERBS]
        assert len(polar) == len(set(polar))


def test_same_seed_same_world():
    assert reviews(1, seed=0) == [
        "the music is elegant . critics mocked the camera . i saw it on friday . the story seemed truly great ."
    ]
    assert reviews(5, seed=0)[:2] == reviews(2, seed=0)
    assert world.sft_rows(20, seed=3) == world.sft_rows(20, seed=3)
    assert world.sft_rows(20, seed=3) != world.sft_rows(20, seed=4)
    assert world.prompt_rows(20, seed=3) == world.prompt_rows(20, seed=3)


def test_held_out_prompts_are_held_out():
    train = [row["prompt"] for row in world.prompt_rows(500, seed=0)]
    held_out = [row["prompt"] for row in world.prompt_rows(500, seed=0, exclude=train)]
    assert len(set(train)) == len(set(held_out)) == 500
    assert not set(train) & set(held_out)


def test_rows_are_valid():
    assert len(load_rows(world.sft_rows(3, seed=0), "sft")) == 3
    assert len(load_rows(world.prompt_rows(3, seed=0), "prompt")) == 3
    pairs = world.preference_rows(["the plot was"], [("good .", "bad .")], seed=0)
    assert len(load_rows(pairs, "preference")) == 1


def test_preferences_follow_bradley_terry():
    n, good, bad = 4000, "somewhat good .", "somewhat bad ."
    gap = 1 / (1 + math.exp(-0.3)) - 1 / (1 + math.exp(0.3))
    expected = 1 / (1 + math.exp(-8 * gap))  # 0.7667
    rows = world.preference_rows(["the plot was"] * n, [(good, bad), (bad, good)] * (n // 2), seed=0)
    wins = np.mean([row["chosen"] == good for row in rows])
    assert abs(wins - expected) < 3 * math.sqrt(expected * (1 - expected) / n)
    assert rows == world.preference_rows(["the plot was"] * n, [(good, bad), (bad, good)] * (n // 2), seed=0)
    certain = world.preference_rows(["the plot was"] * 9, [(bad, good)] * 9, seed=0, scale=1e5)
    assert {(row["chosen"], row["rejected"]) for row in certain} == {(good, bad)}
    assert world.preference_rows(["a", "a"], [("b", "b"), ("b", "c")], seed=0)[0].keys() == {
        "prompt",
        "chosen",
        "rejected",
    }
    assert len(world.preference_rows(["a", "a"], [("b", "b"), ("b", "c")], seed=0)) == 1  # equal ones say nothing


def test_tokenizer_gives_the_text_back(tmp_path):
    tokenizer = world.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert 100 <= len(tokenizer) <= 200
    for review in reviews(300, seed=5):
        ids = tokenizer(review)["input_ids"]
        assert len(ids) == len(review.split())
        assert min(ids) > 2
        assert tokenizer.decode(ids) == loaded.decode(loaded(review)["input_ids"]) == review
    assert tokenizer("the quick plot")["input_ids"][1] == 2
