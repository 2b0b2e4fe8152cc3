"""Training speed through Ray Train, beside a plain loop on the same GPU in the same run.

    python benchmarks/train_throughput.py                      both sizes, one GPU
    python benchmarks/train_throughput.py --workers 1 2        raygrow alone, on one GPU and on two (FSDP over NCCL)
    python benchmarks/train_throughput.py --smoke              tiny, also on a CPU: does it all work?

For each size the plain loop (`plain_loop.py`) runs before and after raygrow, and its faster run counts. raygrow runs as
`raygrow train` does, on shards of random tokens: Ray Train, FSDP2, data loading, reports. A figure is the median over
windows of steps after the first ones. MFU is against the datasheet's dense bf16 peak; the floor is the time that the
FLOPs would take at the rate of a large matrix product, measured in the same run.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import matmul_flops_per_second, write_results
from plain_loop import PlainLoop, Settings

from raygrow.config import RunConfig, WorkersConfig
from raygrow.data.corpus import FilesCorpus
from raygrow.data.prepare import content_settings
from raygrow.data.shards import TOKENIZER_FOLDER, Manifest, ShardWriter, SplitInfo
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters, peak_flops, training_flops_per_token
from raygrow.runtime.train import train
from raygrow.text.tokenizer import train_tokenizer
from raygrow.train.config import PhaseConfig, PlanConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and how it is trained."""

    model: ModelConfig
    batch_size: int
    micro_batch_size: int
    window_steps: int
    """Steps between two reports."""
    windows: int
    """Windows that count."""
    warmup_windows: int = 2

    @property
    def steps(self) -> int:
        return self.window_steps * (self.warmup_windows + self.windows)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.model, self.model.max_seq_len)


SIZES = {
    "135m": Size(
        model=ModelConfig(vocab_size=32_768, d_model=768, n_heads=6, d_ff=2048, blocks_per_stack=12, max_seq_len=1024),
        batch_size=128,
        micro_batch_size=128,
        window_steps=8,
        windows=5,
    ),
    "1b": Size(
        model=ModelConfig(
            vocab_size=32_768, d_model=2048, n_heads=16, d_ff=5632, blocks_per_stack=24, max_seq_len=2048
        ),
        batch_size=64,
        micro_batch_size=16,
        window_steps=1,
        windows=6,
    ),
}
SMOKE = Size(
    model=ModelConfig(vocab_size=512, d_model=64, n_heads=2, d_ff=128, blocks_per_stack=2, max_seq_len=64),
    batch_size=8,
    micro_batch_size=4,
    window_steps=2,
    windows=3,
)


def main() -> None:
    """Runs what was asked for, prints it as it comes, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--workers", nargs="+", type=int, help="compare numbers of GPUs instead; the batch grows along")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for shards and runs (25 GB)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    arguments = parser.parse_args()
    sizes = {"smoke": SMOKE} if arguments.smoke else {name: SIZES[name] for name in arguments.sizes}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context: dict[str, Any] = {"matmul_flops_per_second": None, "datasheet_flops_per_second": None}
    if device.type == "cuda":
        context["matmul_flops_per_second"] = _in_process(partial(matmul_flops_per_second, device))
        context["datasheet_flops_per_second"] = peak_flops(torch.cuda.get_device_name())
    rows = []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="throughput-") as work:
        for name, size in sizes.items():
            if arguments.workers:
                row = compare_workers(name, size, arguments.workers, Path(work))
            else:
                row = compare_with_plain(name, size, device, context, Path(work))
            rows.append(row)
            print(json.dumps(row, indent=2), flush=True)
    if not arguments.smoke:
        file = "throughput_workers" if arguments.workers else "train_throughput"
        print(f"written to {write_results(file, context | {'rows': rows})}")


def compare_with_plain(
    name: str, size: Size, device: torch.device, context: dict[str, Any], work: Path
) -> dict[str, Any]:
    """Measures raygrow between two runs of the plain loop."""
    run_plain = partial(plain_speed, size, device)
    before = _in_process(run_plain)
    raygrow = raygrow_speed(name, size, 1, work)
    after = _in_process(run_plain)
    plain = max(before, after)
    row: dict[str, Any] = {
        "size": name,
        "parameters": parameters(size.model),
        "flops_per_token": size.flops_per_token,
        "batch_size": size.batch_size,
        "micro_batch_size": size.micro_batch_size,
        "seq_len": size.model.max_seq_len,
        "plain_settings": "torch.compile of the whole model, bf16 over fp32 weights, cuDNN attention, fused AdamW, "
        "clipping, chunked loss with the Triton kernel, no FSDP, no data loading",
        "plain_tokens_per_second_before_and_after": [before, after],
        "plain_tokens_per_second": plain,
        "raygrow_tokens_per_second": raygrow,
        "ratio": raygrow / plain,
    }
    if context["matmul_flops_per_second"]:
        floor = size.flops_per_token / context["matmul_flops_per_second"]
        peak = context["datasheet_flops_per_second"]
        row |= {
            "raygrow_mfu": peak and raygrow * size.flops_per_token / peak,
            "plain_mfu": peak and plain * size.flops_per_token / peak,
            "floor_microseconds_per_token": 1e6 * floor,
            "raygrow_times_floor": 1 / raygrow / floor,
        }
    return row


def compare_workers(name: str, size: Size, counts: list[int], work: Path) -> dict[str, Any]:
    """Measures raygrow on several numbers of workers, each with the same work."""
    speeds = {n: raygrow_speed(name, replace(size, batch_size=n * size.batch_size), n, work) for n in counts}
    return {
        "size": name,
        "batch_size_per_worker": size.batch_size,
        "micro_batch_size": size.micro_batch_size,
        "tokens_per_second": speeds,
        "speedup": {n: speed / speeds[min(counts)] for n, speed in speeds.items()},
    }


def plain_speed(size: Size, device: torch.device) -> float:
    """Median tokens per second of the plain loop."""
    settings = Settings(
        batch_size=size.batch_size, micro_batch_size=size.micro_batch_size, seq_len=size.model.max_seq_len
    )
    windows = PlainLoop(size.model, settings, device).tokens_per_second(
        warmup=size.window_steps * size.warmup_windows, windows=size.windows, window_steps=size.window_steps
    )
    return statistics.median(windows)


def raygrow_speed(name: str, size: Size, workers: int, work: Path) -> float:
    """Median tokens per second of `raygrow train`, from its history."""
    run = RunConfig(
        name=f"{name}-{workers}",
        storage_path=str(work / "runs"),
        model=size.model,
        data=random_data(work / f"data-{name}", size),
        plan=PlanConfig(phases={"scratch": PhaseConfig(steps=size.steps)}),
        train=TrainConfig(
            seq_len=size.model.max_seq_len,
            batch_size=size.batch_size,
            micro_batch_size=size.micro_batch_size,
            report_every=size.window_steps,
            evaluate_every=size.steps,
            checkpoint_every=size.steps,
            evaluate_sequences=size.micro_batch_size,
        ),
        workers=WorkersConfig(num=workers, cpus=4 if torch.cuda.is_available() else 1),
    )
    if train(run):
        raise SystemExit(f"{run.name}: the run failed")
    lines = (work / "runs" / run.name / "history.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["tokens_per_second"] for line in lines[size.warmup_windows :])


def random_data(folder: Path, size: Size) -> FilesCorpus:
    """A prepared folder of random tokens: speed does not depend on what is learnt."""
    corpus = FilesCorpus(path=str(folder), files=())
    if folder.exists():
        return corpus
    folder.mkdir()
    tokenizer = train_tokenizer(["random"], 257)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    random, splits = np.random.default_rng(0), {}
    for split, sequences in (("train", 4 * size.batch_size), ("validation", size.micro_batch_size)):
        tokens = random.integers(0, size.model.vocab_size, sequences * size.model.max_seq_len + 1)
        writer = ShardWriter(folder, split, dtype=np.dtype("<u2"), shard_tokens=len(tokens))
        writer.write(tokens)
        splits[split] = SplitInfo(documents=1, bytes=len(tokens), tokens=len(tokens), shards=writer.finish())
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype="<u2",
        splits=splits,
        settings=content_settings(corpus),
    ).save(folder)
    return corpus


def _in_process(work: Callable[[], Any]) -> Any:
    """Runs in a process of its own, so that the GPU's memory is free again afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


if __name__ == "__main__":
    main()
