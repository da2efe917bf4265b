"""Files that are written in one step: the old content or the new, with the mode of any other."""

from __future__ import annotations

import os
import stat
import sys
import threading

import pytest
import torch

import threshnet_fast as tf
from threshnet_fast import files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes are those of POSIX")


def plan(path) -> None:
    tf.save_plan(tf.ThreshNet79(num_classes=3).eval(), (1, 3, 32, 32), path)


def tensors(path) -> None:
    files.write_tensors(path, {"x": torch.ones(3)})


WRITERS = {
    "text": lambda path: files.write_text(path, "text"),
    "json": lambda path: files.write_json(path, {"a": 1}),
    "tensors": tensors,
    "plan": plan,
}


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        (tmp_path / "other").write_text("")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == mode(tmp_path / "other") == 0o666 & ~umask


def test_mode_of_a_file_that_is_replaced_stays(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    write(path)
    assert mode(path) == 0o640
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path, write):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() != b"old"


def test_a_failure_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    files.write_text(path, "text")
    reader.join()
    assert read == ["text"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_folders_are_refused(tmp_path, write):
    with pytest.raises(OSError, match=r"directory|Is a dir"):
        write(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        write(tmp_path / "nowhere" / "file")
