"""Files and folders that appear under their name only when they are complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name `path` when the block ends well, and is removed when it does not.

    Args:
        path: The final name. Missing parents are made, and go again where it comes to nothing.
        replace: Take the place of a folder that is already there.

    Raises:
        FileExistsError: If `path` is there already and `replace` is not set.
        OSError: If the folder cannot be written; names `path`. Other errors of the block pass as they are.
    """
    if not replace:
        _refuse_existing(path)
    final = path.resolve()
    aside = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    missing = [parent for parent in final.parents if not parent.exists()]
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _errors_name(path, aside):
            aside.mkdir(parents=True)
            yield aside
            if not replace:
                _refuse_existing(path)  # others may have made it meanwhile
            if final.exists():
                old = final.with_name(f".{final.name}.old-{os.getpid()}")
                os.rename(final, old)
                os.rename(aside, final)
                shutil.rmtree(old)
            else:
                os.rename(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # one that is not empty stays, and those above it
            for parent in missing:
                parent.rmdir()


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file beside `path`, then renames it over what is there.

    Raises:
        OSError: If it cannot be written; names `path`, which is as it was.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with _errors_name(path, aside):
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another name")


@contextmanager
def _errors_name(path: Path, aside: Path) -> Iterator[None]:
    """Has errors name `path` instead of what stands for it meanwhile, and say that nothing is left on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            reason = f"{os.strerror(error.errno)}: {path} could not be written, nothing is left of it; free some space"
            raise OSError(error.errno, reason) from error
        name = str(error.filename)
        if not name.startswith(str(aside)):
            raise
        raise OSError(error.errno, error.strerror, name.replace(str(aside), str(path), 1)) from error
