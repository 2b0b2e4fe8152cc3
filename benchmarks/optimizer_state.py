"""What to do with Adam's state when a model is stacked: copy it, drop it, or keep it for the first copy only?

    python benchmarks/optimizer_state.py                       everything: data, runs, table
    python benchmarks/optimizer_state.py --gpus 0 1 2          one lane of runs for each GPU named
    python benchmarks/optimizer_state.py --smoke               tiny, also on a CPU: does it all work?

3 blocks of d 512, trained on 10 % of the FLOPs, stacked 4 times, then the rest: the setting of `gstack_speedup.py`,
whose data and runs' settings are used. Each choice is run with and without warming the learning rate up again, for
several seeds (which decide the initial weights and the order of the data).
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import write_results
from gstack_speedup import COMMON, DATA, SMOKE, SMOKE_DATA, execute, grown, is_finished, run_lanes, shown

from raygrow.report.runs import load_run

CHOICES = ("copy", "drop", "asymmetric")
WARMUPS = (0, 50)
SOON = 100
"""Steps after growth at which the loss is read too."""


def main() -> None:
    """Runs what is not finished yet, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=["0", "0"], help="one lane of runs for each GPU named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "optimizer_state")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder / "smoke" if arguments.smoke else arguments.folder
    data = [*(SMOKE_DATA if arguments.smoke else DATA), f"data.path={folder / 'python'}"]
    settings = [*COMMON, *(SMOKE if arguments.smoke else []), *data, f"storage_path={folder / 'runs'}"]
    commands = {
        run_name(seed, warmup, choice): command(seed, warmup, choice, settings)
        for seed in arguments.seeds
        for warmup in WARMUPS
        for choice in CHOICES
    }
    execute(["jobs/prepare_data.py", "data=python_source", *data], folder / "prepare.log")
    run_lanes({name: words for name, words in commands.items() if not done(folder, name)}, arguments.gpus, folder)
    rows = [row(choice, warmup, arguments.seeds, folder) for warmup in WARMUPS for choice in CHOICES]
    print_table(rows)
    if not arguments.smoke:
        lines = {name: shown(words) for name, words in commands.items()}
        print(f"written to {write_results('optimizer_state', {'rows': rows, 'commands': lines})}")


def run_name(seed: int, warmup: int, choice: str) -> str:
    """What an arm's run is called."""
    return f"{choice}-warmup-{warmup}-seed-{seed}"


def command(seed: int, warmup: int, choice: str, settings: list[str]) -> list[str]:
    """The `raygrow train` command of an arm."""
    stacked = "plan.phases.stacked"
    own = [f"{stacked}.optimizer_state={choice}", f"{stacked}.warmup_steps={warmup}", f"seed={seed}"]
    return ["jobs/train.py", f"name={run_name(seed, warmup, choice)}", *settings, *grown(4, 0.10), *own]


def done(folder: Path, name: str) -> bool:
    """Whether an arm's run is there."""
    return is_finished(folder / "runs" / name)


def row(choice: str, warmup: int, seeds: list[int], folder: Path) -> dict[str, Any]:
    """Validation loss of a choice soon after growth and at the end, for every seed."""
    soon, end = [], []
    for seed in seeds:
        run = load_run(folder / "runs" / run_name(seed, warmup, choice))
        scored = [line for line in run.history if line["phase"] == "stacked" and "val_loss" in line]
        soon.append(min(scored, key=lambda line: abs(line["step"] - SOON))["val_loss"])
        end.append(scored[-1]["val_loss"])
    return {"optimizer_state": choice, "warmup_steps": warmup, "seeds": seeds, "soon": soon, "end": end}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean and spread over the seeds."""
    print(f"{'optimizer_state':<17}{'warmup':>7}{f'val loss, {SOON} steps':>21}{'at the end':>12}{'seeds':>20}")
    for line in rows:
        seeds = " ".join(f"{loss:.4f}" for loss in line["end"])
        print(
            f"{line['optimizer_state']:<17}{line['warmup_steps']:>7}{statistics.mean(line['soon']):>21.4f}"
            f"{statistics.mean(line['end']):>12.4f}{seeds:>20}"
        )


if __name__ == "__main__":
    main()
