"""The comparison with other trainers: what counts as equal, who takes turns, which bars are met; TRL is not needed."""

import dataclasses
import gzip
import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bench.trainers import cases, compare, replay, report, starts
from rlhf_fast.data.padding import epoch_batches
from rlhf_fast.lab.world import build_tokenizer
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.rollout.generate import eos_token_ids
from rlhf_fast.stages.init import train_bpe


def case_of(method):
    return next(case for case in cases.CASES if case.method == method)


def test_numbers_are_equal_within_the_tolerance_and_no_further():
    equality = cases.Equality
    case = dataclasses.replace(
        case_of("sft"),
        equalities=(
            equality("loss", "a", "b"),
            equality("per token", "sum", "{reward} mean", per_token=True),
            equality("mean of advantages", "nothing", "almost", scale=1.0),
        ),
    )
    ours, theirs = {"a": 2.0, "sum": 80.0, "nothing": 0.0}, {"b": 2.00019, "true_reward mean": 2.0003, "almost": 9e-5}
    start = starts.demo_with({})
    rows = compare.equalities(case, start, ours, theirs)
    assert [row["met"] for row in rows] == ["yes", "NO", "yes"]
    assert rows[0]["relative difference"] == pytest.approx(0.00019 / 2.00019)
    assert rows[1]["ours"] == pytest.approx(2.0)
    with pytest.raises(KeyError, match="almost"):
        compare.equalities(case, start, ours, {"b": 2.0, "true_reward mean": 2.0})


def test_gradients_of_one_norm_and_another_direction_are_not_equal():
    theirs = {"policy.a": torch.tensor([3.0, 0.0]), "policy.b": torch.tensor([[4.0]]), "value.a": torch.ones(4)}
    same = {name: x / 8 for name, x in theirs.items()}
    rows = compare.gradient_equalities(same, theirs, factor=8.0)
    assert [(row["quantity"], row["met"]) for row in rows] == [
        ("gradient norm, policy", "yes"),
        ("gradient, policy: distance", "yes"),
        ("gradient norm, value", "yes"),
        ("gradient, value: distance", "yes"),
    ]
    assert rows[0]["theirs"] == 5.0
    turned = theirs | {"policy.a": torch.tensor([0.0, 3.0])}
    norm, distance, *_ = compare.gradient_equalities(turned, theirs, factor=1.0)
    assert norm["met"] == "yes" and distance["met"] == "NO"
    assert distance["relative difference"] == pytest.approx(18**0.5 / 5)
    with pytest.raises(ValueError, match="gradients: .* on both sides, got on one only: value.a"):
        compare.gradient_equalities({k: v for k, v in theirs.items() if k != "value.a"}, theirs, 1.0)


def test_who_begins_changes_from_round_to_round():
    log = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def go(self):
            log.append(self.name)

        def hear(self):
            return {"seconds": float(len(log)), "cpu_seconds": 1.0}

    samples = compare.take_turns({"a": Fake("a"), "b": Fake("b")}, rounds=3, steps=2)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert samples == {
        "seconds": {"a": [0.5, 2.0, 2.5], "b": [1.0, 1.5, 3.0]},
        "cpu_seconds": {"a": [0.5, 0.5, 0.5], "b": [0.5, 0.5, 0.5]},
    }


def interpreter(path: Path, trl: str) -> str:
    """A stand-in for the Python of an environment with this version of TRL."""
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {trl}; else exec {sys.executable} "$@"; fi\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_an_environment_without_the_rival_is_named(tmp_path):
    absent = compare.why_absent
    assert absent(interpreter(tmp_path / "right", "1.16.0"), "TRL 1.16.0") == ""
    assert absent(None, "TRL 1.12.0") == "no environment with trl==1.12.0 was named"
    wrong = interpreter(tmp_path / "wrong", "1.15.0")
    assert absent(wrong, "TRL 1.16.0") == f"expected trl==1.16.0 in the environment of {wrong}, found 1.15.0"


def result(**changes):
    quantiles = {"median": 1.0, "p20": 0.9, "p80": 1.1}
    return {
        "trainer": "DPOTrainer",
        "dtype": "fp32",
        "rival": "TRL 1.16.0",
        "bar": 1.3,
        "absent": "",
        "environments": {"rlhf_fast": {"torch": "2.13.0"}, "TRL 1.16.0": {"torch": "2.13.0"}},
        "seconds_per_step": {"rlhf_fast": quantiles, "TRL 1.16.0": quantiles},
        "cpu_seconds_per_step": {"rlhf_fast": quantiles, "TRL 1.16.0": quantiles},
        "speedup_seconds": {"median": 1.3, "p20": 1.2, "p80": 1.4},
        "speedup_cpu_seconds": {"median": 1.5, "p20": 1.2, "p80": 1.6},
        "peak_bytes": {"rlhf_fast": 100, "TRL 1.16.0": 100},
        "equalities": [{"quantity": "loss", "relative difference": 1e-5, "met": "yes"}],
        **changes,
    }


def test_bars():
    def met(**changes):
        return [row["met"] for row in report.bar_rows([result(**changes)])]

    assert met() == ["yes", "yes", "yes"]
    assert met(speedup_seconds={"median": 1.29, "p20": 1.2, "p80": 1.4}) == ["NO", "yes", "yes"]
    assert met(peak_bytes={"rlhf_fast": 101, "TRL 1.16.0": 100}) == ["yes", "NO", "yes"]
    unequal = [{"quantity": "loss", "relative difference": 0.5, "met": "NO"}]
    assert met(equalities=unequal) == ["yes", "yes", "NO"]
    assert met(equalities=unequal, dtype="bf16 autocast") == ["yes", "yes"]
    shown = report.equality_rows([result(equalities=unequal, dtype=dtype) for dtype in ("fp32", "bf16 autocast")])
    assert [row["met"] for row in shown] == ["NO", "no bar"]
    assert met(absent="no environment with trl==1.16.0 was named") == ["NO", "NO", "NO"]


def test_completions_are_replayed_by_prompt_in_their_order(tmp_path):
    torch.save([([1, 2], [3]), ([4], [5]), ([1, 2], [6, 7])], tmp_path / "completions.pt")
    completions = replay.Completions(str(tmp_path / "completions.pt"))
    assert [completions.of(prompt) for prompt in ([1, 2], [1, 2], [4])] == [[3], [6, 7], [5]]
    with pytest.raises(KeyError):
        completions.of([9])


def test_the_rival_gets_the_rows_of_our_first_batches_in_our_order():
    tokenizer, steps = build_tokenizer(), 3
    for method in ("sft", "reward", "dpo", "rloo", "ppo"):
        case = case_of(method)
        ours, theirs = cases._rows(case, starts.demo_with({}), steps)
        per_step = case.batch_size // case.settings.get("group_size", 1)
        assert len(ours) == len(theirs) == steps * per_step
        order = [row for batch in epoch_batches(len(ours), per_step, seed=0, epoch=0) for row in batch]
        for i in (0, per_step, -1):
            row, encoded = ours[order[i]], theirs[i]
            whole = [f"{row['prompt']} {row[key]} <eos>" for key in ("completion", "chosen", "rejected") if key in row]
            shown = {
                "sft": lambda e: [tokenizer.decode(e["input_ids"])],
                "reward": lambda e: [tokenizer.decode(e["chosen_ids"]), tokenizer.decode(e["rejected_ids"])],
                "dpo": lambda e: [f"{e['prompt']}{e[key]} <eos>" for key in ("chosen", "rejected")],
                "rloo": lambda e: [e["prompt"]],
                "ppo": lambda e: [tokenizer.decode(e["input_ids"])],
            }[method](encoded)
            assert shown == (whole or [row["prompt"]])
            if method == "sft":
                trained = [token for token in encoded["labels"] if token != -100]
                assert tokenizer.decode(trained) == f"{row['completion']} <eos>"


def test_two_contenders_in_processes_of_their_own(tiny_model, tmp_path, monkeypatch):
    """Ours against itself: the same first step to the bit, one sample per turn, a peak of some hundred MiB each."""
    case = dataclasses.replace(case_of("sft"), batch_size=4, steps_per_turn=1, warmup=1)
    write_specs = compare.write_specs

    def both_ours(*arguments, **options):
        paths = write_specs(*arguments, **options)
        spec = json.loads(paths["theirs"].read_text())
        spec["ours"]["options"]["output_dir"] = spec["output_dir"]
        paths["theirs"].write_text(json.dumps(spec))
        return paths

    monkeypatch.setattr(compare, "write_specs", both_ours)
    monkeypatch.setitem(compare.SCRIPTS, case.rival, "run_ours.py")
    python = interpreter(tmp_path / "python", "1.16.0")
    found = compare.run(case, python, starts.demo_with({"init": tiny_model}), 2, tmp_path / "sft")
    assert found["absent"] == ""
    assert {row["quantity"] for row in found["equalities"]} == {
        "loss", "gradient norm, policy", "gradient, policy: distance"
    }  # fmt: skip
    assert all(row["relative difference"] == 0 for row in found["equalities"])
    assert found["equalities"][0]["ours"] > 1 and found["equalities"][1]["ours"] > 0.1
    assert all(100 * 2**20 < peak < 4 * 2**30 for peak in found["peak_bytes"].values())
    assert all(0 < q["median"] < 60 for q in found["seconds_per_step"].values())
    assert found["environments"][case.rival]["torch"] == torch.__version__


def test_a_contender_that_fails_says_why(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such model')")
    contender = compare.Contender(sys.executable, str(script), tmp_path / "spec.json")
    with pytest.raises(RuntimeError, match=r"fails.py ended early \(exit code 1\):\nno such model"):
        contender.hear()


def test_a_checkpoint_is_trained_on_its_own_rows(tmp_path):
    """The rival's rows are ours, with the template's text in the prompt and no row longer than the bound."""
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    chat_tokenizer = train_bpe(["[ab]>ba"] * 4, 280, chat_template=template)
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    chat_tokenizer.save_pretrained(model)
    prompt = [{"role": "user", "content": "ab"}]
    answer = [{"role": "assistant", "content": "ba"}]
    files = {
        "sft": [{"messages": [*prompt, *answer]}, {"messages": [{"role": "user", "content": "ab " * 400}, *answer]}],
        "pairs": [{"prompt": prompt, "chosen": answer, "rejected": [answer[0] | {"content": "ab"}]}],
        "prompts": [{"prompt": prompt}],
    }
    for name, rows in files.items():
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    start = starts.checkpoint_with({}, model, data)
    text = chat_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert start.rows("sft", 3) == [{"prompt": text, "completion": "ba"}] * 3
    assert start.rows("dpo", 1) == [{"prompt": text, "chosen": "ba", "rejected": "ab"}]
    assert start.rows("rloo", 2) == start.rows("ppo", 2) == [{"prompt": text}] * 2
    case = case_of("dpo").at_real_size()
    assert (case.bar, case.batch_size, case.steps_per_turn) == (2.5, 8, 1)
    ours, theirs = cases._rows(case, start, 2)
    assert ours == theirs and len(ours) == 16


def test_a_checkpoint_whose_pad_token_is_eos_gets_a_pad_token_of_its_own():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    starts.give_pad_of_its_own(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.pad_token in tokenizer.all_special_tokens


def test_nothing_ends_a_completion_of_an_endless_model(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "model").mkdir()
    load_policy(tiny_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = starts.without_end(load_policy, tmp_path / "model", tmp_path / "endless")
    model, endless = load_policy(path), AutoTokenizer.from_pretrained(path)
    assert [n for n in eos_token_ids(model, endless) if n < model.config.vocab_size] == []
