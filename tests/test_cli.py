"""The command line: what it parses, how it says no, and what it does not import."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from rlhf_fast import cli
from rlhf_fast.config import DPOConfig, PipelineConfig, PPOConfig, SFTConfig
from rlhf_fast.config.arguments import from_dict

PPO = {"model": "m", "output_dir": "o", "train_data": "t.jsonl", "reward": "rlhf_fast.world:true_reward"}
FLAGS = ["--model", "m", "--output-dir", "o", "--train-data", "t.jsonl", "--reward", "rlhf_fast.world:true_reward"]


@pytest.fixture
def trained(monkeypatch) -> list:
    """Configs that reached a stage."""
    configs = []
    for name in ("ppo", "dpo"):
        monkeypatch.setattr(f"rlhf_fast.stages.{name}.train", configs.append)
    monkeypatch.setattr("rlhf_fast.report.pipeline.run", configs.append)
    return configs


@pytest.fixture
def yaml_file(tmp_path):
    def write(values: dict | str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return str(path)

    return write


def test_flags(trained, capsys):
    flags = ["--kl-coef", "0.1", "--steps=7", "--bf16", "--kl-target", "6", "--value_clip", "1e-1"]
    assert cli.main(["ppo", *FLAGS, *flags]) == 0
    assert trained == [PPOConfig(**PPO, kl_coef=0.1, steps=7, bf16=True, kl_target=6.0, value_clip=0.1)]
    assert capsys.readouterr().out == "ppo: wrote o\n"


def test_flags_win_over_the_file_wherever_they_stand(trained, yaml_file):
    file = yaml_file(
        "# learning rates in YAML 1.1 are strings without a dot\nlearning_rate: 1e-4\nsteps: 5\nbf16: true\n"
    )
    assert cli.main(["ppo", "--steps", "6", "--config", file, *FLAGS, "--no-bf16"]) == 0
    assert trained == [PPOConfig(**PPO, learning_rate=1e-4, steps=6, bf16=False)]


def test_sections_and_lists(trained, yaml_file):
    file = yaml_file({"model": "m", "output_dir": "o", "methods": ["ppo"], "sft": {"epochs": 2, "batch_size": 8}})
    assert cli.main(["pipeline", "--config", file, "--methods", "dpo", "rloo", "--sft.epochs", "3"]) == 0
    expected = {"methods": ["dpo", "rloo"], "sft": {"epochs": 3, "batch_size": 8}}
    assert trained == [PipelineConfig(model="m", output_dir="o", **expected)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stps", "3"], "unknown flag '--stps', did you mean '--steps'?"),
        (["--no-bf15"], "unknown flag '--no-bf15', did you mean '--bf16'?"),
        (["--steps", "many"], "steps: expected int, got 'many'"),
        (["--steps", "2.5"], "steps: expected int, got '2.5'"),
        (["--kl-target", "high"], "kl_target: expected float, got 'high'"),
        (["--lr-schedule", "step"], "lr_schedule: expected constant|linear|cosine, got 'step'"),
        (["--clip", "-1"], "clip: expected a number in (0, 1), got -1.0"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "absent.yaml"], "--config: expected a YAML file, found no absent.yaml"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags(flags, message, trained, capsys):
    assert cli.main(["ppo", *FLAGS, *flags]) == 2
    assert capsys.readouterr() == ("", f"rlhf-fast: {message}\n")
    assert not trained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**PPO, "kl_coeff": 0.1}, "FILE: unknown key 'kl_coeff', did you mean 'kl_coef'?"),
        ({**PPO, "zzz": 0.1}, "FILE: unknown key 'zzz'"),
        ({**PPO, "steps": "many"}, "FILE: steps: expected int, got 'many'"),
        ({**PPO, "model": ["m"]}, "FILE: model: expected str, got \"['m']\""),
        ({**PPO, "bf16": 3}, "FILE: bf16: expected bool, got 3"),
        ("- a\n", "FILE: expected keys and values, got ['a']"),
        ("", "FILE: expected keys and values, got None"),
        (
            {"model": "m"},
            "missing --output-dir: Directory for the trained model, metrics.jsonl, run.json and checkpoints.",
        ),
    ],
)
def test_wrong_files(content, message, yaml_file, trained, capsys):
    file = yaml_file(content)
    assert cli.main(["ppo", "--config", file]) == 2
    assert capsys.readouterr() == ("", f"rlhf-fast: {message.replace('FILE', file)}\n")
    assert not trained


def test_broken_yaml_names_file_and_line(yaml_file, capsys):
    file = yaml_file("model: m\nsteps: [1,\n")
    assert cli.main(["ppo", "--config", file]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rlhf-fast: {file}: expected YAML:") and "line 3" in error and error.count("\n") == 1


def test_unknown_command(capsys):
    assert cli.main(["pppo"]) == 2
    assert capsys.readouterr().err == "rlhf-fast: unknown command 'pppo', did you mean 'ppo'?\n"
    assert cli.main(["frobnicate"]) == 2
    assert capsys.readouterr().err == "rlhf-fast: unknown command 'frobnicate'\n"
    assert cli.main(["study", "winrat"]) == 2
    assert capsys.readouterr().err.endswith(", shift, variance, got 'winrat', did you mean 'winrate'?\n")


@pytest.mark.parametrize("argv", [["study"], ["study", "--help"], ["bandit", "-h"]])
def test_a_group_lists_its_commands(argv, capsys):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  (\w+ \w+) ", text, flags=re.MULTILINE)
    assert listed == [name for name in cli.COMMANDS if name.startswith(f"{argv[0]} ")]
    assert text.startswith(f"usage: rlhf-fast {argv[0]} COMMAND ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ValueError("train_data: expected a file,\nfound none"),
            1,
            "train_data: expected a file, found none (--debug",
        ),
        (FileNotFoundError(2, "No such file", "x.jsonl"), 1, "[Errno 2] No such file: 'x.jsonl'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failing_stage(error, code, message, monkeypatch, capsys):
    def train(config):
        raise error

    monkeypatch.setattr("rlhf_fast.stages.ppo.train", train)
    assert cli.main(["ppo", *FLAGS]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"rlhf-fast: {message}") and err.count("\n") == 1
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.main(["ppo", *FLAGS, "--debug"])


def test_other_errors_of_a_stage_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("rlhf_fast.stages.ppo.train", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["ppo", *FLAGS])


@pytest.mark.parametrize(
    "flags",
    [
        ["--columns", "prompt=question", "answer=gold", "--chat-template-kwargs", "thinking=false", "effort=low"],
        ["--columns=prompt=question", "answer=gold", "--chat-template-kwargs", '{"thinking": false, "effort": "low"}'],
        ["--columns", '{"prompt": "question", "answer": "gold"}', "--chat_template_kwargs=thinking=no", "effort=low"],
        ["--config", {"columns": {"prompt": "question", "answer": "gold"}}, "--chat-template-kwargs", "thinking=false"],
    ],
)
def test_mappings(flags, trained, yaml_file):
    flags = [yaml_file(flag) if isinstance(flag, dict) else flag for flag in flags]
    flags += ["effort=low"] * (flags[-1] == "thinking=false")
    assert cli.main(["ppo", *FLAGS, *flags]) == 0
    options = {"thinking": False, "effort": "low"}
    expected = PPOConfig(**PPO, columns={"prompt": "question", "answer": "gold"}, chat_template_kwargs=options)
    assert trained == [expected]


def test_mappings_of_another_form(trained, capsys):
    assert cli.main(["ppo", *FLAGS, "--columns", "prompt"]) == 2
    assert "columns: expected mapping, got 'prompt'" in capsys.readouterr().err
    assert cli.main(["ppo", *FLAGS, "--chat-template-kwargs", "tokenize=true"]) == 2
    expected = "chat_template_kwargs: expected options of the template, got tokenize, which the stage sets"
    assert expected in capsys.readouterr().err
    assert not trained


def test_print_config_is_a_config(trained, yaml_file, capsys):
    assert cli.main(["ppo", *FLAGS, "--steps", "7", "--print-config"]) == 0
    assert not trained
    file = yaml_file(capsys.readouterr().out)
    assert cli.main(["ppo", "--config", file]) == 0
    assert trained == [PPOConfig(**PPO, steps=7)]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_one_line_per_field(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    config = cli.load(cli.COMMANDS[name].config)
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        (line,) = [line for line in lines if re.match(rf"  {flag.replace('--', '--(?:.no-.)?')} ", line)]
        assert field.metadata["help"] in line
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            assert line.endswith(f"[{field.default}]")
    assert callable(cli.load(cli.COMMANDS[name].run))


GROUPS = [
    "required",
    "options",
    "what a stage takes that passes over the rows of train_data",
    "what every method takes: its policy starts from a reference and is evaluated on held-out prompts",
    "who samples from the policy",
    "what every training stage takes",
    "general",
]


def test_help_shows_choices_and_groups(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--help"])
    text = capsys.readouterr().out
    assert "constant|linear|cosine [linear]" in text and "--[no-]bf16 " in text
    assert re.findall(r"^(\S.*):$", text, flags=re.MULTILINE) == GROUPS
    first = text.index("--model STR"), text.index("--train-data STR"), text.index("--beta FLOAT")
    assert list(first) == sorted(first)


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["ppo", "--help"], ["ppo", "--stps"]])
def test_help_and_errors_do_not_import_torch(argv):
    program = (
        "import sys; from rlhf_fast.cli import main\n"
        f"try: main({argv})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "rlhf-fast" in done.stdout + done.stderr


def test_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert [line[2:20].strip() for line in text.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)


def test_from_dict():
    given = {"model": "m", "output_dir": "o", "train_data": "t", "learning_rate": "1e-3", "eval_data": None}
    assert from_dict(SFTConfig, given, "section 'sft'").learning_rate == 1e-3
    for wrong, message in (
        ({"epoch": 1}, "section 'sft': unknown key 'epoch', did you mean 'epochs'?"),
        ({"epochs": "x"}, "section 'sft': epochs: expected int, got 'x'"),
        ({"epochs": 0}, "section 'sft': epochs: expected an integer >= 1, got 0"),
        ({"train_data": None}, "section 'sft': missing 'train_data': JSONL"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            from_dict(SFTConfig, given | wrong, "section 'sft'")
    with pytest.raises(ValueError, match="section 'dpo': missing 'train_data': Rows with"):
        from_dict(DPOConfig, {"model": "m", "output_dir": "o"}, "section 'dpo'")
