"""Replacing a whole folder atomically and durably: after a crash the old one stands there or the new one."""

import ctypes
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.runtime.atomic import reason, sync

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside ``folder``, then make all of it durable and put it in its place.

    Args:
        folder: where it goes; an old folder is removed once the new one stands there, its permissions are kept.

    Yields:
        The temporary folder.

    Raises:
        StorageError: if it cannot be written; the old folder is as it was and no temporary one stays behind.
    """
    temporary = folder.parent / f".{folder.name[:200]}.{secrets.token_hex(6)}.tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            if folder.exists():
                temporary.chmod(stat.S_IMODE(folder.stat().st_mode))
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: {reason(error)}") from None


def make(folder: Path) -> Path:
    """Make a folder, and those around it, where it is missing.

    Returns:
        The folder.

    Raises:
        StorageError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: {reason(error)}") from None
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder into a place that is not yet the final one.

    Raises:
        StorageError: if that fails; what was copied of a folder stays.
    """
    try:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    except shutil.Error as error:  # of a folder: a list of (source, target, why)
        raise StorageError(f"{target}: cannot be written: {error.args[0][0][2]}; free some space") from None
    except OSError as error:
        raise StorageError(f"{target}: {reason(error)}") from None


def put_in_place(made: Path, folder: Path) -> None:
    """Make a finished folder durable and give it its name, at once; an old folder of that name is removed.

    Args:
        made: the folder, on the same file system.
        folder: its name.

    Raises:
        StorageError: if it cannot be done; the old folder is as it was.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for inner in (*made.rglob("*"), made):
            sync(inner)
        _exchange(made, folder)
        shutil.rmtree(made, ignore_errors=True)  # where there was an old one
        sync(folder.parent)
    except OSError as error:
        raise StorageError(f"{folder}: {reason(error)}") from None


def _exchange(temporary: Path, folder: Path) -> None:
    """Give a folder the name that another may have, which then has the first one's."""
    if not folder.exists():
        os.rename(temporary, folder)
    elif not _exchanged(temporary, folder):
        aside = temporary.with_suffix(".old")
        os.rename(folder, aside)
        try:
            os.rename(temporary, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
        os.rename(aside, temporary)


def _exchanged(one: Path, two: Path) -> bool:
    """Let two folders change names at once, where the system can; tells whether it did."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0)
