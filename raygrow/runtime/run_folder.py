"""What is in a run's folder, and who may write there."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.train import Checkpoint
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from torch import Tensor

from raygrow.config import RunConfig, from_yaml, to_tree, to_yaml
from raygrow.data.shards import fingerprint
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import active_parameters, parameters
from raygrow.runtime.storage import StoredFolder
from raygrow.train.loop import Outcome
from raygrow.train.plan import Phase
from raygrow.weights.folder import write_folder

HISTORY_FILE = "history.jsonl"
TEXT_FILES = (".jsonl", ".json", ".yaml")
CAN_CHANGE = ("workers", "control", "dry_run", "storage_path")
"""Keys that a run started again may give another value."""


class RunFolder(StoredFolder):
    """The folder of one run."""

    @classmethod
    def of(cls, storage_path: str, name: str) -> "RunFolder":
        """The folder of the run `name`; a relative local path is made absolute, since workers change directory."""
        if "://" not in storage_path:
            return cls(f"{Path(storage_path).expanduser().resolve()}/{name}")
        base, mark, query = storage_path.partition("?")
        return cls(f"{base.rstrip('/')}/{name}", mark + query)

    @property
    def phases_uri(self) -> str:
        """Where the phases' Ray Train runs live."""
        return f"{self.uri}/phases{self.query}"

    def claim(self, run: RunConfig) -> None:
        """Writes run.yaml, or makes sure that the one there is this run's.

        Raises:
            ValueError: If the folder belongs to a run of another configuration.
        """
        text = self.read("run.yaml")
        if text is None:
            self.write("run.yaml", to_yaml(run))
            return
        before, now = to_tree(from_yaml(text)), to_tree(run)
        for key, then, value in differences(before, now):
            if key.split(".")[0] not in CAN_CHANGE:
                raise ValueError(
                    f"{self.uri} holds a run of another configuration: {key} was {then!r} and is now {value!r}. "
                    "Choose another `name`, or remove that folder to start over"
                )

    def claim_data(self, path: str) -> None:
        """Writes data.json, which says what prepared data the run learns from, or makes sure that it is still the same.

        Raises:
            ValueError: If the data has been prepared anew, with another content, since the run began.
        """
        now = fingerprint(path)
        text = self.read("data.json")
        if text is None:
            self.write("data.json", json.dumps({"manifest_sha256": now}))
        elif json.loads(text)["manifest_sha256"] != now:
            raise ValueError(
                f"{self.uri} holds a run on other data than {path} holds now, which has been prepared anew since: "
                "choose another `name`, or remove that folder to start over"
            )

    def mend_phase(self, phase: str) -> None:
        """Removes Ray Train's list of a phase's checkpoints if a crash or a full disk has cut it short.

        Ray writes that file in place, and would refuse to start with a broken one. Checkpoints carry their own mark.
        """
        if self.local:
            file = self.local / "phases" / phase / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
            try:
                json.loads(file.read_text())
            except FileNotFoundError:
                return
            except ValueError:
                file.unlink()

    def finished_phase(self, phase: str) -> Checkpoint | None:
        """The last checkpoint of a phase that has finished."""
        text = self.read(f"phases/{phase}/finished.json")
        if text is None:
            return None
        filesystem, path = self.resolve(f"phases/{phase}/{json.loads(text)['checkpoint']}")
        return Checkpoint(path, filesystem)

    def finish_phase(self, phase: str, checkpoint: Checkpoint) -> None:
        """Records that a phase has finished, with its last checkpoint."""
        self.write(f"phases/{phase}/finished.json", json.dumps({"checkpoint": Path(checkpoint.path).name}))

    def is_finished(self) -> bool:
        """Whether the whole run has finished."""
        summary = self.read("summary.json")
        return summary is not None and json.loads(summary)["status"] == "finished"

    def write_model(
        self, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], *, tokenizer: Path, name: str = "model"
    ) -> None:
        """Writes a model folder from named tensors, one at a time."""
        if self.local:
            write_folder(self.local / name, config, tensors, tokenizer_from=tokenizer, replace=True)
            return
        with tempfile.TemporaryDirectory() as aside:
            model = write_folder(Path(aside) / "model", config, tensors, tokenizer_from=tokenizer)
            # a folder without its config.json is no model folder, so that it is whole once this last file is there
            for file in sorted(model.iterdir(), key=lambda file: file.name == "config.json"):
                self.upload(file, f"{name}/{file.name}")

    @contextmanager
    def records(self) -> Iterator[Path]:
        """The run's small files, all but checkpoints and model, as a local folder: this one, or a copy for the time."""
        if self.local:
            yield self.local
            return
        with tempfile.TemporaryDirectory() as aside:
            copy = StoredFolder(f"{aside}/{Path(self.uri).name}")
            for name in [*self.names(), *(f"growth/{name}" for name in self.names("growth"))]:
                if name.endswith(TEXT_FILES):
                    copy.write(name, self.read(name) or "")
            yield Path(copy.uri)

    def write_summary(self, phases: Sequence[Phase], outcome: Outcome) -> None:
        """Writes summary.json: how the run ended and what each phase reached."""
        lines = self.read_history()
        rows, seconds = [], 0.0
        for phase in phases:
            own = [line for line in lines if line["phase"] == phase.name]
            if own:
                rows.append(_phase_summary(phase, own, seconds_before=seconds))
                seconds = own[-1]["seconds"]
        last_score = next((line for line in reversed(lines) if "val_loss" in line), {})
        end = lines[-1] if lines else {}
        summary = asdict(outcome) | {
            "phases": rows,
            **{key: end.get(key) for key in ("flops", "tokens", "seconds")},
            **{key: last_score.get(key) for key in ("val_loss", "val_bits_per_byte")},
        }
        self.write("summary.json", json.dumps(summary, indent=2))

    def write_history(self, lines: Sequence[dict[str, Any]]) -> None:
        """Writes history.jsonl anew."""
        self.write(HISTORY_FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def read_history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl; a last line cut short by a crash is left out."""
        lines = []
        for line in (self.read(HISTORY_FILE) or "").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys at which two trees differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif before != now:
        yield path, before, now


def _phase_summary(phase: Phase, lines: list[dict[str, Any]], *, seconds_before: float) -> dict[str, Any]:
    """What a phase reached, from its lines of history."""
    end, score = lines[-1], next((line for line in reversed(lines) if "val_loss" in line), {})
    return {
        "name": phase.name,
        "n_blocks": phase.model.n_blocks,
        "parameters": parameters(phase.model),
        "active_parameters": active_parameters(phase.model),
        "steps": end["step"],
        "tokens": end["tokens"] - phase.tokens_before,
        "flops": end["flops"] - phase.flops_before,
        "seconds": end["seconds"] - seconds_before,
        "loss": end["loss"],
        "val_loss": score.get("val_loss"),
        "val_bits_per_byte": score.get("val_bits_per_byte"),
    }
