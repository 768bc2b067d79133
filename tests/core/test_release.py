"""The check that stands before publishing: tag, version and changelog say the same."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_fast

CHECK = Path(__file__).parents[2] / ".ci" / "check_release.py"


@pytest.mark.parametrize(
    ("tag", "heading", "said"),
    [
        ("v1.2.3", "1.2.3 (2030-01-31)", "release 1.2.3"),
        ("1.2.3", "1.2.3 (2030-01-31)", "tag: expected v1.2.3, the version in rlhf_fast/__init__.py, got 1.2.3"),
        ("v1.2.3", "1.2.3 (unreleased)", "and a date in brackets, got '1.2.3 (unreleased)'"),
        ("v1.2.3", "1.2.2 (2030-01-31)", "to be 1.2.3 and a date in brackets, got '1.2.2 (2030-01-31)'"),
    ],
)
def test_a_tag_needs_its_changelog(tmp_path, tag, heading, said):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "rlhf_fast").mkdir()
    (tmp_path / ".ci/check_release.py").write_text(CHECK.read_text())
    (tmp_path / "rlhf_fast/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n### Operations\n")
    done = subprocess.run([sys.executable, tmp_path / ".ci/check_release.py", tag], capture_output=True, text=True)
    assert done.returncode == (0 if said.startswith("release") else 1)
    assert said in done.stdout + done.stderr


def test_the_version_stands_in_one_place():
    text = (CHECK.parents[1] / "pyproject.toml").read_text()
    assert rlhf_fast.__version__ not in text and 'version = { attr = "rlhf_fast.__version__" }' in text
