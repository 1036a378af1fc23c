"""Atomic writes: whole or not at all, and an error names the file."""

import errno
from pathlib import Path

import pytest

from pgolf_core.files import atomic_write


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "folder" / "index.html", "old")

    def full(temporary, content):
        temporary.touch()
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write fails: without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(path, "new")
    assert caught.value.filename == str(path) and path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
