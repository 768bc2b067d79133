"""What stages make of references, reward models of other tokenizers, rankings, and rows with columns of two kinds."""

import json

import pytest
import torch

from rlhf_fast.config import DPOConfig, PairsConfig, PPOConfig, RewardConfig, RLOOConfig
from rlhf_fast.data.encoding import (
    PreferenceExample,
    RankingExample,
    encode_preferences,
    encode_sft,
    encode_unpaired,
)
from rlhf_fast.data.rows import load_rows, load_unpaired
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.loading import load_scorer, trained_here
from rlhf_fast.lm.passes import sequence_scores
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import dpo, pairs, ppo, reward, rloo
from rlhf_fast.stages.init import init_model, train_bpe
from rlhf_fast.stages.reward import preference_loss
from tests.support.models import model_config
from tests.support.stages import REWARD, stage_config, write_rows


@pytest.fixture(scope="module")
def other_words(tmp_path_factory, tiny_model) -> str:
    """A reward model of the policy's shape whose tokenizer gives two words each other's ids."""
    directory = tmp_path_factory.mktemp("other")
    tokenizer = load_tokenizer(tiny_model)
    settings = model_config("llama", len(tokenizer))
    del settings["vocab_size"]
    init_model(settings, tokenizer, directory / "model", seed=1)
    load_scorer(directory / "model").save_pretrained(directory / "reward")
    tokenizer.save_pretrained(directory / "reward")
    path = directory / "reward" / "tokenizer.json"
    state = json.loads(path.read_text())
    words = state["model"]["vocab"]
    words["film"], words["plot"] = words["plot"], words["film"]
    path.write_text(json.dumps(state))
    return str(directory / "reward")


@pytest.mark.parametrize(("module", "cls"), [(dpo, DPOConfig), (rloo, RLOOConfig)])
def test_a_reference_with_another_tokenizer_is_refused(module, cls, files, tiny_model, other_words, tmp_path):
    config = stage_config(cls, files, tiny_model, tmp_path, reference=other_words)
    with pytest.raises(ValueError, match="^reference: expected a model with the policy's tokenizer, found another in"):
        module.train(config)


def test_a_value_model_starts_from_the_policy_where_the_reward_model_reads_other_tokens(
    files,
    tiny_model,
    other_words,
    tmp_path,
):
    options = {"reward": other_words, "value_learning_rate": 1e-12, "steps": 1, "epochs": 1}
    ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "out", **options))
    trunk = load_scorer(tmp_path / "out" / "value").base_model.embed_tokens.weight
    torch.testing.assert_close(trunk, load_scorer(tiny_model).base_model.embed_tokens.weight)
    with pytest.raises(ValueError, match="^value_model: expected a model with the policy's tokenizer"):
        ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "none", value_model=other_words))


def test_rankings_are_centred_over_the_pairs_they_are_ranked_by(tiny_model):
    torch.manual_seed(0)
    model = load_scorer(tiny_model)
    pairs = [PreferenceExample([5, 6], [7, 8, 1], [9, 1], None), PreferenceExample([5], [10, 1], [7, 1], None)]
    rankings = [RankingExample(e.prompt_ids, [e.rejected_ids, e.chosen_ids], [1, 0]) for e in pairs]
    for coef in (0.0, 0.7):
        losses = [preference_loss(model, batch, 0, coef).loss for batch in (pairs, rankings)]
        torch.testing.assert_close(losses[1], losses[0])
    three = RankingExample([5, 6], [[7, 1], [8, 1], [9, 1]], [0, 2, 2])
    plain, centred = (preference_loss(model, [three, rankings[0]], 0, coef).loss for coef in (0.0, 0.7))
    with torch.no_grad():
        a, b, c = sequence_scores(model, reward._sequences(model, [([5, 6], ids) for ids in three.completion_ids], 0))
        d, e = sequence_scores(
            model, reward._sequences(model, [([5, 6], ids) for ids in rankings[0].completion_ids], 0)
        )
    torch.testing.assert_close(centred - plain, 0.7 * ((a + b) ** 2 + (a + c) ** 2 + (d + e) ** 2) / 3)


@pytest.mark.parametrize("ranked", [False, True])
def test_ranks_make_a_ranking(ranked, files, tiny_model, tmp_path):
    extra = {"completions": ["good .", "bad ."]} | ({"ranks": [0, 1]} if ranked else {})
    rows = [{"prompt": "the film was", "chosen": "good .", "rejected": "bad .", **extra}] * 16
    config = stage_config(RewardConfig, files, tiny_model, tmp_path, train_data=write_rows(tmp_path / "a.jsonl", rows))
    examples = encode_stage("reward", config.train_data, load_tokenizer(tiny_model), config).examples
    assert {type(example) for example in examples} == {RankingExample if ranked else PreferenceExample}
    bare = write_rows(tmp_path / "b.jsonl", [{"prompt": "the film was", "completions": ["good .", "bad ."]}])
    with pytest.raises(ValueError, match="line 1: missing ranks; a row of kind ranking"):
        encode_stage("reward", bare, load_tokenizer(tiny_model), config)


@pytest.mark.parametrize("evaluated", [False, True])
def test_dpo_counts_a_reference_that_evaluation_keeps(evaluated, files, tiny_model, tmp_path):
    options = {"eval_data": files["prompts"], "eval_steps": 6, "eval_reward": REWARD} if evaluated else {}
    dpo.train(stage_config(DPOConfig, files, tiny_model, tmp_path, **options))
    held = json.loads((tmp_path / "run.json").read_text())["static_bytes"]
    assert ("reference" in held) == evaluated
    assert not evaluated or held["reference"] == {"weights": held["policy"]["weights"], "gradients": 0, "optimizer": 0}


def test_a_reward_model_of_a_family_without_a_classifier(files, tmp_path):
    tokenizer = train_bpe(["the film was good . "] * 20, 280)
    settings = model_config("llama", len(tokenizer)) | {"model_type": "granite", "max_position_embeddings": 256}
    del settings["vocab_size"]
    init_model(settings, tokenizer, tmp_path / "granite", seed=1)
    config = stage_config(RewardConfig, files, str(tmp_path / "granite"), tmp_path / "out")
    reward.train(config)
    trained = load_scorer(tmp_path / "out", head=None)
    assert type(trained).__name__ == "GraniteForSequenceClassification" and trained_here(trained)


@pytest.mark.parametrize("longest", [2, 12])
def test_no_training_puts_an_end_behind_unfinished_samples(longest, files, tiny_model, tmp_path):
    config = PairsConfig(
        model=tiny_model,
        prompts=files["prompts"],
        reward=REWARD,
        output=str(tmp_path / "pairs.jsonl"),
        max_response_length=longest,
    )
    pairs.sample(config)
    tokenizer = load_tokenizer(tiny_model)
    rows = load_rows(config.output, "preference")
    eos = tokenizer.eos_token_id
    examples = encode_preferences(rows, tokenizer, 64, 64).examples
    ends = {
        "chosen": [e.chosen_ids[-1] == eos for e in examples],
        "rejected": [e.rejected_ids[-1] == eos for e in examples],
    }
    for name, ended in ends.items():
        assert [row.get(f"{name}_finished", True) for row in rows] == ended and not all(ended)
        for row, end in zip(rows, ended, strict=True):  # a sample without an end has all the tokens there may be
            assert end or len(tokenizer(row[name], add_special_tokens=False)["input_ids"]) <= longest
    unpaired = load_unpaired(rows)
    own = [e.completion_ids[-1] == eos for e in encode_unpaired(unpaired, tokenizer, 64, 64).examples]
    assert own == [end for pair in zip(ends["chosen"], ends["rejected"], strict=True) for end in pair]
    trained = [e.input_ids[-1] == eos for e in encode_sft(unpaired, tokenizer, 64, 64).examples]
    assert trained == own
