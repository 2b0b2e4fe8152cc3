"""Writing a file so that nothing half-written ever stands under its name."""

import os
from pathlib import Path


def replace_file(file: Path, content: bytes | str) -> None:
    """Writes beside `file`, then renames over it."""
    aside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
