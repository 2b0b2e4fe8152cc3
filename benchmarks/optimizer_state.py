"""What to do with Adam's state when a model is stacked: copy it, drop it, or keep it for the first copy only?

    python benchmarks/optimizer_state.py                       everything: data, runs, table
    python benchmarks/optimizer_state.py --smoke               tiny, also on a CPU: does it all work?

3 blocks of d 512, trained on 10 % of the FLOPs of 36M tokens, stacked 4 times, then the rest. Each choice is run with
and without warming the learning rate up again, for two seeds (which decide the initial weights and the order of the
data). All runs of a seed grow the same base.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import write_results
from growth_search import Bench

from raygrow.report.estimate import estimate, interval
from raygrow.report.search import Setting, load_search

SOON = 100
"""Steps after growth at which the loss is read too."""
GROWN = ["plan=gstack", "plan.phases.base.share=0.1", "plan.phases.stacked.growth.factor=4"]


def main() -> None:
    """Runs what is not finished yet, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-gpu", type=int, default=2, help="trials that share a GPU")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "growth_search")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, smoke=arguments.smoke, per_gpu=arguments.per_gpu)
    bench.prepare()
    budget = "plan.tokens=40e3" if arguments.smoke else "plan.tokens=36e6"
    folder = bench.search("optimizer_state", "optimizer_state", *GROWN, budget)
    (contest,) = load_search([folder]).contests
    rows = sorted(map(row, contest.settings), key=lambda row: (row["warmup_steps"], row["optimizer_state"]))
    print_table(rows)
    if not arguments.smoke:
        print(f"written to {write_results('optimizer_state', {'rows': rows, 'commands': bench.commands})}")


def row(setting: Setting) -> dict[str, Any]:
    """Validation loss soon after growth and at the end, for every seed."""
    soon, end = [], []
    for trial in setting.finished.values():
        assert trial.run, "a finished trial has a run folder"
        scored = [line for line in trial.run.history if line["phase"] == "stacked" and "val_loss" in line]
        soon.append(min(scored, key=lambda line: abs(line["step"] - SOON))["val_loss"])
        end.append(scored[-1]["val_loss"])
    chosen = {key.rpartition(".")[2]: value for key, value in setting.values.items()}
    return {**chosen, "seeds": list(setting.finished), "soon": soon, "end": end}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds."""
    print(f"{'optimizer_state':<17}{'warmup':>7}{f'val loss, {SOON} steps':>21}{'at the end':>18}{'seeds':>20}")
    for line in rows:
        seeds = " ".join(f"{loss:.4f}" for loss in line["end"])
        soon, end = (interval(estimate(line[key])) for key in ("soon", "end"))
        print(f"{line['optimizer_state']:<17}{line['warmup_steps']:>7}{soon:>21}{end:>18}{seeds:>20}")


if __name__ == "__main__":
    main()
