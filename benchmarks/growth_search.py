"""What the benchmarks of growth share: one model on one corpus, and searches over it by `raygrow tune`.

12 blocks of d 512 (39M parameters in blocks) on the Python source of the machine's installed packages, 16k vocabulary,
33k tokens a step. Every search is a command that can be typed; trials share their trunks, and a search that is stopped
goes on. One that has ended is kept, and not run again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import origin
from kept_search import keep, restore

ROOT = Path(__file__).resolve().parents[1]
SPACES = Path(__file__).resolve().parent / "spaces"

DATA = ["data.roots=site-packages", "data.tokenizer.vocab_size=16384"]
SETTINGS = [
    *("model=decoder/llama/small", "data=python_source", "train.seq_len=1024", "train.batch_size=32"),
    *("train.optimizer.lr=1e-3", "train.schedule.warmup_steps=100"),
    *("train.evaluate_every=100", "train.evaluate_sequences=512", "train.checkpoint_every=10000"),
]
SMOKE_DATA = [f"data.roots=[{ROOT / 'raygrow'}]", "data.tokenizer.vocab_size=512"]
SMOKE = [
    *("model=tiny", "model.d_model=48", "model.n_heads=2", "model.d_ff=64", "model.blocks_per_stack=12"),
    *("train.seq_len=64", "train.batch_size=8", "train.evaluate_every=10", "train.evaluate_sequences=16"),
    "train.schedule.warmup_steps=10",
]
"""Stand in for the settings above where they are given after them."""


PLACES = "data.path=", "storage_path="
"""What a machine's own settings begin with."""


class Bench:
    """Runs a benchmark's commands.

    Args:
        folder: Holds data, searches and logs.
        smoke: Tiny models on little data.
        per_gpu: Trials that share a GPU, but for a smoke run.
        kept: Where searches are kept that have ended, if they are; in `folder/kept` for a smoke run.
    """

    def __init__(self, folder: Path, *, smoke: bool, per_gpu: int, kept: Path | None = None) -> None:
        self.folder = folder / "smoke" if smoke else folder
        self._kept = kept and (self.folder / "kept" if smoke else kept)
        self.data = self.folder / "python"
        data = [*(SMOKE_DATA if smoke else DATA), f"data.path={self.data}"]
        self._prepare = ["jobs/prepare_data.py", "data=python_source", *data]
        self._settings = [*SETTINGS, *(SMOKE if smoke else []), *data, f"storage_path={self.folder}"]
        self._settings.append("space.trial.gpus=auto" if smoke or per_gpu == 1 else f"space.trial.gpus={1 / per_gpu:g}")
        self.commands: dict[str, str] = {}
        """Every command that was run, by the name of its log."""
        self.origins: dict[str, dict[str, Any]] = {}
        """Where and how every search was run, here or elsewhere."""

    def prepare(self) -> None:
        """Tokenizes the corpus, where that has not been done."""
        self._run("prepare", self._prepare)

    def restore(self) -> None:
        """Brings back what is kept, so that later searches can be told what it has found."""
        for file in sorted(self._kept.glob("*.zip")) if self._kept else ():
            self.origins[file.stem] = restore(file, self.folder / file.stem)

    def search(self, name: str, space: str, *words: str) -> Path:
        """Runs a search to its end, or on to it, unless it is kept already. Returns its folder."""
        file, folder = SPACES / f"{space}.yaml", self.folder / name
        words = (f"name={name}", f"space={file.relative_to(ROOT)}", *self._settings, *words)
        # the same on every machine
        told = " ".join(["python jobs/tune.py", *(word for word in words if not word.startswith(PLACES))])
        asked = {"command": told, "space": file.read_text()}
        if name in self.origins:
            if {key: self.origins[name][key] for key in asked} != asked:
                raise SystemExit(f"{name} is kept in {self._kept}, but was another search: remove it to run this one")
            return folder
        self._run(name, ["jobs/tune.py", *words])
        self.origins[name] = origin(told) | asked
        failed = any(trial["status"] == "failed" for trial in json.loads((folder / "results.json").read_text()))
        if self._kept and not failed:  # failed trials are tried again
            keep(folder, self._kept / f"{name}.zip", self.origins[name])
        return folder

    def train(self, name: str, *words: str) -> Path:
        """Trains by a plan. Returns the run's folder."""
        settings = [word for word in self._settings if not word.startswith("space.")]
        self._run(name, ["jobs/train.py", f"name={name}", *settings, *words])
        return self.folder / name

    def _run(self, name: str, words: list[str]) -> None:
        self.commands[name] = " ".join(["python", *words])
        log = self.folder / f"{name}.log"
        print(f"{self.commands[name]}\n  > {log}", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with log.open("w") as file:
            done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file)
        if done.returncode:
            raise SystemExit(f"{name} ended with status {done.returncode}: {log} says why")
