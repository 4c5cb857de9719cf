"""Write files whole or not at all: a new file is complete on the disk before it takes the old one's place.

The new file has no name while it is written, so that a crash leaves nothing behind. The kernel then gives it a name for
the moment of the renaming. A crash in that moment leaves the named file, which the next write to the folder removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import CheckpointError

# Short names, because that of the file itself may be as long as names can be.
_NAMED_LATE = ".lora_lite_fx-{}.new"  # it was locked before it got this name
_NAMED_EARLY = ".lora_lite_fx-{}.part"  # where the filesystem does not make files without names
_IS_TEMPORARY = re.compile(r"\.lora_lite_fx-[0-9a-f]{16}\.(?:new|part)")
_LOCKED_AFTER = 60.0  # seconds; by then the writer of a file that was named early has locked it


def write_atomically(path: Path, data: bytes | Path) -> None:
    """Write a file so that readers see the old bytes or the new, never a part, also after a crash.

    A file that was there keeps its mode and owner. A symbolic link stays, and the file that it leads to is replaced.

    Args:
        path: of the file; its folder must exist.
        data: the whole content; or a file that has it, which is copied, so that it need not fit into memory.

    Raises:
        CheckpointError: it could not be written, or what is there is read-only or not a regular file. What was there
            before is unchanged.
    """
    write_together([(path, data)])


def write_together(contents: Iterable[tuple[Path, bytes | Path]]) -> None:
    """Write files that belong together. All are complete on the disk before the first takes its place.

    The last of several is the one that readers open first. Its old file is removed before any new one is in place, so
    that a crash leaves all old files, all new ones, or none of that name: readers of old and new files mixed would
    compute something that nobody saved.

    Args:
        contents: paths with their whole contents, see `write_atomically`.

    Raises:
        CheckpointError: as for `write_atomically`; the message says if the files are incomplete now.
    """
    path, outcome = Path(), "What was there before is unchanged."
    with contextlib.ExitStack() as stack:
        try:
            files = []
            for path, data in contents:
                files.append(stack.enter_context(_NewFile(path)))
                files[-1].write(data)
            if len(files) > 1:
                path, outcome = files[-1].path, f"{files[-1].path} is missing now, so write it again."
                files[-1].remove_old()
            for file in files:
                path = file.path
                file.take_place()
            outcome = "It was written, but may not survive a power failure."
            for file in files:
                path = file.path
                file.sync_folder()
        except OSError as error:
            raise CheckpointError(f"{path} could not be written: {error}. {outcome}") from error


def write_folders(folders: Iterable[Sequence[tuple[Path, bytes]]]) -> None:
    """Write the files of each folder as `write_together`, and make the folders that are not there.

    Raises:
        CheckpointError: as for `write_together`; or a folder cannot be made, or is a file.
    """
    for contents in folders:
        folder = contents[0][0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be a directory: {error}.") from error
        write_together(contents)


class _NewFile(contextlib.AbstractContextManager["_NewFile"]):
    """A file that is to take the place of the one at `path`, with its mode and owner; without a name until then.

    Args:
        path: of the file to write.

    Raises:
        CheckpointError: what is there may not be replaced.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        target = os.path.realpath(path)  # a link stays where it is
        self.name = os.path.basename(target)
        old = _replaceable(path)
        self._temporary: str | None = None
        with contextlib.ExitStack() as stack:
            self._folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, self._folder)
            _remove_abandoned(self._folder)
            self._descriptor = self._open(0o666 if old is None else 0o600)
            stack.callback(os.close, self._descriptor)
            stack.callback(self._remove_temporary)
            with contextlib.suppress(OSError):  # a filesystem without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if old is not None:
                self._take_over(old)
            self._stack = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, data: bytes | Path) -> None:
        """Write the whole content, to the disk itself."""
        with os.fdopen(self._descriptor, "wb", closefd=False) as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)
        os.fsync(self._descriptor)

    def remove_old(self) -> None:
        """Remove the file that is to be replaced, and see that it is gone from the disk."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._folder)
        self.sync_folder()

    def take_place(self) -> None:
        """Rename the new file over the old one."""
        if self._temporary is None:
            self._temporary = _NAMED_LATE.format(secrets.token_hex(8))
            # Only with a src_dir_fd does Python follow the link in /proc, which leads to the file without a name.
            unnamed = f"/proc/self/fd/{self._descriptor}"
            os.link(unnamed, self._temporary, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=True)
        os.replace(self._temporary, self.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._temporary = None

    def sync_folder(self) -> None:
        """See that the names in the folder are on the disk."""
        try:
            os.fsync(self._folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a filesystem that does not sync folders
                raise

    def _open(self, mode: int) -> int:
        """Return a descriptor of an empty file in the folder, which has no name if the filesystem can make such."""
        unnamed = getattr(os, "O_TMPFILE", None)
        if unnamed is not None and os.path.isdir("/proc/self/fd"):
            # Another error than that it cannot comes again below.
            with contextlib.suppress(OSError):
                return os.open(".", unnamed | os.O_WRONLY, mode, dir_fd=self._folder)
        self._temporary = _NAMED_EARLY.format(secrets.token_hex(8))
        return os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode, dir_fd=self._folder)

    def _take_over(self, old: os.stat_result) -> None:
        """Give the new file the owner and mode of the old one."""
        made = os.fstat(self._descriptor)
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(self._descriptor, old.st_uid, old.st_gid)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} could not be written: it belongs to user {old.st_uid} and group {old.st_gid}, and a"
                    " new file cannot be given to them. Remove it first, or write elsewhere. It is unchanged."
                ) from error
        os.fchmod(self._descriptor, stat.S_IMODE(old.st_mode))

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._folder)


def _replaceable(path: Path) -> os.stat_result | None:
    """Return the state of the file at `path`, or None if nothing is there.

    Raises:
        CheckpointError: it is not a regular file, or read-only.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise CheckpointError(f"{path} could not be written: it is {kind_of(old)}, and only files are written over.")
    if not old.st_mode & 0o222 or not os.access(path, os.W_OK):  # root may write to any
        raise CheckpointError(f"{path} could not be written: it is read-only. It is unchanged.")
    return old


def kind_of(state: os.stat_result) -> str:
    """Return what the thing with this state is, with its article."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(state.st_mode), "something else")


def _remove_abandoned(folder: int) -> None:
    """Remove the temporary files of writers that crashed, which are those that nobody has locked any more."""
    for name in os.listdir(folder):
        if _IS_TEMPORARY.fullmatch(name) is None:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                early = name.endswith(".part")
                if not early or time.time() - os.fstat(descriptor).st_mtime > _LOCKED_AFTER:
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(descriptor)
