"""Runs a function in a group of processes, as torchrun would."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import PROCESSES


def run_distributed(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` in `workers` processes joined by gloo; returns what each gave back, by rank.

    One worker is this process. The function must be importable (defined at the top of a test module).
    """
    with tempfile.TemporaryDirectory() as folder:
        if workers == 1:
            _enter(0, 1, folder, function, arguments)
        else:
            mp.start_processes(
                _enter,
                args=(workers, folder, function, arguments),
                nprocs=workers,
                start_method=PROCESSES.get_start_method(),
            )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(workers)]


def _enter(rank: int, workers: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
