"""Does stacking pay? 12 blocks of d 512 on Python source, from scratch and grown by Gstack, at equal FLOPs.

    python benchmarks/gstack_speedup.py                        everything: data, runs, comparison, plot
    python benchmarks/gstack_speedup.py --gpus 0 0 1 1         more GPUs; one named twice trains two runs at a time
    python benchmarks/gstack_speedup.py --plot                 the plot alone, from the results on file
    python benchmarks/gstack_speedup.py --smoke                tiny, also on a CPU: does it all work?

Every run is a `raygrow train` command, which is kept with its result. All see the same data in the same order; the
FLOPs count the base model and the LM head. Besides the runs at equal FLOPs, two from scratch are longer. Between the
ends of those from scratch lies the one that would end at a grown run's loss, and with it that run's speedup,
FLOPs_scratch / FLOPs_grown - 1 (arXiv 2405.15319). Only ends are compared: the learning rate decays over the last 20 %.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import RESULTS, write_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from raygrow.report.plots import STYLE
from raygrow.report.runs import Run, load_run

ROOT = Path(__file__).resolve().parents[1]
PLOT = Path(__file__).with_suffix(".png")
SCRATCH, LONGER, LONGEST = "scratch", "scratch-120M", "scratch-130M"
COLORS = {SCRATCH: "#e27a00", LONGER: "#a3740a", LONGEST: "#6b4c06"}
GROWN_COLORS = ("#3d7ff0", "#0fa37f", "#7db4f5", "#a06af0")


def grown(factor: int, share: float) -> list[str]:
    """What the command line says about one way to grow."""
    return [
        "plan=gstack",
        f"plan.phases.base.share={share}",
        f"plan.phases.stacked.growth.factor={factor}",
        "plan.phases.stacked.warmup_steps=20",
    ]


PLANS = {
    LONGEST: ["plan=scratch", "plan.tokens=130e6"],
    LONGER: ["plan=scratch", "plan.tokens=120e6"],
    SCRATCH: ["plan=scratch"],
    "3x4-10": grown(4, 0.10),
    "6x2-20": grown(2, 0.20),
    "3x4-5": grown(4, 0.05),
    "2x6-4": grown(6, 0.04),
}
"""Name (blocks of the base x factor - the base's share of the FLOPs in %) and what sets the run apart; the longest
first, so that lanes end together."""

COMMON = [
    "model=decoder/llama/small",
    "data=python_source",
    "plan.tokens=90e6",
    "train.seq_len=1024",
    "train.batch_size=64",
    "train.optimizer.lr=2e-3",
    "train.schedule.warmup_steps=50",
    "train.evaluate_every=50",
    "train.evaluate_sequences=512",
    "train.checkpoint_every=10000",
]
DATA = ["data.roots=site-packages", "data.tokenizer.vocab_size=16384"]
SMOKE = [
    *("model=tiny", "plan.tokens=20e3", "train.seq_len=64", "train.batch_size=8", "train.evaluate_every=10"),
    *("train.evaluate_sequences=16", "model.d_model=48", "model.d_ff=64", "model.blocks_per_stack=12"),
]
FULL_LENGTH = ("plan.tokens=120e6", "plan.tokens=130e6")
SMOKE_DATA = [f"data.roots=[{ROOT / 'raygrow'}]", "data.tokenizer.vocab_size=512"]


def main() -> None:
    """Runs what is not finished yet, compares, writes the row and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(PLANS), default=list(PLANS), help="compare once all are done")
    parser.add_argument("--gpus", nargs="+", default=["0", "0"], help="one lane of runs for each GPU named")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gstack_speedup")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--plot", action="store_true", help="only draw the results on file")
    arguments = parser.parse_args()
    if arguments.plot:
        draw(json.loads((RESULTS / "gstack_speedup.json").read_text())["rows"], PLOT)
        return
    folder = arguments.folder / "smoke" if arguments.smoke else arguments.folder
    data = [*(SMOKE_DATA if arguments.smoke else DATA), f"data.path={folder / 'python'}"]
    settings = [*COMMON, *(SMOKE if arguments.smoke else []), *data, f"storage_path={folder / 'runs'}"]
    prepared = ["jobs/prepare_data.py", "data=python_source", *data]
    commands = {name: ["jobs/train.py", f"name={name}", *settings, *PLANS[name]] for name in PLANS}
    if arguments.smoke:
        commands = {name: [word for word in words if word not in FULL_LENGTH] for name, words in commands.items()}
    execute(prepared, folder / "prepare.log")
    left = {name: commands[name] for name in arguments.runs if not is_finished(folder / "runs" / name)}
    run_lanes(left, arguments.gpus, folder)
    if not all(is_finished(folder / "runs" / name) for name in PLANS):
        print(f"not all runs are there yet: {folder / 'runs'}")
        return
    rows = compare_all({name: load_run(folder / "runs" / name) for name in PLANS}, commands)
    print_table(rows)
    if arguments.smoke:
        draw(rows, folder / PLOT.name)
    else:
        content = {"prepare": shown(prepared), "tokens": tokens_in(folder / "python"), "rows": rows}
        print(f"written to {write_results('gstack_speedup', content)}")
        draw(rows, PLOT)


def is_finished(run: Path) -> bool:
    """Whether a run folder says so."""
    return (run / "summary.json").exists() and load_run(run).status == "finished"


def run_lanes(commands: dict[str, list[str]], gpus: list[str], folder: Path) -> None:
    """Trains the runs: one lane per GPU named, each taking the next run when it is free."""
    waiting: queue.Queue[tuple[str, list[str]]] = queue.Queue()
    for item in commands.items():
        waiting.put(item)
    failed: list[str] = []

    def lane(gpu: str) -> None:
        while not failed:
            try:
                name, words = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                execute(words, folder / f"{name}.log", gpu=gpu)
            except subprocess.CalledProcessError:
                failed.append(name)

    lanes = [threading.Thread(target=lane, args=(gpu,)) for gpu in gpus]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    if failed:
        raise SystemExit(f"{failed[0]} failed: {folder / failed[0]}.log says why")


def execute(words: list[str], log: Path, *, gpu: str | None = None) -> None:
    """Runs one command of this repository, its output into a file."""
    print(shown(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
        )


def shown(words: list[str]) -> str:
    """A command as one types it."""
    return " ".join(["python", *words])


def tokens_in(folder: Path) -> dict[str, int]:
    """Tokens of the prepared splits."""
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    return {name: split["tokens"] for name, split in splits.items()}


def compare_all(runs: dict[str, Run], commands: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One row per run: how it ended, its curve, and its gain and speedup over the runs from scratch."""
    rows = []
    for name, run in runs.items():
        flops, loss, tokens = run.columns("flops", "val_loss", "tokens")
        row: dict[str, Any] = {
            "name": name,
            "flops": flops[-1],
            "tokens": tokens[-1],
            "val_loss": loss[-1],
            "val_bits_per_byte": run.last("val_bits_per_byte"),
            "seconds": run.last("seconds"),
            "base_share": run.phases[0].end_flops / flops[-1] if run.is_grown else 0.0,
            "command": shown(commands[name]),
            "curve": {"flops": flops.tolist(), "val_loss": loss.tolist()},
            "growth": run.growths,
        }
        rows.append(row)
    add_speedups(rows)
    return rows


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Sets each grown row's gain at equal FLOPs, and its speedup where its loss lies between those from scratch."""
    ends = sorted((row["val_loss"], row["flops"]) for row in rows if not row["growth"])
    losses, flops = zip(*ends, strict=True)
    scratch = next(row for row in rows if row["name"] == SCRATCH)
    for row in rows:
        if row["growth"]:
            row["gain"] = scratch["val_loss"] - row["val_loss"]
            needed = np.interp(row["val_loss"], losses, flops, left=np.nan, right=np.nan)
            row["speedup"] = None if np.isnan(needed) else float(needed / row["flops"] - 1)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, the lowest loss first."""
    print(f"{'run':<16}{'tokens':>8}{'FLOPs':>10}{'base':>7}{'val loss':>10}{'gain':>8}{'speedup':>9}")
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        gains = f"{row['gain']:>8.3f}" if "gain" in row else ""
        gains += f"{row['speedup']:>9.1%}" if row.get("speedup") is not None else ""
        print(
            f"{row['name']:<16}{row['tokens'] / 1e6:>7.1f}M{row['flops']:>10.2e}{row['base_share']:>7.1%}"
            f"{row['val_loss']:>10.4f}{gains}"
        )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Validation loss against FLOPs: the whole runs, and their end with the speedups at equal loss."""
    colors = COLORS | dict(zip((row["name"] for row in rows if "gain" in row), GROWN_COLORS, strict=False))
    with plt.rc_context(STYLE):
        figure, (whole, end) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for row in sorted(rows, key=lambda row: row["val_loss"]):
            curve, color = row["curve"], colors[row["name"]]
            share = f" (base {row['base_share']:.0%} of the FLOPs)" if "gain" in row else ""
            for axes, label in ((whole, row["name"] + share), (end, f"{row['val_loss']:.3f}  {row['name']}")):
                axes.plot(curve["flops"], curve["val_loss"], color=color, label=label)
                axes.plot(row["flops"], row["val_loss"], "o", color=color, markersize=5)
        losses = [row["val_loss"] for row in rows]
        longest = max(row["flops"] for row in rows)
        whole.set(xscale="log", title="12 blocks of d 512 on Python source", ylabel="validation loss, nats per token")
        end.set(xlim=(0.55 * longest, 1.08 * longest), ylim=(min(losses) - 0.03, max(losses) + 0.2))
        best = min((row for row in rows if "gain" in row), key=lambda row: row["val_loss"])
        end.set(title=f"The end: {best['name']} is {best['gain']:.3f} nats lower at equal FLOPs")
        for axes in (whole, end):
            axes.set_xlabel("training FLOPs, base and LM head included")
            axes.legend(loc="upper right")
        figure.savefig(file, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    main()
