"""`rlhf-fast bandit linear`: the JSON, its statistics, the files, and what may be concluded."""

import json
from statistics import mean, stdev

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.lab.bandit import report

METHODS = ["dpo", "rmb_po", "rmb_po_plus@0.5", "rmb_po_plus@2"]
FLAGS = ["--n", "20", "--ratios", "0.5", "2"]


def run(path, *flags) -> dict:
    assert cli.main(["bandit", "linear", *FLAGS, "--out", str(path), *flags]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bandit") / "results.json"
    return run(path, "--setting", "mismatched", "--seeds", "40", "--sizes", "10") | {"directory": path.parent}


def test_json_and_plots(mismatched):
    assert {key: mismatched[key] for key in ("bandit", "mode", "setting", "n")} == {
        "bandit": "linear",
        "mode": "faithful",
        "setting": "mismatched",
        "n": 20,
    }
    assert list(mismatched["methods"]) == METHODS
    for method in mismatched["methods"].values():
        assert len(method["gap"]) == 40 and min(method["gap"]) >= 0
        assert method["mean"] == pytest.approx(mean(method["gap"]), abs=1e-12)
        assert method["se"] == pytest.approx(stdev(method["gap"]) / 40**0.5, abs=1e-12)
    differences = [a - b for a, b in zip(*(mismatched["methods"][x]["gap"] for x in METHODS[:2]), strict=True)]
    z = mean(differences) / (stdev(differences) / 40**0.5)
    assert mismatched["paired_z"]["dpo - rmb_po"] == pytest.approx(z, abs=1e-9)
    assert len(mismatched["paired_z"]) == 6
    written = sorted(path.name for path in mismatched["directory"].iterdir())
    assert written == ["results.json", *(f"results_{name}.png" for name in ("gap", "n", "policies", "ratio"))]


def test_mismatched_features_make_dpo_worse_and_published_means_plausible(mismatched):
    assert mismatched["paired"]["dpo - rmb_po"]["significant"]
    assert mismatched["paired"]["dpo - rmb_po_plus@2"]["significant"]
    for name, method in mismatched["methods"].items():
        low, high = method["published_evaluation"]["interval_of_10"]
        assert name == "rmb_po_plus@0.5" or low < report.PUBLISHED["mismatched"][name] < high


def test_exact_matched_is_equal_and_nothing_is_significant(tmp_path):
    record = run(tmp_path / "exact.json", "--mode", "exact", "--seeds", "5", "--sizes", "--debug")
    assert set(record["paired_z"].values()) == {0.0} and record["largest_gradient"] < 1e-10
    assert not any(pair["significant"] for pair in record["paired"].values())
    assert list(record["error_sources"]) == METHODS
    assert record["error_sources"]["dpo"]["states"]["mean"] == pytest.approx(0, abs=1e-8)


def test_seeds_are_reproducible_and_independent_of_their_number(tmp_path, mismatched):
    few = run(tmp_path / "few.json", "--setting", "mismatched", "--seeds", "3", "--first-seed", "2023", "--sizes")
    again = run(tmp_path / "again.json", "--setting", "mismatched", "--seeds", "3", "--first-seed", "2023", "--sizes")
    assert few == again
    for name in METHODS:
        assert few["methods"][name]["gap"] == pytest.approx(mismatched["methods"][name]["gap"][2:5], abs=1e-3)


def test_paired_statistics_by_hand():
    gaps = {"a": torch.tensor([3.0, 4.0, 5.0]), "b": torch.tensor([1.0, 3.0, 2.0]), "c": torch.tensor([1.0, 3.0, 2.0])}
    found = report.paired(gaps)
    assert found["paired_z"] == {
        "a - b": pytest.approx(2 / (1 / 3) ** 0.5),
        "a - c": pytest.approx(2 / (1 / 3) ** 0.5),
        "b - c": 0,
    }
    assert found["paired_threshold"] == pytest.approx(2.394, abs=1e-3)  # 5 % two-sided over three pairs
    assert found["paired"]["b - c"]["equal"] and found["paired"]["a - b"]["significant"]
    low, high = report.summary(gaps["a"])["interval_of_10"]
    assert (high - low) / 2 == pytest.approx(1.959964 * (1 / 10 + 1 / 3) ** 0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "seeds: expected an integer >= 2, got 1"),
        (["--ratios", "2", "2"], "ratios: expected distinct numbers > 0, got [2.0, 2.0]"),
        (["--setting", "both"], "setting: expected matched|mismatched, got 'both'"),
        (["--no-pref-states", "--ratios", "0.01"], "ratios: expected m >= 1, got [0.01]"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert cli.main(["bandit", "linear", "--out", "x.json", *flags]) == 2
    assert capsys.readouterr().err == f"rlhf-fast: {message}\n"


def test_missing_directory_and_kind(tmp_path, capsys):
    assert cli.main(["bandit", "linear", "--out", str(tmp_path / "absent" / "x.json")]) == 1
    assert "out: expected a file in an existing directory" in capsys.readouterr().err
    assert cli.main(["bandit", "--out", "x.json"]) == 2
    assert capsys.readouterr().err == "rlhf-fast: bandit: expected one of linear, neural, got '--out'\n"
