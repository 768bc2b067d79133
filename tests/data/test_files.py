"""A file is the old one or the new one, whatever happens on the way."""

import os

import pytest

from rlhf_fast.data.files import write_text


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "± one\n")
    assert path.read_bytes() == "± one\n".encode()

    def fail(*arguments):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text(path, "two\n")
    assert path.read_bytes() == "± one\n".encode()
    monkeypatch.undo()
    write_text(path, "three\n")
    assert os.listdir(path.parent) == ["a.txt"] and path.read_text() == "three\n"
