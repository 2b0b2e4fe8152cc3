"""Documents out of one file: plain text, `.jsonl` or `.parquet`, the first two also compressed."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowInvalid)


def read_file(path: Path, *, text_key: str, passage: int) -> Iterator[Any]:
    """The documents of a file, by its ending: `.jsonl` or `.json`, `.parquet`; anything else is plain text.

    Args:
        path: The file.
        text_key: Key (JSON lines) or column (parquet) of the text.
        passage: Characters after which a plain text is cut, at a line end; 0 keeps it whole.

    Returns:
        Text; out of a parquet column, whatever that holds.

    Raises:
        ValueError: If the file is damaged or a document lacks the key; names file and line.
        UnicodeDecodeError: If it is not UTF-8.
    """
    content = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    kind = content.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, text_key)
            return
        with _open_text(path) as lines:
            yield from _read_jsonl(path, lines, text_key) if kind in JSON_LINES else _passages(lines, passage)
    except DAMAGE as error:
        if getattr(error, "errno", None) is not None:  # not the file's fault
            raise
        raise ValueError(f"{path}: the file is cut short or damaged ({error}); fetch it again") from error


def _open_text(path: Path) -> io.TextIOWrapper:
    """Opens for reading; line ends stay as they are, a byte-order mark goes."""
    opener = OPENERS.get(path.suffix.lower(), Path.open)
    return io.TextIOWrapper(cast(IO[bytes], opener(path, "rb")), encoding="utf-8-sig", newline="\n")


def _open_zstd(path: Path, _mode: str) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="zstd")


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstd}
JSON_LINES = (".jsonl", ".json")


def _passages(lines: Iterable[str], length: int) -> Iterator[str]:
    """Cuts a text at the first line end after every `length` characters, so that one big file is many documents."""
    passage: list[str] = []
    size = 0
    for line in lines:
        passage.append(line)
        size += len(line)
        if length and size >= length:
            yield "".join(passage)
            passage, size = [], 0
    yield "".join(passage)


def _read_jsonl(path: Path, lines: Iterable[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is only the former
            raise ValueError(f"{path}:{number}: is not JSON ({error}); each line has to hold one document") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{path}:{number}: is a {kind}, not an object; each line has to hold one document")
        if not isinstance(text := row.get(text_key), str):
            keys = ", ".join(row)
            raise ValueError(f"{path}:{number}: has no text under {text_key!r} (it has {keys}); set data.text_key")
        yield text.encode("utf-8", "replace").decode("utf-8")  # an escape such as \ud800 is no character by itself


def _read_parquet(path: Path, text_key: str) -> Iterator[Any]:
    with pq.ParquetFile(path) as table:
        if text_key not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{path}: has no column {text_key!r}, only {names}; set data.text_key")
        for batch in table.iter_batches(batch_size=1000, columns=[text_key]):
            yield from batch.column(0).to_pylist()
