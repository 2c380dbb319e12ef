"""Replacing and removing files durably: after a crash one holds the old bytes or the new ones, never a mix."""

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "the path is a folder; name a file",
}


def replace_file(path: Path, parts: Iterable[bytes | bytearray | memoryview], *, mode: int | None = None) -> None:
    """Write parts to a temporary file beside ``path``, make it durable, and put it in the place of ``path``.

    Args:
        path: the file; where it exists, its permissions are kept.
        parts: its new bytes.
        mode: permissions of a new file, before any byte is in it. [as the umask has it]

    Raises:
        StorageError: if that fails; the old file is as it was and no temporary file stays behind.
    """
    temporary = path.parent / f".{path.name[:200]}.{secrets.token_hex(6)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            with open(descriptor, "wb") as file:
                if path.exists():
                    mode = stat.S_IMODE(path.stat().st_mode)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: {reason(error)}") from None


def remove_file(path: Path) -> None:
    """Remove a file, durably: what is removed before another is gone before it, whatever crashes.

    Raises:
        StorageError: if that fails.
    """
    try:
        path.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}; free the file") from None


def reason(error: OSError) -> str:
    """Say why something cannot be written, and what to do.

    Returns:
        The end of a message.
    """
    advice = _ADVICE.get(error.errno or 0, "choose another folder")
    return f"cannot be written: {error.strerror or error}; {advice}"


def sync(path: Path) -> None:
    """Make the bytes of a file, or the renames in a folder, durable, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
