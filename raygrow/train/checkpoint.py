"""Sharded checkpoints (torch's DCP): weights, Adam's state and progress in one, readable by any number of workers.

A checkpoint is a flat table: `model.<parameter>`, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`,
`step.<parameter>`, and `progress.<name>`.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from raygrow.train.optimizer import ensure_state, state_tensors


@dataclass
class Progress:
    """Where a phase stands. Tokens and FLOPs follow from the step."""

    step: int = 0
    seconds: float = 0.0
    """Training time of the run so far."""
    lowest_loss: float = float("inf")


def state_table(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Tensor]:
    """All that a checkpoint holds, as live tensors."""
    ensure_state(optimizer)
    table = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for key, tensors in state_tensors(model, optimizer).items():
        table |= {f"{key}.{name}": tensor for name, tensor in tensors.items()}
    return table | {f"progress.{k}": torch.tensor(float(v), dtype=torch.float64) for k, v in asdict(progress).items()}


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Loads a checkpoint in place, resharding where the number of workers has changed.

    Raises:
        ValueError: If the checkpoint lacks a tensor of the model or has it in another shape.
    """
    table = state_table(model, optimizer, Progress())
    stored = CheckpointTensors(folder)
    missing = [name for name in table if name not in stored]
    if missing:
        raise ValueError(f"checkpoint {folder} has no tensor {missing[0]!r} ({len(missing)} missing): another model?")
    for name, tensor in table.items():
        if stored.shape(name) != tensor.shape:
            shapes = f"{tuple(stored.shape(name))} and not {tuple(tensor.shape)}"
            raise ValueError(f"checkpoint {folder} has {name!r} in shape {shapes}: another model?")
    dcp_load(table, checkpoint_id=folder)
    values = {field.name: table[f"progress.{field.name}"].item() for field in fields(Progress)}
    return Progress(step=int(values.pop("step")), **values)


class CheckpointTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, each read whole when asked for and kept until the next one is.

    Args:
        folder: The checkpoint.
        prefix: Only names under this prefix, which is left off (`model.`).
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        if not (folder / ".metadata").is_file():
            raise FileNotFoundError(f"{folder} is not a whole checkpoint: it has no .metadata file")
        self._newest: tuple[str, Tensor] | None = None
        self._reader = _Reader(folder)
        stored = self._reader.read_metadata().state_dict_metadata
        self._stored = {
            name.removeprefix(prefix): entry
            for name, entry in stored.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, without reading it."""
        return self._stored[name].size

    def __getitem__(self, name: str) -> Tensor:
        if self._newest and self._newest[0] == name:  # growth makes every expert from the same tensor, one by one
            return self._newest[1]
        entry = self._stored[name]
        self._newest = None
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone is what is meant here
            dcp_load({self.prefix + name: tensor}, storage_reader=self._reader, no_dist=True)
        self._newest = name, tensor
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Reader(FileSystemReader):
    """Reads what a checkpoint holds once, not again for every tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self._metadata


class AsyncSaver:
    """Writes checkpoints in the background, one at a time.

    The background thread talks through a process group of its own: on the training group its messages would mix with
    those of the training step.
    """

    def __init__(self) -> None:
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pending: tuple[Future, Path, int] | None = None
        self._bytes = 0

    def start(self, table: dict[str, Tensor], folder: Path, step: int) -> None:
        """Copies the tensors aside and writes them while training goes on. Finish the last one first."""
        assert self._pending is None, "the checkpoint before is still being written"
        future = cast(Future, async_save(table, checkpoint_id=folder, process_group=self._group))
        self._pending = future, folder, step
        self._bytes = sum(tensor.numel() * tensor.element_size() for tensor in table.values())

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None

    def is_written(self) -> bool:
        """Whether this worker's part is on disk (false when nothing is pending)."""
        return self._pending is not None and self._pending[0].done()

    def finish(self) -> tuple[Path, int]:
        """Waits for the pending checkpoint; returns its folder and step.

        Raises:
            OSError: If it could not be written, on every worker; what there was of it is removed.
        """
        assert self._pending is not None, "no checkpoint is pending"
        (future, folder, step), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointException as error:
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free
            room = f"it takes {self._bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there"
            causes = [failure[0] for failure in error.failures.values()]
            # torch's writer talks of positions in its file where the system said why
            plain = [cause for cause in causes if isinstance(cause, OSError)] or causes
            raise OSError(
                f"the checkpoint of step {step} could not be written to {folder} ({room}): {plain[0]}"
            ) from None
        return folder, step
