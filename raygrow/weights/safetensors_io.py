"""Safetensors folders, read lazily and written tensor by tensor, so that a model never has to fit in memory.

A file is an 8-byte length, a JSON header of that length (name -> dtype, shape, byte range), then the raw tensors.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raygrow.weights.json_file import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_WRITE_BYTES = 1 << 17
"""Passing a memory map on in pieces that fit the CPU's cache takes the kernel half the time of one large write."""

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder, by the names they are stored under.

    A tensor is a view of the memory-mapped file: it costs no anonymous memory and must not be written to.

    Raises:
        FileNotFoundError: If the folder has no safetensors, or a file that its index names is missing.
        ValueError: If a file is damaged, does not hold what the index says, or stores a tensor in a dtype that raygrow
            does not know.
    """

    def __init__(self, path: Path) -> None:
        index = _read_index(path)
        files = sorted(set(index.values())) if index else [SINGLE_FILE]
        self._opened = {file: _open(path / file) for file in files}
        names = {file: opened.keys() for file, opened in self._opened.items()}
        self._file_of = {name: file for file in files for name in names[file]}
        for name, file in index.items():
            if self._file_of.get(name) != file:
                raise ValueError(f"tensor {name!r} is missing from {path / file}, where {INDEX_FILE} says it is")
        for name, file in self._file_of.items():
            dtype = self._opened[file].get_slice(name).get_dtype()
            if dtype not in _DTYPE_NAMES.values():
                raise ValueError(f"{path / file}: tensor {name!r} is stored as {dtype}; convert the model to bfloat16")

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[self._file_of[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor; reads headers only."""
        return {
            name: torch.Size(self._opened[file].get_slice(name).get_shape()) for name, file in self._file_of.items()
        }


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    names: Iterable[str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, torch.dtype]:
    """Writes tensors as they come, into one file or into several with an index.

    Args:
        folder: An existing folder without safetensors.
        tensors: Names and tensors; one at a time is held.
        names: At least the names that will come: room for them is kept in front of the data.
        max_shard_bytes: A file is closed before it grows beyond this, unless a single tensor does.

    Returns:
        The dtype of every tensor written, by name.
    """
    room = _header_room(names)
    shards: list[_Shard] = []
    dtypes = {}
    for name, tensor in tensors:
        dtypes[name] = tensor.dtype
        if not shards or shards[-1].would_exceed(max_shard_bytes, tensor):
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"unnamed-{len(shards)}", room))
        shards[-1].add(name, tensor)
    shards[-1].close()
    _name_shards(folder, shards)
    return dtypes


class _Shard:
    """A file in the making: the header's place is kept free, because it can only be known when the data is written."""

    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room, self.size = path, room, 0
        self.entries: dict[str, dict[str, Any]] = {}
        self._file = path.open("wb")
        self._file.seek(8 + room)

    def would_exceed(self, limit: int, tensor: Tensor) -> bool:
        return bool(self.entries) and self.size + tensor.nbytes > limit

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, data.nbytes, _WRITE_BYTES):
            self._file.write(data[start : start + _WRITE_BYTES].tobytes())
        self.entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + data.nbytes],
        }
        self.size += data.nbytes

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        assert len(header) <= self.room, "a tensor came whose name was not announced"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.room) + header.ljust(self.room))
        self._file.close()


def _header_room(names: Iterable[str]) -> int:
    # an entry beside its name: dtype, up to four axes and two offsets of 20 digits, punctuation
    room = 64 + sum(len(name) + 220 for name in names)
    return room + -room % 8


def _name_shards(folder: Path, shards: list[_Shard]) -> None:
    if len(shards) == 1:
        shards[0].path.rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.entries, file)
    index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file; empty for a folder with a single file."""
    if (path / INDEX_FILE).exists():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not is_map or not weight_map:
            raise ValueError(f"{path / INDEX_FILE} has no `weight_map`, which says where each tensor is: copy it again")
        return weight_map
    if not (path / SINGLE_FILE).exists():
        raise FileNotFoundError(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: raygrow reads safetensors only, convert other "
            "formats with transformers' save_pretrained"
        )
    return {}


def _open(file: Path) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing, though {INDEX_FILE} names it: copy it there again")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}): copy it there again") from error
