"""Folders that appear under their name only when they are complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name `path` when the block ends well, and is removed when it does not.

    Args:
        path: The final name. Missing parents are made.
        replace: Take the place of a folder that is already there.

    Raises:
        FileExistsError: If `path` is there already and `replace` is not set.
        OSError: If the disk is full; the message names `path`. Other errors of the block pass as they are.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already: remove it or choose another name")
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            os.rename(path, old)
            os.rename(aside, path)
            shutil.rmtree(old)
        else:
            os.rename(aside, path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        reason = f"{os.strerror(error.errno)}: {path} could not be written, nothing is left of it; free some space"
        raise OSError(error.errno, reason) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
