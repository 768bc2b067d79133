"""A file is the old one or the new one, whatever happens on the way."""

import os

import pytest

from rlhf_fast.data.files import check_writable, write_text


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


def test_a_path_is_checked_before_work_is_done(tmp_path):
    check_writable("out", tmp_path / "new" / "deep" / "file.txt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=f"^out: expected a file to write, got the directory {tmp_path}$"):
        check_writable("out", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=f"^out: .* but {tmp_path}/file takes no files$"):
        check_writable("out", tmp_path / "file" / "below")
