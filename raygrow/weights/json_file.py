"""JSON files that may have been damaged on their way here."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: If the file is cut short, damaged, or holds anything but an object; names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or no text at all
        raise ValueError(f"{file} is damaged or cut short ({error}): copy it there again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where an object of keys and values has to be")
    return content
