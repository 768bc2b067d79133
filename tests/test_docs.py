"""The documents: they are short where they promise it, name commands that exist, and leave no operation out."""

import re
from pathlib import Path

import pytest

import rlhf_fast.ops
from rlhf_fast import cli, config
from rlhf_fast.methods import STAGES

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("examples/*.md"),
    *ROOT.glob("bench/results/*.md"),
    ROOT / "rlhf_fast/README.md",
]


def test_the_readme_is_one_story():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if line.startswith("<!-- command:")] == [
        "<!-- command: demo -->",
        "<!-- command: test -->",
    ]


def test_every_command_is_one_of_the_command_line(capsys):
    cli.main(["--help"])
    known = re.findall(r"^  ([\w-]+(?: \w+)?)  +\S|^  (study \w+) ", capsys.readouterr().out, re.MULTILINE)
    known = {first or second for first, second in known}
    assert {"demo", "ppo", "study frontier"} <= known
    for page in PAGES:
        for first, second in re.findall(r"\brlhf-fast +([a-z][\w-]*)(?: +([a-z]\w*))?", page.read_text()):
            assert {first, f"{first} {second}"} & known or first in ("study", "bandit"), (page.name, first, second)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_lists_every_operation_and_config():
    operations = set(re.findall(r"^::: rlhf_fast\.ops\.(?:\w+\.)?(\w+)$", (ROOT / "docs/api/ops.md").read_text(), re.M))
    assert operations == set(rlhf_fast.ops.__all__)
    page = (ROOT / "docs/api/config.md").read_text()
    configs = set(re.findall(r"^::: rlhf_fast\.config\.(\w+)$", page, re.M))
    assert "<!-- the configs in rlhf_fast/methods.py -->" in page
    configs |= {stage.config.removeprefix("config:") for stage in STAGES.values()}
    assert configs == set(config.__all__)
