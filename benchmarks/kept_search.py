"""Searches as they are kept among the results: all that their figures and curves need, without checkpoints.

So the stages of a long benchmark may run on several machines, one after the other, and each is run once.
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from raygrow.weights.atomic import new_folder, replace_file

FILES = "search.yaml", "results.json", "cost.json", "trials/*/run.yaml", "trials/*/summary.json"
HISTORIES, GROWTHS = "trials/*/history.jsonl", "trials/*/growth/*.json"
ORIGIN = "origin.json"


def keep(search: Path, file: Path, origin: dict[str, Any]) -> None:
    """Writes a search that has ended to a zip file.

    Args:
        search: Its folder.
        file: The file.
        origin: Where and how it was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        aside, made = Path(folder) / "search", Path(folder) / "kept"
        for found in (each for pattern in (*FILES, HISTORIES, GROWTHS) for each in search.glob(pattern)):
            target = aside / found.relative_to(search)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
        for history in aside.glob(HISTORIES):
            history.write_text(_thinned(history.read_text()))
        (aside / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        archive = Path(shutil.make_archive(str(made), "zip", aside))
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, archive.read_bytes())


def restore(file: Path, search: Path) -> dict[str, Any]:
    """Makes the folder of a kept search, if it is not there. Returns where and how it was run.

    Raises:
        SystemExit: If the folder is of another search.
    """
    with zipfile.ZipFile(file) as archive:
        results, origin = archive.read("results.json"), json.loads(archive.read(ORIGIN))
    if not search.exists():
        with new_folder(search) as aside:
            shutil.unpack_archive(file, aside)
    own = search / "results.json"
    if not own.exists() or own.read_bytes() != results:
        raise SystemExit(f"{search} is not the search that {file} keeps: remove one of them")
    return origin


def _thinned(history: str) -> str:
    """The lines of evaluations and of the ends of phases."""
    lines = history.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    followers = [*(row["phase"] for row in rows[1:]), None]
    told = zip(lines, rows, followers[: len(rows)], strict=True)
    return "".join(line for line, row, follower in told if row.get("val_loss") or row["phase"] != follower)
