"""Reward functions, reward models, and their errors."""

import pytest
import torch

from rlhf_fast.models import load_scorer, load_tokenizer, sequence_scores, set_score_offset
from rlhf_fast.rewards import Reward, decode_responses, load_function
from rlhf_fast.rollout import Rollout
from rlhf_fast.tokenizers import train_bpe

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
    }


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "expected 2 scores, got 1"), ([1.0, float("nan")], "expected finite scores, got nan for row 1")],
)
def test_bad_scores_are_errors(rollout, tokenizer, returned, message):
    with pytest.raises(ValueError, match=message):
        Reward(lambda prompts, completions: returned, tokenizer, CPU)(rollout, {"prompt": ["a", "b"]})


def test_function_from_a_file_and_from_a_module(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    assert load_function(f"{path}:length")([""], ["four"]) == [4.0]
    function = load_function("rlhf_fast.world:true_reward")
    assert function(["the film was"], ["good ."]) == [pytest.approx(1 / (1 + 2.718281828459045**-0.6))]
    with pytest.raises(ValueError, match=r"a function 'width' in .*which defines \['length'\]"):
        load_function(f"{path}:width")
    with pytest.raises(ValueError, match="with an existing file, got 'absent.py:f'"):
        load_function("absent.py:f")
    with pytest.raises(ValueError, match="got 'no_such_package:f'"):
        load_function("no_such_package:f")


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
