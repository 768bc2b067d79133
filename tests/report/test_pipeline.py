"""The pipeline's plan, a whole run on a tiny model, pairs, and evaluation."""

import dataclasses
import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.config import PairsConfig, ReMaxConfig
from rlhf_fast.data import rows as data_rows
from rlhf_fast.data.encoding import PromptExample, encode_prompts, load_rows
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import response_logits
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.report import pipeline
from rlhf_fast.report.reuse import make_pairs
from rlhf_fast.stages import pairs
from rlhf_fast.stages.online import Online
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.evaluation import Evaluator, prompt_columns, wins
from rlhf_fast.training.learner import Learner, take_step
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.optimizers import lr_factor
from rlhf_fast.training.rewards import Reward
from rlhf_fast.training.tally import Tally
from rlhf_fast.training.tensor_bytes import TensorBytes
from tests.support.models import random_policy, random_sequences
from tests.support.pipelines import pipeline_config
from tests.support.stages import REWARD, shortness, stage_config

TRUE_REWARD = "rlhf_fast.world:true_reward"


def test_plan_hands_each_stage_what_the_one_before_made(files, tiny_model, tmp_path):
    plan = pipeline.make_plan(pipeline_config(files, tiny_model, tmp_path, ppo={"steps": 7, "seed": 9}))
    assert list(plan) == ["sft", "pairs", "reward", "ppo", "remax", "reinforce", "rloo", "dpo"]
    out = str(tmp_path)
    assert (plan["sft"].model, plan["sft"].output_dir, plan["sft"].seed) == (tiny_model, f"{out}/sft", 5)
    assert (plan["pairs"].model, plan["pairs"].output) == (f"{out}/sft", f"{out}/pairs.jsonl.gz")
    assert (plan["reward"].train_data, plan["reward"].eval_data) == (f"{out}/pairs.jsonl.gz", plan["pairs"].eval_output)
    for name in ("ppo", "remax", "reinforce", "rloo"):
        assert (plan[name].model, plan[name].reward) == (f"{out}/sft", f"{out}/reward")
    assert (plan["ppo"].steps, plan["ppo"].seed, plan["remax"].steps, plan["remax"].seed) == (7, 9, 2, 5)
    assert plan["dpo"].train_data == f"{out}/pairs.jsonl.gz"
    assert plan["rloo"].group_size == 2
    config = pipeline_config(files, tiny_model, tmp_path, methods=["grpo"], grpo={"group_size": 4})
    plan = pipeline.make_plan(config)["grpo"]
    assert (plan.model, plan.reward, plan.group_size, plan.steps) == (f"{out}/sft", f"{out}/reward", 4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["ppo", "gspo"]}, "methods: expected some of .*, got 'gspo'"),
        ({"common": {"kl_coeff": 0.1}}, "common: unknown key 'kl_coeff'"),
        ({"ppo": {"epoch": 2}}, "section 'ppo': unknown key 'epoch', did you mean 'epochs'"),
        ({"sft": {}}, "section 'sft': missing 'train_data'"),
        ({"remax": {"steps": "many"}}, "section 'remax': steps: expected int, got 'many'"),
    ],
)
def test_config_errors_show_before_anything_runs(options, message, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        pipeline.run(pipeline_config(files, tiny_model, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_whole_pipeline_and_its_resumption(files, tiny_model, tmp_path, capsys):
    config = pipeline_config(files, tiny_model, tmp_path)
    pipeline.run(config)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["methods"]) == ["PPO", "ReMax", "REINFORCE", "RLOO", "DPO"]
    starts = {json.dumps(read_metrics(tmp_path / m / "metrics.jsonl")[0]["eval/reward"]) for m in config.methods}
    assert len(starts) == 1  # same start, same prompts, same random numbers
    assert "<svg" in (tmp_path / "report.html").read_text() or "svg+xml" in (tmp_path / "report.html").read_text()
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"reward_kl.png", "step_time.png", "static_memory.png"}
    assert "What each method bought" in capsys.readouterr().out
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/run.json")}
    (tmp_path / "dpo" / "run.json").unlink()
    pipeline.run(dataclasses.replace(config, resume=True))
    changed = {p.parent.name for p in tmp_path.glob("*/run.json") if stamps.get(p) != p.stat().st_mtime_ns}
    assert changed == {"dpo"}


def test_pairs_follow_bradley_terry(files, tiny_model, tmp_path):
    outputs = {}
    for scale in (0.5, 50.0):
        target = tmp_path / f"{scale}.jsonl.gz"
        pairs.sample(
            PairsConfig(
                model=tiny_model,
                prompts=files["prompts"],
                reward=REWARD,
                output=str(target),
                scale=scale,
                eval_output=str(tmp_path / f"{scale}_eval.jsonl"),
                eval_rows=4,
                max_response_length=12,
            )
        )
        outputs[scale] = load_rows(target, "preference")
        assert len(outputs[scale]) + len(load_rows(tmp_path / f"{scale}_eval.jsonl", "preference")) <= 32
    decisive = [(shortness([""], [row["chosen"]])[0], shortness([""], [row["rejected"]])[0]) for row in outputs[50.0]]
    decisive = [(chosen, rejected) for chosen, rejected in decisive if abs(chosen - rejected) > 0.15]
    assert len(decisive) > 5
    assert all(chosen > rejected for chosen, rejected in decisive)
    flipped = sum(a["chosen"] == b["rejected"] for a, b in zip(outputs[0.5], outputs[50.0], strict=True))
    assert flipped > 0  # the same draws at scale 0.5 flip some labels


def test_pairs_are_written_whole_or_not_at_all(files, tiny_model, tmp_path, monkeypatch):
    target = tmp_path / "pairs.jsonl.gz"
    with gzip.open(target, "wt") as file:
        file.write("old\n")
    config = PairsConfig(
        model=tiny_model, prompts=files["prompts"], reward=REWARD, output=str(target), max_response_length=12
    )
    monkeypatch.setattr(data_rows, "json", SimpleNamespace(dumps=lambda row: 1 / 0, loads=json.loads))
    with pytest.raises(ZeroDivisionError):
        pairs.sample(config)
    assert gzip.decompress(target.read_bytes()) == b"old\n"


def test_held_out_pairs_are_written_before_the_pairs(files, tiny_model, tmp_path, monkeypatch):
    """A pipeline that is killed between the two files samples the pairs again."""
    plan, note = pipeline.make_plan(pipeline_config(files, tiny_model, tmp_path, sft=None)), tmp_path / "pairs.json"
    write, paths = pairs.write_rows, []

    def dies_at_the_second(path, rows):
        if paths:
            raise KeyboardInterrupt
        paths.append(path)
        write(path, rows)

    monkeypatch.setattr(pairs, "write_rows", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(plan["pairs"], note, resume=True)
    assert paths == [plan["pairs"].eval_output]
    monkeypatch.undo()
    for missing in ("pairs.jsonl.gz", "pairs_eval.jsonl.gz"):
        (tmp_path / missing).unlink(missing_ok=True)
        make_pairs(plan["pairs"], note, resume=True)
        assert (tmp_path / missing).is_file()
    monkeypatch.setattr(pairs, "write_rows", lambda *_: 1 / 0)
    make_pairs(plan["pairs"], note, resume=True)  # both are there: nothing is sampled


def test_sequence_kl_is_the_exact_sum_over_the_vocabulary():
    policy, reference = random_policy("llama", seed=0), random_policy("llama", seed=1)
    sequences = random_sequences()
    with torch.no_grad():
        p, q = (torch.softmax(response_logits(m, sequences).double() / 0.7, -1) for m in (policy, reference))
        expected = ((p * (p.log() - q.log())).sum(-1) * sequences.response_mask).sum(1)
        for fused in (True, False):
            own, other = (Objectives(m, temperature=0.7, fused=fused) for m in (policy, reference))
            kl = own.kl(other, sequences)
            torch.testing.assert_close(kl.sum(dim=1).double(), expected, rtol=1e-5, atol=0)
            assert torch.equal(kl == 0, ~sequences.response_mask)
            assert own.kl(own, sequences).abs().max() == 0


def test_the_exact_kl_holds_no_five_tensors_of_the_vocabulary():
    policy, reference = (random_policy("llama", seed=seed, vocab_size=4096) for seed in (0, 1))
    sequences = random_sequences(rows=16, response=12, vocab_size=4096)
    own, other = Objectives(policy), Objectives(reference)
    left_out = [*policy.parameters(), *policy.buffers(), *reference.parameters(), *reference.buffers()]
    with torch.no_grad(), TensorBytes(exclude=left_out) as counter:
        own.kl(other, sequences)
    logits = 16 * 12 * 4096 * 4
    assert counter.peak < 2.5 * logits  # two buffers; log_softmax of both models and kl_div would take five


def test_an_evaluation_takes_its_kl_in_micro_batches(tokenizer, monkeypatch):
    policy, reference = random_policy("llama", seed=0), random_policy("llama", seed=1)
    prompts = [PromptExample(prompt=str(n), prompt_ids=[3 + n, 5], columns={}) for n in range(7)]
    sizes, kl = [], Objectives.kl

    def watched(self, other, sequences):
        sizes.append(len(sequences.prompt_ids))
        return kl(self, other, sequences)

    monkeypatch.setattr(Objectives, "kl", watched)
    reward = lambda rollout, columns: torch.zeros(len(rollout.finished))  # noqa: E731
    kls = []
    for micro in (None, 3):
        evaluator = Evaluator(
            prompts, reward, reference, tokenizer, max_new_tokens=5, batch_size=5, micro_batch_size=micro
        )
        kls.append(evaluator(policy).metrics["eval/kl"])
    assert sizes == [5, 2, 3, 2, 2]
    assert kls[0] == pytest.approx(kls[1], rel=1e-6) and kls[0] > 0.01


def test_learning_rate_schedules():
    linear, cosine, constant = (lr_factor(s, 4, 14) for s in ("linear", "cosine", "constant"))
    assert [linear(step) for step in (0, 3, 4, 9, 14)] == pytest.approx([0.2, 0.8, 1.0, 0.5, 0.0])
    assert [cosine(step) for step in (4, 9, 14)] == pytest.approx([1.0, 0.5, 0.0])
    assert [constant(step) for step in (4, 14)] == [1.0, 1.0]


def test_a_gradient_that_is_not_finite_leaves_the_weights(files, tiny_model, tmp_path):
    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path)
    online = Online(config, "test")
    learner = Learner(online.policy, config, 1)
    before = [p.detach().clone() for p in learner.parameters]
    for p in learner.parameters:
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(RuntimeError, match="gradient norm is nan"):
        take_step(Tally(), {"grad_norm": learner})
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


def test_micro_batches_cover_all_rows():
    assert micro_batches(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert micro_batches(7, None) == [slice(0, 7)]


def test_columns_of_ragged_rows(tokenizer):
    from rlhf_fast.data.encoding import encode_prompts

    rows = [{"prompt": "the film", "topic": "film"}, {"prompt": "the plot"}]
    columns = prompt_columns(encode_prompts(rows, tokenizer, 16).examples)
    assert columns == {"prompt": ["the film", "the plot"], "topic": ["film", None]}


def test_win_rate_against_the_rows_completions(tiny_model):
    assert wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])).tolist() == [0, 0.5, 1]
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)

    def words(prompts, completions, **columns):
        return [float(len(completion.split())) for completion in completions]

    def evaluated(rows):
        prompts = encode_prompts(load_rows(rows, "prompt"), tokenizer, 16).examples
        reward = Reward(words, tokenizer, model.device)
        return Evaluator(prompts, reward, model, tokenizer, max_new_tokens=8, batch_size=3)(model)

    rows = [{"prompt": f"the {noun} was"} for noun in ("film", "plot", "story", "cast")]
    plain = evaluated(rows)
    assert "eval/win_rate" not in plain.metrics
    lengths = [sample["reward"] for sample in plain.samples]
    others = ["", "good " * 99, "good " * int(lengths[2]), ""]  # a win (if anything was said), a loss, a tie, a win
    metrics = evaluated([row | {"completion": text} for row, text in zip(rows, others, strict=True)]).metrics
    assert min(lengths[0], lengths[3]) > 0
    assert metrics["eval/win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert metrics["eval/reward"] == plain.metrics["eval/reward"]


def test_a_pipeline_without_sft_and_reward_model(files, tiny_model, tmp_path):
    """Methods start from `model`, learn from the reward that they name, and are measured by it."""
    options = {"sft": None, "reward": None, "pairs": {}, "methods": ["remax", "rloo"]}
    config = pipeline_config(files, tiny_model, tmp_path, **options)
    with pytest.raises(ValueError, match="section 'remax': missing 'reward'"):
        pipeline.make_plan(config)
    common = {k: v for k, v in config.common.items() if k != "eval_reward"} | {"reward": REWARD}
    config = dataclasses.replace(config, common=common)
    plan = pipeline.make_plan(config)
    assert {name: (stage.model, stage.reward) for name, stage in plan.items()} == {
        name: (tiny_model, REWARD) for name in ("remax", "rloo")
    }
    pipeline.run(config)
    report = json.loads((tmp_path / "report.json").read_text())
    name = REWARD.rpartition(":")[2].replace("_", " ")
    start, remax_row, _ = report["quality"]
    assert start["method"] == "start" and start[name] == report["quality"][0][name]
    gain = remax_row[name][0] - start[name][0]
    assert remax_row["gain over start"][0] == pytest.approx(gain, abs=1e-9)
    assert report["notes"][0].startswith(f"Every method starts from {tiny_model}")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"remax", "rloo", "plots"}


def test_offline_methods_are_measured_by_the_reward_model(files, tiny_model, tmp_path):
    config = pipeline_config(files, tiny_model, tmp_path, methods=["dpo", "remax"])
    common = {k: v for k, v in config.common.items() if k != "eval_reward"}
    plan = pipeline.make_plan(dataclasses.replace(config, common=common))
    assert plan["dpo"].eval_reward == plan["remax"].reward == f"{tmp_path}/reward"
    alone = dataclasses.replace(config, common={}, reward=None, methods=["dpo"])
    assert pipeline.make_plan(alone)["dpo"].train_data == f"{tmp_path}/pairs.jsonl.gz"
    own = pipeline.make_plan(dataclasses.replace(alone, dpo={"train_data": "own"}))["dpo"]
    assert (own.train_data, own.eval_reward) == ("own", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["dpo", "dpo"]}, "methods: expected each method once, got dpo 2 times"),
        ({"grpo": {"learning_rat": 1}}, "section 'grpo': unknown key 'learning_rat'"),
        ({"methods": [], "sft": None, "reward": None, "pairs": None, "common": None}, "methods: expected at least one"),
        ({"methods": ["dpo"], "dpo": None, "sft": None, "reward": None, "pairs": None, "common": None}, "'train_data'"),
    ],
)
def test_sections_that_are_empty_or_do_not_run(options, message, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        pipeline.make_plan(pipeline_config(files, tiny_model, tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpo": {"reference": "{out}/../nowhere"}}, "section 'dpo': reference: expected a checkpoint directory"),
        (
            {"rloo": {"reward": "{out}/../rules.py:no"}},
            "section 'rloo': reward: expected .file.py:name. with an existing",
        ),
        ({"remax": {"eval_reward": "json:no_such"}}, "section 'remax': reward: expected a function 'no_such' in json"),
        ({"reward": {"eval_data": "{out}/../rows.jsonl"}}, "section 'reward': .*rows.jsonl: no such file"),
    ],
)
def test_the_last_stage_is_looked_up_before_the_first_runs(options, message, files, tiny_model, tmp_path):
    options = {s: {k: v.format(out=tmp_path / "out") for k, v in keys.items()} for s, keys in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.run(pipeline_config(files, tiny_model, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
