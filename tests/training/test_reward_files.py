"""Reward functions are found by name: in a file, in an installed module, in the working directory."""

import sys

import pytest

from rlhf_fast.training.reward_functions import load_function


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


def test_a_file_is_loaded_as_a_module(tmp_path, monkeypatch):
    (tmp_path / "beside_the_reward.py").write_text("WORTH = 2.0\n")
    path = tmp_path / "my.reward.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside_the_reward import WORTH\n"
        "@dataclass\nclass Scale:\n    by: float = WORTH\n"
        "def score(prompts, completions):\n    return [Scale().by] * len(prompts)\n"
    )
    monkeypatch.setattr("sys.path", [*sys.path])
    score = load_function(f"{path}:score")
    assert score([""], [""]) == [2.0]
    assert sys.modules[score.__module__].score is score
    path.write_text(path.read_text().replace("WORTH\n", "3.0\n", 2).replace("import 3.0", "import WORTH"))
    assert load_function(f"{path}:score")([""], [""]) == [3.0]
    path.write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"^reward: .* got '.*my.reward.py:f': No module named 'no_such_package'$"):
        load_function(f"{path}:f")


def test_a_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "reward_in_cwd.py").write_text("def score(prompts, completions):\n    return [1.0]\n")
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    assert load_function("reward_in_cwd:score")([""], [""]) == [1.0]
    with pytest.raises(
        ValueError, match="^reward: expected a directory, .* got 'json.nope:x': No module named 'json.n"
    ):
        load_function("json.nope:x")
