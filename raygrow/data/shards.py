"""Token shards on disk: flat little-endian files of token ids beside a manifest, read through memory maps.

Layout of a prepared folder:

    manifest.json            counts, checksums, the settings that it was made with
    tokenizer/               the tokenizer that the ids belong to
    train-00000.bin ...      documents one after another, each closed by the end-of-text token
    validation-00000.bin
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from raygrow.text.tokenizer import Tokenizer

VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What one split holds. `bytes` are those of the documents' UTF-8 text; `tokens` count the end-of-text ones too."""

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int = VERSION
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    splits: Mapping[str, SplitInfo]
    settings: Mapping[str, Any]
    """Everything that decided the content, as given to `prepare`."""

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into a folder."""
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        FileNotFoundError: If the folder holds no prepared data.
        ValueError: If the manifest is damaged or of another version.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no prepared data here ({MANIFEST_FILE} is missing); run `raygrow prepare`")
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this raygrow reads {VERSION}")
        splits = {
            name: SplitInfo(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in content["splits"].items()
        }
        return Manifest(**{**content, "splits": splits})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder and prepare it again") from error


def fingerprint(folder: str | Path) -> str:
    """Of a prepared folder's content: two that agree in it hold the same tokens, made by the same tokenizer."""
    return hashlib.sha256((Path(folder) / MANIFEST_FILE).read_bytes()).hexdigest()


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, *, name: str = "the tokenizer") -> None:
    """Make sure that token ids mean the same to the data and to a model.

    Raises:
        ValueError: If the data was written with another tokenizer.
    """
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{name} is not the one that the data was prepared with: its {tokenizer.vocab_size} tokens hash to "
            f"{tokenizer.sha256[:12]}, the data's {manifest.vocab_size} to {manifest.tokenizer_sha256[:12]}. "
            "Prepare the data again with data.tokenizer.path set to that tokenizer, into another data.path"
        )


class ShardWriter:
    """Writes one split's tokens into shards of equal size, hashing them on the way. Close it with `finish`."""

    def __init__(self, folder: Path, split: str, *, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self.split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._room = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append token ids; documents may run over from one shard into the next."""
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            if not self._room:
                self._open_next()
            assert self._file is not None
            piece, tokens = tokens[: self._room], tokens[self._room :]
            self._hash.update(piece.data)
            self._file.write(piece.data)
            self._room -= len(piece)

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard and say what was written."""
        if self._file is not None:
            self._file.close()
            written = self._shard_tokens - self._room
            self._shards.append(Shard(file=Path(self._file.name).name, tokens=written, sha256=self._hash.hexdigest()))
            self._file = None
        return tuple(self._shards)

    def _open_next(self) -> None:
        self.finish()
        self._file = (self._folder / f"{self.split}-{len(self._shards):05d}.bin").open("wb")
        self._hash = hashlib.sha256()
        self._room = self._shard_tokens


class Tokens:
    """One split's tokens, memory-mapped: nothing is read before it is used.

    Args:
        manifest: Of the folder that the shards are in.
        split: Name of the split.
        shards: One array of token ids per file.
    """

    def __init__(self, manifest: Manifest, split: str, shards: list[np.ndarray]) -> None:
        info = manifest.splits[split]
        self.manifest, self.split, self.shards = manifest, split, shards
        self.n_tokens = info.tokens
        self.bytes_per_token = info.bytes / info.tokens
        """UTF-8 bytes of text per token, which turns a loss per token into bits per byte."""

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length` of the split, whichever shards they are in.

        Raises:
            ValueError: If the split ends before.
        """
        if start < 0 or start + length > self.n_tokens:
            raise ValueError(f"tokens {start} to {start + length}: the {self.split} split has {self.n_tokens}")
        return np.concatenate(list(self._pieces(start, length)) or [self.shards[0][:0]])

    def _pieces(self, start: int, length: int) -> Iterator[np.ndarray]:
        for shard in self.shards:
            if length and start < len(shard):
                piece = shard[start : start + length]
                yield piece
                length -= len(piece)
            start = max(0, start - len(shard))


def open_tokens(folder: str | Path, split: Split, *, verify: bool = True) -> Tokens:
    """Open one split of a prepared folder.

    Args:
        folder: Where `prepare` wrote.
        split: `train` or `validation`.
        verify: Also compare checksums, which reads every shard once.

    Raises:
        FileNotFoundError: If there is no prepared data, or a shard is missing.
        ValueError: If a shard is cut short or its checksum is off.
    """
    folder, manifest = Path(folder), load_manifest(folder)
    dtype = np.dtype(manifest.dtype)
    return Tokens(manifest, split, [_map_shard(folder, s, dtype, verify) for s in manifest.splits[split].shards])


def _map_shard(folder: Path, shard: Shard, dtype: np.dtype, verify: bool) -> np.ndarray:
    path = folder / shard.file
    again = f"Delete {folder} and run `raygrow prepare` again"
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard is missing. {again}")
    expected, found = shard.tokens * dtype.itemsize, path.stat().st_size
    if found != expected:
        raise ValueError(f"{path}: this shard has {found} bytes instead of {expected}. {again}")
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise ValueError(f"{path}: the checksum is off, so its content is not what was written. {again}")
    return np.memmap(path, dtype=dtype, mode="r")
