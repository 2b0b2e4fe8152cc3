"""Time, memory and bytes of growing a 1.1B-parameter Llama folder to twice its depth or to a Mixtral, beside `cp`.

    python benchmarks/grow_folder.py [--to deeper | --to mixtral] [--folder /tmp] [--rounds 3]

Each round times, one right after the other and with warm caches, `cp` of a folder of the output's size, reading the
input, and growing in a process of its own whose anonymous memory (RssAnon) is sampled. A time is taken twice: when the
work returns, and when everything written is on the disk (`sync`), for both sides alike. CPU seconds are given too: they
hardly change when the machine is busy with other work. A growth before the rounds has its source only on the disk: it
counts the bytes that come from there. Needs about 11 GB of disk, 28 GB for a Mixtral.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.weights.folder import write_folder
from raygrow.weights.shapes import parameter_shapes

TINY_LLAMA = ModelConfig(
    vocab_size=32_000, d_model=2048, n_heads=32, n_kv_heads=4, d_ff=5632, n_stacks=1, blocks_per_stack=22
)
OPERATORS = {"deeper": "Gstack(factor=2)", "mixtral": "Experts(n_experts=8, top_k=2)"}
GROW = """
import json, sys, time
from pathlib import Path
from raygrow.growth.experts import Experts
from raygrow.growth.folder import grow_folder
from raygrow.growth.gstack import Gstack

def io():
    return {key: int(value) for key, value in (line.split(": ") for line in Path("/proc/self/io").open())}

before, start = io(), time.process_time()
summary = grow_folder(sys.argv[1], sys.argv[2], eval(sys.argv[3]))
figures = {"seconds": summary["seconds"], "cpu_seconds": time.process_time() - start}
print(json.dumps(figures | {key: value - before[key] for key, value in io().items()}))
"""
SAMPLE_SECONDS = 0.005


def main() -> None:
    """Runs the rounds, prints a table, writes one JSON row."""
    parser = argparse.ArgumentParser(description="Time, memory and bytes of growing a 1.1B-parameter folder.")
    parser.add_argument("--to", choices=OPERATORS, default="deeper", help="what to grow into (default: deeper)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to put the models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="grow_folder-") as work:
        cold, rounds = measure(Path(work), arguments.to, arguments.rounds)
    row = summarize(arguments.to, cold, rounds)
    print_table(rounds, row)
    arguments.results.mkdir(exist_ok=True)
    name = "grow_folder" if arguments.to == "deeper" else f"grow_folder_{arguments.to}"
    file = arguments.results / f"{name}_{platform.machine()}_{time.strftime('%Y%m')}.json"
    file.write_text(json.dumps(row, indent=2) + "\n")
    print(f"written to {file}")


def measure(work: Path, to: str, rounds: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Makes the source and grows it: once from the disk, where the result is what `cp` copies, then round by round."""
    source, same_size = work / "source", work / "same-size"
    print(f"writing a folder of {parameters(TINY_LLAMA):,} random bf16 parameters", flush=True)
    write_folder(source, TINY_LLAMA, random_tensors(), format="hf")
    drop_from_memory(source)
    first = grow(source, same_size, to)
    cold = {
        "source_bytes": tensor_bytes(source),
        "read_bytes": first["read_bytes"],
        "target_bytes": tensor_bytes(same_size),
        "written_bytes": first["wchar"],
    }
    measured = []
    for _ in range(rounds):
        copied = timed(lambda: subprocess.run(["cp", "-r", same_size, work / "copy"], check=True))
        shutil.rmtree(work / "copy")
        read = timed(lambda: read_through(source / "model.safetensors"))
        result: dict[str, float] = {}
        grown = timed(lambda result=result: result.update(grow(source, work / "grown", to)))
        start_up = grown["returned"] - result["seconds"]  # interpreter and imports, not part of growing
        shutil.rmtree(work / "grown")
        measured.append(
            {
                "grow_seconds": result["seconds"],
                "copy_seconds": copied["returned"] + read["returned"],
                "grow_synced_seconds": grown["synced"] - start_up,
                "copy_synced_seconds": copied["synced"] + read["returned"],
                "grow_cpu_seconds": result["cpu_seconds"],
                "copy_cpu_seconds": copied["cpu"] + read["cpu"],
                "start_up_seconds": start_up,
                "peak_anonymous_bytes": result["peak_anonymous_bytes"],
            }
        )
    return cold, measured


def random_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """The source's tensors, one at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in parameter_shapes(TINY_LLAMA).items():
        yield name, torch.empty(shape).normal_(0, 0.02, generator=generator).bfloat16()


def grow(source: Path, target: Path, to: str) -> dict[str, float]:
    """Grows in a process of its own; its seconds, CPU seconds, bytes (/proc/self/io) and peak of anonymous memory."""
    command = [sys.executable, "-c", GROW, source, target, OPERATORS[to]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"growing failed with exit code {process.returncode}")
    return json.loads(output) | {"peak_anonymous_bytes": peak}


def tensor_bytes(folder: Path) -> int:
    """Size of the files of tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_memory(folder: Path) -> None:
    """Leaves a folder's files on the disk only."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)


def read_through(file: Path) -> None:
    """Reads a file once, in pieces."""
    piece = bytearray(1 << 20)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(piece):
            pass


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds until the work returns, until what it wrote is on the disk, and CPU seconds with child processes."""
    os.sync()
    cpu_start = sum(os.times()[:4])
    start = time.perf_counter()
    work()
    returned, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    os.sync()
    return {"returned": returned, "synced": time.perf_counter() - start, "cpu": cpu}


def summarize(to: str, cold: dict[str, float], rounds: list[dict[str, float]]) -> dict[str, object]:
    """One result row: medians over the rounds, and where and how they were measured."""
    medians = {key: statistics.median(result[key] for result in rounds) for key in rounds[0]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": "grow_folder",
        "model": f"1.1B parameters, bf16, Hugging Face Llama, {OPERATORS[to]}",
        **medians,
        "from_disk": cold,
        "ratio": medians["grow_seconds"] / medians["copy_seconds"],
        "ratio_cpu": medians["grow_cpu_seconds"] / medians["copy_cpu_seconds"],
        "ratio_synced": medians["grow_synced_seconds"] / medians["copy_synced_seconds"],
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "hardware": f"{os.cpu_count()} cores {platform.machine()}, {_cpu_name()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(rounds: list[dict[str, float]], row: dict[str, object]) -> None:
    """The rounds, one per line, and the medians' ratios."""
    columns = {
        "grow s": "grow_seconds",
        "cp+read s": "copy_seconds",
        "grow+sync s": "grow_synced_seconds",
        "cp+read+sync s": "copy_synced_seconds",
        "grow CPU s": "grow_cpu_seconds",
        "cp+read CPU s": "copy_cpu_seconds",
    }
    print("  ".join(columns), " peak RssAnon MB")
    for result in rounds:
        times = [f"{result[key]:{len(title)}.2f}" for title, key in columns.items()]
        print("  ".join(times), f"{result['peak_anonymous_bytes'] / 1e6:16.0f}")
    print(
        f"growing takes {row['ratio']:.2f} x cp + read, {row['ratio_synced']:.2f} x with sync, "
        f"{row['ratio_cpu']:.2f} x in CPU time (medians)"
    )
    cold: Any = row["from_disk"]
    print(
        f"from the disk come {cold['read_bytes']:,} bytes of a source of {cold['source_bytes']:,}; "
        f"{cold['written_bytes']:,} are written for a target of {cold['target_bytes']:,}"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
