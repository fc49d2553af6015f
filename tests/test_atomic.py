"""Files and folders are whole or absent, on disk before they are renamed, and leftovers of killed writers go."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch

from ssmgen import atomic
from ssmgen.atomic import check_space, leftovers, remove_folder, whole_file, whole_folder, write_text
from ssmgen.weights import write_weights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def nearly_full(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 2_500_000))


def test_too_little_space_is_said_before_anything_is_written(tmp_path, nearly_full):
    said = "a/b: needs 12.0 MB, but only 2.5 MB are free on its disk; free some space or choose another folder"
    for write in (whole_file, whole_folder):
        with pytest.raises(OSError) as raised, write(tmp_path / "a/b", needed=12_000_000):
            raise AssertionError("not reached")
        assert str(raised.value) == f"{tmp_path}/{said}" and raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"w.safetensors: needs 4.0 MB, but only 2.5 MB are free"):
        write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1_000_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_tell_its_size_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    check_space(tmp_path, 10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.stat("/nowhere/at/all"))
    check_space(tmp_path, 10**15)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_write_says_target_reason_and_figures(tmp_path, nearly_full, number):
    for write in (whole_file, whole_folder):
        with pytest.raises(OSError) as raised, write(tmp_path / "target", needed=1000):
            raise OSError(number, os.strerror(number))
        assert str(raised.value) == (
            f"{tmp_path}/target: writing failed ([Errno {number}] {os.strerror(number)}); nothing of it was kept "
            "(it needs 1.0 kB, 2.5 MB are free on its disk)"
        )
        assert raised.value.errno == number and list(tmp_path.iterdir()) == []


def test_contents_are_flushed_before_the_rename_and_the_name_after(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("x")
    names = [name.removeprefix(f"{tmp_path}").removeprefix(f"/{folder.name}") for name in done]
    assert names == ["/inner/file", "/inner", "", "rename", ""]
    done.clear()
    write_text(tmp_path / "text", "x")
    assert done[0].startswith(f"{tmp_path}/text.tmp-") and done[1:] == ["rename", str(tmp_path)]


def test_leftovers_of_dead_processes_go_with_the_next_write(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, host = int(child.stdout), atomic._HOST
    for name in (f"t.tmp-{host}-{dead}", f"t.tmp-{dead}", f"t.tmp-{host}-1", f"t.tmp-00000000-{dead}", "t.tmp-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f"other.tmp-{host}-{dead}").touch()
    old = tmp_path / "t.tmp-00000000-5"
    old.mkdir()
    os.utime(old, (0, time.time() - 2 * 86400))
    assert {path.name for path, abandoned in leftovers(tmp_path) if abandoned} == {
        *(f"t.tmp-{host}-{dead}", f"t.tmp-{dead}", f"other.tmp-{host}-{dead}", old.name)
    }
    with whole_folder(tmp_path / "t"):
        pass
    kept = {"t", f"t.tmp-{host}-1", f"t.tmp-00000000-{dead}", "t.tmp-x", f"other.tmp-{host}-{dead}"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    with whole_file(tmp_path / "other") as file:
        file.touch()
    assert not list(tmp_path.glob("other.tmp-*"))


def test_a_leftover_of_an_earlier_process_with_this_id_goes(tmp_path):
    mine = tmp_path / f"t.tmp-{atomic._HOST}-{os.getpid()}"
    mine.touch()
    assert leftovers(tmp_path) == [(mine, False)], "it is being written"
    os.utime(mine, (0, atomic._STARTED - 1))
    assert leftovers(tmp_path) == [(mine, True)]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_while_writing_leaves_nothing(tmp_path, stop):
    for write in (whole_file, whole_folder):
        with pytest.raises(stop), write(tmp_path / "t") as partial:
            (partial / "x" if partial.is_dir() else partial).touch()
            raise stop
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed there
    remove_folder(tmp_path / "a")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("a.tmp-")


def test_files_have_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_weights(tmp_path / "w", {"a": torch.zeros(1)})
        write_text(tmp_path / "t", "x")
        with whole_folder(tmp_path / "f"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"w": "0o640", "t": "0o640", "f": "0o750"}
