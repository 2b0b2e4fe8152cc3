"""What every benchmark does alike: say what it ran on, measure the device's own ceiling, write rows of results."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from raygrow.evaluate.record import commit, versions
from raygrow.evaluate.speed import processor

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """GPUs where there are any, else the processor, in words."""
    cores = f"{os.cpu_count()} {platform.machine()} cores, {processor()}"
    if not torch.cuda.is_available():
        return cores
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {cores}"


def command() -> str:
    """The command line that ran this."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def origin(command: str) -> dict[str, Any]:
    """All that is needed to get figures again.

    The commit is read from the environment (COMMIT) on a machine that has the files but not their history.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "commit": os.environ.get("COMMIT") or commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions()},
    }


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Writes `results/<name>.json`: the figures, and what is needed to get them again."""
    row = {"benchmark": name, **origin(command()), **content}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(row, indent=2) + "\n")
    return file


def matmul_flops_per_second(device: torch.device, *, size: int = 8192, repeats: int = 20) -> float:
    """Measured rate of a large bf16 matrix product of random numbers: the ceiling that nothing here can pass."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def copy_bytes_per_second(device: torch.device, *, size: int = 2**32, repeats: int = 10) -> float:
    """Measured rate of a large copy within the device's memory, bytes read and bytes written together."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size / best
