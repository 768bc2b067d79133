"""Writes that fail and files that are damaged, in a sentence with the path."""

import errno
import os

import pytest

from rlhf_fast.data.damage import read_json, writing
from rlhf_fast.data.files import write_text
from rlhf_fast.data.rows import write_rows


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EDQUOT, "x", "file"), os.strerror(errno.EDQUOT)),
        (Exception("No space left on device (os error 28)"), os.strerror(errno.ENOSPC)),  # as tokenizers raise it
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 2"), os.strerror(errno.EIO)),
        (RuntimeError("basic_ios::clear: iostream error"), os.strerror(errno.EIO)),
    ],
)
def test_a_write_that_fails_names_the_path(error, reason, tmp_path):
    expected = f"^{tmp_path}/a/b could not be written: {reason}; the files from before are as they were$"
    with pytest.raises(OSError, match=expected), writing(tmp_path / "a" / "b"):
        raise error


@pytest.mark.parametrize("error", [ValueError("margin"), RuntimeError("size mismatch"), KeyError("a")])
def test_other_exceptions_pass(error, tmp_path):
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    for path in (tmp_path / "a.jsonl", tmp_path / "a.txt"):
        path.write_text("old\n")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="a.txt could not be written: No space left on device"):
        write_text(tmp_path / "a.txt", "new\n")
    with pytest.raises(OSError, match="a.jsonl could not be written: No space left on device"):
        write_rows(tmp_path / "a.jsonl", [{"prompt": "new"}])
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.txt"]  # the new ones take no room
    assert {(tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {"old\n"}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', bytes(20), b"\xff\xfe" * 9, b"[" * 100_000])
def test_damaged_json(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json: expected JSON, but the file is damaged: "):
        read_json(tmp_path / "a.json")


def test_json_of_another_kind(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json: expected JSON with named values, got list$"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", list) == []
