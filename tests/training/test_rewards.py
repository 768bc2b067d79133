"""Reward functions, reward models, and their errors."""

import asyncio
import itertools

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.data.encoding import encode_preferences, encode_prompts, pad_left, pad_right
from rlhf_fast.lm.loading import load_scorer, set_score_offset
from rlhf_fast.lm.passes import sequence_scores
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.init import train_bpe
from rlhf_fast.training.evaluation import compared_prompts, completion_rewards, prompt_columns, scored_prompts
from rlhf_fast.training.rewards import Answers, Reward, decode_responses, load_function
from rlhf_fast.training.stopped import Stopped
from tests.support.models import random_policy

CPU = torch.device("cpu")


@pytest.fixture
def rollout(tokenizer) -> Rollout:
    prompts = tokenizer(["the film was", "the plot was"], add_special_tokens=False)["input_ids"]
    good, bad = (tokenizer(text)["input_ids"] for text in ("really good .", "bad ."))
    response_ids = torch.tensor([[*good, 1], [*bad, 0, 0]])
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    zeros = torch.zeros(2, 4)
    prompt_ids = torch.tensor(prompts)
    done = torch.tensor([True, False])
    return Rollout(prompt_ids, torch.ones_like(prompt_ids, dtype=bool), response_ids, mask, zeros, zeros, done)


def test_decoded_completions_hold_no_special_tokens_and_no_padding(rollout, tokenizer):
    assert decode_responses(tokenizer, rollout) == ["really good .", "bad ."]


def test_function_gets_texts_and_columns(rollout, tokenizer):
    seen = {}

    def score(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [len(c) for c in completions]

    columns = {"prompt": ["the film was", "the plot was"], "topic": ["film", "plot"]}
    scores = Reward(score, tokenizer, CPU)(rollout, columns)
    assert scores.tolist() == [13.0, 5.0]
    assert seen == {
        "prompts": ["the film was", "the plot was"],
        "completions": ["really good .", "bad ."],
        "topic": ["film", "plot"],
        "completion_ids": [[*tokenizer("really good .")["input_ids"], 1], tokenizer("bad .")["input_ids"]],
    }


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "f: expected 2 scores, got 1"),
        ([1.0, 1e39], "f: expected scores that float32 holds, got 1e\\+39 for row 1"),
        ([1.0, 10**400], r"f: expected finite scores, got 10{79}\.\.\. for row 1"),
        ([1.0, float("nan")], "f: expected finite scores, got nan for row 1"),
        (None, "f: expected 2 scores, got None"),
        ("ab", "f: expected 2 scores, got 'ab'"),
        (["1", "2"], "f: expected finite scores, got '1' for row 0"),
        ([1.0, None], "f: expected finite scores, got None for row 1"),
        (torch.ones(2, 2), r"f: expected finite scores, got tensor\(\[1., 1.\]\) for row 0"),
        ({0: 1.0, 1: 2.0}, "f: expected 2 scores, got {0: 1.0, 1: 2.0}$"),
        ({1.0, 2.0}, "f: expected 2 scores, got {1.0, 2.0}$"),
        (b"ab", "f: expected 2 scores, got b'ab'$"),
        (bytearray(b"ab"), r"f: expected 2 scores, got bytearray\(b'ab'\)$"),
        (torch.ones(()), r"f: expected 2 scores, got tensor\(1.\)$"),
        (numpy.float32(1), "f: expected 2 scores, got "),
        (itertools.count(), "f: expected 2 scores, got more$"),
        ((x for x in [1.0]), "f: expected 2 scores, got 1$"),
        ([1.0, b"1"], "f: expected finite scores, got b'1' for row 1$"),
        ([memoryview(b"1"), 1.0], "f: expected finite scores, got <memory"),
        (numpy.array(["1", "2"]), "f: expected finite scores, got "),
        (numpy.array([b"1", b"2"]), "f: expected finite scores, got "),
        ([numpy.array("1"), 1.0], "f: expected finite scores, got "),
        ([1.0, 1j], "f: expected finite scores, got 1j for row 1$"),
        ([1.0, 1e308], r"f: expected scores that float32 holds, got 1e\+308 for row 1$"),
        ([1.0, 10**5000], "f: expected finite scores, got a value of class int that cannot be shown for row 1$"),
        ([1.0, "x" * 999], r"f: expected finite scores, got 'x{79}\.\.\. for row 1$"),
        ([1.0, {}], "f: expected finite scores, got {} for row 1$"),
    ],
)
def test_bad_scores_are_errors(rollout, tokenizer, returned, message):
    def f(prompts, completions):
        return returned

    with pytest.raises(ValueError, match=f"^reward {message}"):
        Reward(f, tokenizer, CPU)(rollout, {"prompt": ["a", "b"]})


def test_a_function_may_change_its_arguments(rollout, tokenizer):
    """Neither the next function nor the next call sees what it did, in lists of lists and dicts too."""
    columns = {"prompt": ["a", "b"], "parts": [["x"], ["y"]], "facts": [{"n": [1]}, {"n": [2]}]}
    seen = []

    def greedy(prompts, completions, completion_ids, parts, facts):
        seen.append([list(prompts), list(completions), sum(map(len, completion_ids)), str(parts), str(facts)])
        parts[0].clear(), facts[1]["n"].pop(), completion_ids[0].clear()
        return [float(len(prompts.pop() + completions.pop())) for _ in range(2)]

    score = Reward([greedy, greedy], tokenizer, CPU)
    assert score(rollout, columns).tolist() == score(rollout, columns).tolist()
    assert len(seen) == 4 and all(given == seen[0] for given in seen)
    assert columns == {"prompt": ["a", "b"], "parts": [["x"], ["y"]], "facts": [{"n": [1]}, {"n": [2]}]}


@pytest.mark.parametrize("returned", [torch.ones(2), torch.ones(2, 1), numpy.ones(2), (1, True)])
def test_scores_of_any_kind_of_number(rollout, tokenizer, returned):
    score = Reward(lambda prompts, completions: returned, tokenizer, CPU)
    assert score(rollout, {"prompt": ["a", "b"]}).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_columns_named_like_an_argument_are_errors(rollout, tokenizer, name):
    reward = Reward(lambda prompts, completions, **columns: [0.0] * 2, tokenizer, CPU)
    with pytest.raises(ValueError, match=f"^reward <lambda>: expected no column .* got {name}$"):
        reward(rollout, {"prompt": ["a", "b"], name: ["c", "d"]})


ROWS = {"prompt": ["the film was", "the plot was"], "answer": ["a", "bb"]}


@pytest.mark.parametrize(
    "score",
    [
        lambda completions, answer, **kwargs: [len(c) + len(a) for c, a in zip(completions, answer, strict=True)],
        lambda answer, completions: [len(c) + len(a) for c, a in zip(completions, answer, strict=True)],
        lambda *, completions, prompts, answer, other=0: [
            len(c) + len(a) for c, a in zip(completions, answer, strict=True)
        ],
    ],
)
def test_arguments_are_given_by_name(rollout, tokenizer, score):
    assert Reward(score, tokenizer, CPU)(rollout, ROWS).tolist() == [14.0, 7.0]


def test_a_function_gets_ids_alone_where_it_names_nothing_else(rollout, tokenizer):
    assert Reward(lambda completion_ids: [len(ids) for ids in completion_ids], tokenizer, CPU)(
        rollout, ROWS
    ).tolist() == [4.0, 2.0]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda completions, solution: [0.0] * 2, r"arguments out of .*completion_ids, answer, got solution$"),
        (lambda completions, messages: [0.0] * 2, r"arguments out of .*, got messages$"),
        (lambda prompts, /: [0.0] * 2, r"arguments that can be given by name, got 'prompts' before /$"),
    ],
)
def test_arguments_that_nobody_can_give_are_errors(rollout, tokenizer, score, message):
    with pytest.raises(ValueError, match=f"^reward <lambda>: expected {message}"):
        Reward(score, tokenizer, CPU)(rollout, ROWS)


def test_messages_are_those_of_the_prompt(chat_tokenizer):
    chat = [{"role": "user", "content": "the film"}]
    rows = [{"prompt": chat}, {"prompt": "the plot"}, {"prompt": chat, "messages": "own"}]
    columns = prompt_columns(scored_prompts(rows, chat_tokenizer, 64).examples)
    assert columns["messages"] == [chat, None, "own"]
    seen = []
    reward = Reward(lambda messages: seen.append(messages) or [0.0] * 3, chat_tokenizer, CPU)
    reward.of_texts(["a", "b", "c"], columns)
    assert seen == [[chat, None, "own"]]


def test_several_rewards_are_summed_by_their_weights(rollout, tokenizer):
    def length(completions):
        return [float(len(c)) for c in completions]

    def first(completions):
        return [1.0, None]

    for weights, sums in ((None, [14.0, 5.0]), ([0.5, -2.0], [4.5, 2.5])):
        scored = Reward([length, first], tokenizer, CPU, weights=weights).judge(
            Answers(tokenizer, ROWS, rollout=rollout)
        )
        assert scored.scores.tolist() == sums and scored.scores.dtype == torch.float32
        assert scored.parts["length"].tolist() == [13.0, 5.0]
        assert scored.parts["first"].isnan().tolist() == [False, True] and scored.parts["first"].nanmean() == 1
    with pytest.raises(ValueError, match="^reward first, first: expected a score from at least one .* None for row 1$"):
        Reward([first, first], tokenizer, CPU)(rollout, ROWS)
    with pytest.raises(ValueError, match="^reward first: expected scores that float32 holds, got 1e"):
        Reward(first, tokenizer, CPU, weights=[1e300]).judge(Answers(tokenizer, ROWS, rollout=rollout))
    with pytest.raises(ValueError, match="^reward_weights: expected one for each of 2 rewards, got 1$"):
        Reward([length, first], tokenizer, CPU, weights=[1.0])


def test_a_reward_model_beside_a_function(rollout, tiny_model, tmp_path, tokenizer):
    torch.manual_seed(0)
    load_scorer(tiny_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    alone = Reward(str(tmp_path), tokenizer, CPU)
    both = Reward([lambda completions: [2.0, None], str(tmp_path)], tokenizer, CPU, weights=[1.0, 3.0])
    assert both.models.keys() == both.readers.keys() == {"reward"} and both.reading_spec == str(tmp_path)
    expected = 3 * alone(rollout, ROWS).double() + torch.tensor([2.0, 0.0])
    torch.testing.assert_close(both(rollout, ROWS).double(), expected, rtol=1e-6, atol=0)


def test_an_async_function_keeps_its_event_loop(rollout, tokenizer):
    loops = []

    async def score(completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    reward = Reward(score, tokenizer, CPU)
    assert [reward(rollout, ROWS).tolist() for _ in range(2)] == [[2.0, 2.0]] * 2
    assert loops[0] is loops[1]


def test_an_exception_names_the_function_and_the_line(rollout, tokenizer, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def f(completions):\n    return {}['a']\n")
    with pytest.raises(Stopped, match=r"^reward .*broken.py:f raised KeyError: 'a' \(broken.py, line 2\)$"):
        Reward(f"{path}:f", tokenizer, CPU)(rollout, ROWS)
    path.write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"broken.py to load, got ZeroDivisionError: .* \(broken.py, line 1\)$"):
        load_function(f"{path}:f")


def test_completions_to_compare_with_may_be_messages(chat_tokenizer):
    reward = Reward(lambda completions: list(map(len, completions)), chat_tokenizer, CPU)
    rows = [{"prompt": "a", "completion": value} for value in ("good", [{"role": "assistant", "content": "good"}])]
    examples = scored_prompts(rows, chat_tokenizer, 8).examples
    assert completion_rewards(examples, reward).tolist() == [4.0, 4.0]
    (bare,) = scored_prompts([{"prompt": "a"}], chat_tokenizer, 8).examples
    assert completion_rewards([*examples, bare], reward) is None
    with pytest.raises(ValueError, match="^completion: expected text or a list with one assistant message"):
        completion_rewards([bare._replace(columns={"completion": [{"role": "user", "content": "a"}]})], reward)


@pytest.fixture
def chat_tokenizer():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return train_bpe(["the film was good . "], 280, bos_token="<bos>", chat_template=template)


def scorer_of(tokenizer, directory, positions=64) -> str:
    torch.manual_seed(0)
    policy = random_policy("gpt2", len(tokenizer))
    policy.config.n_positions = positions
    AutoModelForCausalLM.from_config(policy.config).save_pretrained(directory)
    load_scorer(directory).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_texts_are_scored_on_the_ids_of_training(chat_tokenizer, tmp_path):
    reward = Reward(scorer_of(chat_tokenizer, tmp_path), chat_tokenizer, CPU, max_prompt_length=8)
    message = [{"role": "user", "content": "the film was good"}]
    for prompt in (message, "the film"):
        row = {"prompt": prompt, "chosen": "good", "rejected": "bad"}
        (pair,) = encode_preferences([row], chat_tokenizer, 64, 8).examples
        (example,) = encode_prompts([row], chat_tokenizer, 8).examples
        sequences = Sequences(*pad_left([pair.prompt_ids], 0), *pad_right([pair.chosen_ids], 0))
        expected = sequence_scores(reward.models["reward"], sequences)
        columns = {"prompt": [example.prompt]}
        assert torch.equal(reward.of_texts(["good"], columns), expected)
        assert torch.equal(
            reward.of_texts(["bad"], columns, pairs=[(pair.prompt_ids, pair.chosen_ids)]), expected
        )  # the ids win
        (example,) = compared_prompts([{**row, "completion": "good"}], chat_tokenizer, 8)
        assert torch.equal(completion_rewards([example], reward), expected)


def test_completions_to_compare_with_follow_the_prompt_as_the_policy_gets_it(chat_tokenizer, tmp_path):
    """Also where the chat template writes no BOS, which the text cannot tell from one that has to be put there."""
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.removeprefix("{{ bos_token }}")
    reward = Reward(scorer_of(chat_tokenizer, tmp_path), chat_tokenizer, CPU)
    row = {"prompt": [{"role": "user", "content": "the film"}], "completion": "good"}
    (example,) = compared_prompts([row], chat_tokenizer, 64)
    assert chat_tokenizer.bos_token_id not in example.prompt_ids
    answer = chat_tokenizer("good", add_special_tokens=False)["input_ids"] + [chat_tokenizer.eos_token_id]
    expected = sequence_scores(
        reward.models["reward"], Sequences(*pad_left([example.prompt_ids], 0), *pad_right([answer], 0))
    )
    assert torch.equal(completion_rewards([example], reward), expected)


def test_another_tokenizer_does_not_read_the_policys_bos(chat_tokenizer, tmp_path):
    policys = train_bpe(["the film was good . "], 280, bos_token="<s>")
    reward = Reward(scorer_of(chat_tokenizer, tmp_path), policys, CPU)

    def prompt_ids(prompt):
        return reward.parts[0].tokenize(Answers(policys, {"prompt": [prompt]}, texts=["a"])).prompt_ids

    for prompt in ("<s>the film", "the film"):
        assert torch.equal(prompt_ids(prompt), prompt_ids("<bos>the film"))


def test_long_texts_are_cut_to_what_a_reward_model_can_read(rollout, tokenizer, chat_tokenizer, tmp_path):
    spec = scorer_of(chat_tokenizer, tmp_path, positions=16)
    columns = {"prompt": ["the film was good . " * 40, "<bos>the plot"]}
    for length in (6, 400):
        reward = Reward(spec, tokenizer, CPU, max_prompt_length=length)
        assert reward.readers == {}
        assert reward(rollout, columns).isfinite().all()
    seen = (
        Reward(spec, tokenizer, CPU, max_prompt_length=6)
        .parts[0]
        .tokenize(Answers(tokenizer, columns, texts=["a", "b"], finished=[True, False]))
    )
    assert seen.prompt_mask.sum(dim=1).max() == 6
    assert seen.prompt_ids[0, 0] == chat_tokenizer.bos_token_id
    assert (seen.prompt_ids == chat_tokenizer.bos_token_id).sum().item() == 2


def test_reward_model_scores_token_ids(rollout, tiny_model, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = load_scorer(tiny_model)
    set_score_offset(model, 0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = Reward(str(tmp_path), tokenizer, CPU, micro_batch_size=1)(rollout, {"prompt": ["", ""]})
    with torch.no_grad():
        torch.testing.assert_close(scores, sequence_scores(model, rollout.sequences), rtol=1e-5, atol=1e-5)
    columns = {"prompt": ["the film was", "the plot was"]}
    of_texts = Reward(str(tmp_path), tokenizer, CPU).of_texts(["really good .", "bad ."], columns, [True, False])
    torch.testing.assert_close(of_texts, scores, rtol=1e-5, atol=1e-5)
    ended = Reward(str(tmp_path), tokenizer, CPU).of_texts(["really good .", "bad ."], columns)
    torch.testing.assert_close(ended[0], scores[0], rtol=1e-5, atol=1e-5)
    assert abs(ended[1] - scores[1]) > 1e-4


def test_reward_model_with_another_tokenizer_reads_the_text(rollout, tiny_model, tmp_path, tokenizer):
    other = train_bpe(["the film was really good . the plot was bad ."] * 20, 300)
    torch.manual_seed(0)
    model = load_scorer(tiny_model)
    model.resize_token_embeddings(len(other), mean_resizing=False)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    reward = Reward(str(tmp_path), tokenizer, CPU)
    scores = reward(rollout, {"prompt": ["the film was", "the plot was"]})
    own = load_tokenizer(tmp_path)
    with torch.no_grad():
        for row, (text, done) in enumerate((("really good .", True), ("bad .", False))):
            prompt = own(["the film was", "the plot was"][row])["input_ids"]
            ids = torch.tensor([prompt + own(text)["input_ids"] + [own.eos_token_id] * done])
            hidden = model.base_model(ids).last_hidden_state[0, -1]
            torch.testing.assert_close(scores[row], (model.score.weight @ hidden)[0], rtol=1e-4, atol=1e-4)


def test_a_language_model_is_no_reward_model(tiny_model, tokenizer):
    with pytest.raises(ValueError, match=r"reward: expected a reward model .*, got LlamaForCausalLM at"):
        Reward(tiny_model, tokenizer, CPU)
