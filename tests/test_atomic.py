"""Files and folders are whole or absent, on disk before they are renamed, and leftovers of killed writers go."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ssmgen import atomic
from ssmgen.atomic import (
    check_space,
    leftovers,
    remove_folder,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_text,
)
from ssmgen.machine import machine, start_of
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


def dead_process():
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return int(child.stdout)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_leftovers_of_dead_processes_go_with_the_next_write(tmp_path):
    dead, here = dead_process(), atomic._MACHINE
    alive = f"{os.getppid()}-{start_of(os.getppid())}"
    gone, kept = f"t.tmp-{here}-{dead}-5", {f"t.tmp-{here}-{alive}", f"t.tmp-00000000-{dead}-5", "t.tmp-x"}
    for name in (gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f"other.tmp-{here}-{dead}-5").touch()
    assert {path.name for path, abandoned in leftovers(tmp_path) if abandoned} == {gone, f"other.tmp-{here}-{dead}-5"}
    with whole_folder(tmp_path / "t"):
        pass
    assert names(tmp_path) == {"t", *kept, f"other.tmp-{here}-{dead}-5"}
    with whole_file(tmp_path / "other") as file:
        file.touch()
    assert names(tmp_path) == {"t", *kept, "other"}


def test_files_of_the_user_are_no_leftovers(tmp_path):
    dead, here = dead_process(), atomic._MACHINE
    others = {"photos.tmp-2024", "t.tmp-2024", f"photos.tmp-{here}-{dead}-5", "step-00000001.tmp-7", f"t.tmp-{dead}"}
    for name in others:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    for durable in (True, False):
        (tmp_path / f"t.tmp-{here}-{dead}-5").touch()
        atomic._abandoned_in.clear()
        for name in ("t", "u"):
            with whole_file(tmp_path / name, durable=durable) as file:
                file.touch()
        with whole_folder(tmp_path / "v"):
            pass
        assert names(tmp_path) == {"t", "u", "v", *others}


def test_earlier_versions_left_folders_of_checkpoints_only(tmp_path):
    for name in ("step-00000001.tmp-5", "step-00000002.tmp-5", "notes.tmp-5"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "step-00000002.tmp-5/file").touch()
    assert [path.name for path in remove_leftovers(tmp_path)] == ["step-00000001.tmp-5"]
    assert names(tmp_path) == {"step-00000002.tmp-5", "notes.tmp-5"}


def test_the_process_decides_on_this_machine_and_the_newest_file_elsewhere(tmp_path):
    """A write that takes more than a day is not a leftover, on this machine or on another."""
    alive = f"{os.getppid()}-{start_of(os.getppid())}"
    here, active, idle = (tmp_path / f"t.tmp-{machine}-{alive}" for machine in (atomic._MACHINE, "0" * 8, "1" * 8))
    for folder in (here, active, idle):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner/file").touch()
        for path in (folder / "inner/file", folder / "inner", folder):
            os.utime(path, (0, time.time() - 2 * 86400))
    assert dict(leftovers(tmp_path)) == {here: False, active: True, idle: True}
    os.utime(active / "inner/file")
    assert dict(leftovers(tmp_path)) == {here: False, active: False, idle: True}


def test_a_leftover_of_an_earlier_process_with_this_id_goes(tmp_path, monkeypatch):
    with whole_file(tmp_path / "t") as mine:
        mine.touch()
        assert leftovers(tmp_path) == [(mine, False)], "it is being written"
    earlier = tmp_path / f"t.tmp-{atomic._MACHINE}-{os.getpid()}-1"
    earlier.touch()
    assert leftovers(tmp_path) == [(earlier, True)]
    monkeypatch.setattr(atomic, "start_of", lambda process: "running")  # a system that does not tell the time
    with whole_file(tmp_path / "u") as mine:
        mine.touch()
        assert dict(leftovers(tmp_path)) == {earlier: True, mine: False}
        monkeypatch.setattr(atomic, "_RANDOM", "0" * 8)  # as in another container, where the process has the same id
        assert atomic._beside(tmp_path / "u") != mine


def test_machines_of_one_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "worker")
    found = machine()
    assert found.startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip()) and "pid:" in found


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
