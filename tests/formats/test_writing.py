"""Writing files: whole or not at all, onto regular files only, and nothing else of the file changes."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_lite_fx import CheckpointError
from lora_lite_fx.formats import atomic_writing
from lora_lite_fx.formats.atomic_writing import write_atomically, write_together

LITTER = ".lora_lite_fx-0123456789abcdef"


@pytest.fixture(params=["without a name", "with a name"])
def filesystem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds where the filesystem can make files without names holds where it cannot."""
    if request.param == "with a name":
        monkeypatch.delattr(os, "O_TMPFILE")


every_filesystem = pytest.mark.usefixtures("filesystem")


@every_filesystem
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@every_filesystem
def test_the_content_may_be_in_a_file_which_is_not_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = tmp_path / "source", tmp_path / "file"
    content = bytes(range(256)) * 10_000
    source.write_bytes(content)
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} is read as a whole"))
        write_together([(tmp_path / "other", b"bytes"), (path, source)])
    assert (path.read_bytes(), source.read_bytes()) == (content, content)
    with pytest.raises(CheckpointError, match=r"file could not be written: .*none"):
        write_atomically(path, tmp_path / "none")
    assert path.read_bytes() == content


@every_filesystem
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@every_filesystem
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_its_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    write_atomically(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@every_filesystem
def test_an_owner_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    real = os.stat(path)
    others = os.stat_result((*real[:4], real.st_uid + 1, *real[5:10]))
    monkeypatch.setattr(atomic_writing, "_replaceable", lambda _: others)
    monkeypatch.setattr(os, "fchown", failing(errno.EPERM))
    with pytest.raises(CheckpointError, match=rf"belongs to user {real.st_uid + 1} .*write elsewhere"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@every_filesystem
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_bytes(b"old")
    (tmp_path / "second").symlink_to("there/file")
    (tmp_path / "first").symlink_to("second")
    write_atomically(tmp_path / "first", b"new")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path / "there") == ["file"]


def test_a_link_to_nothing_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_links_that_lead_to_each_other_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_atomically(tmp_path / "one", b"new")


@every_filesystem
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(CheckpointError, match="read-only"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 107 characters
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


NOT_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fifo": (os.mkfifo, "a named pipe"),
    "socket": (make_socket, "a socket"),
    "directory": (os.mkdir, "a directory"),
    "device": (lambda path: path.symlink_to("/dev/null"), "a device"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_only_regular_files_are_written_over(kind: str, tmp_path: Path) -> None:
    make, name = NOT_FILES[kind]
    path = tmp_path / "there"
    make(path)
    before = path.lstat()
    with pytest.raises(CheckpointError, match=f"could not be written: it is {name}"):
        write_atomically(path, b"new")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ["there"]


@every_filesystem
@pytest.mark.parametrize("name", ["x" * 250, "x" * 255, "é" * 125, "a\nb", " ", "-", "{}", ".hidden"])
def test_any_legal_name_can_be_written(name: str, tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_atomically(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    assert os.listdir(tmp_path) == [name]


def test_a_path_without_a_folder_is_in_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(Path("file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# The disk.


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@every_filesystem
def test_the_file_is_on_the_disk_before_it_takes_its_place_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    steps = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replacing(*args: Any, **kwargs: Any) -> None:
        steps.append("replace")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    write_atomically(tmp_path / "file", b"new")
    assert steps == ["file", "replace", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some filesystems cannot do that at all; of others it is an error, which does not say that nothing changed."""
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            failing(number)()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    if number == errno.EINVAL:
        write_atomically(tmp_path / "file", b"new")
    else:
        with pytest.raises(CheckpointError, match="was written, but may not survive a power failure"):
            write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@every_filesystem
def test_what_a_crash_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    begun, unlike = LITTER.replace("0", "f") + ".part", f"unlike{LITTER}.new"
    for name in (f"{LITTER}.part", unlike):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (long_ago, long_ago))
    (tmp_path / begun).write_bytes(b"of a writer that has just begun")
    (tmp_path / f"{LITTER}.new").write_bytes(b"whole")
    write_atomically(tmp_path / "file", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", unlike, begun])


def test_a_file_that_another_writer_holds_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(atomic_writing, "_LOCKED_AFTER", -1.0)
    with atomic_writing._NewFile(tmp_path / "file") as slow:
        slow.write(b"slow")
        write_atomically(tmp_path / "file", b"fast")
        slow.take_place()
    assert (tmp_path / "file").read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["file"]


# Files that belong together.


def pair(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@every_filesystem
def test_a_second_file_that_cannot_be_made_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together([(first, b"old"), (second, b"old")])
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            failing(errno.ENOSPC)()
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"second could not be written: .*No space.* before is unchanged"):
            write_together([(first, b"new"), (second, b"new")])
    assert pair(tmp_path) == {"first": b"old", "second": b"old"}
    write_together([(first, b"new"), (second, b"new")])
    assert pair(tmp_path) == {"first": b"new", "second": b"new"}


@every_filesystem
@pytest.mark.parametrize("renamed", [0, 1])
def test_a_pair_whose_renaming_fails_has_no_second_file_and_the_error_says_so(
    renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together([(first, b"old"), (second, b"old")])
    replace, calls = os.replace, []

    def replacing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > renamed:
            failing(errno.EIO)()
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", replacing)
    with pytest.raises(CheckpointError, match="second is missing now, so write it again"):
        write_together([(first, b"new"), (second, b"new")])
    assert pair(tmp_path) == {"first": b"new" if renamed else b"old"}
