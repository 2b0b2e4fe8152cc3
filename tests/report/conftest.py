"""Run folders as training writes them, from smooth made-up loss curves with a little noise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from raygrow.weights.checks import Check
from raygrow.weights.verify import Verification

FLOPS_PER_TOKEN = {"base": 1e8, "target": 3e8}
GROWTH = Verification(
    operator={"operator": "gstack", "factor": 4},
    exact=False,
    source_parameters=18_400_000,
    parameters=41_200_000,
    predicted_parameters=41_200_000,
    output_difference=0.82,
    loss_before=3.41,
    loss_after=4.92,
    max_loss_jump=3.0,
    checks=[
        Check(name="parameters", passed=True, detail="41200000, as predicted"),
        Check(name="gstack: blocks", passed=True, detail="block i equals block i mod 3 in 12 blocks"),
    ],
)
BROKEN_GROWTH = replace(
    GROWTH,
    output_difference=math.nan,
    loss_after=math.nan,
    max_loss_jump=None,
    checks=[Check(name="loss", passed=False, detail="loss 3.4100 before growth, nan after")],
)


def history(phases: list[tuple[str, int]], *, ease: float) -> list[dict]:
    """Lines every 10 steps; `ease` scales how fast the loss falls. The last phase decays its learning rate."""
    noise = np.random.default_rng(len(phases))
    lines, tokens, flops, seconds = [], 0.0, 0.0, 0.0
    total = sum(steps * FLOPS_PER_TOKEN[name] for name, steps in phases)
    for name, steps in phases:
        for step in range(10, steps + 1, 10):
            tokens += 10 * 8192
            flops += 10 * 8192 * FLOPS_PER_TOKEN[name]
            speed = (9e4 if name == "base" else 4e4) * (1 + 0.02 * noise.normal())
            seconds += 10 * 8192 / speed
            decayed = max(0.0, flops / (8192 * total) - 0.8) / 0.2
            loss = 1.5 + 7.5 * (1 + ease * flops / 1e13) ** -0.42 - 0.12 * decayed
            if name == "target" and len(phases) > 1:
                loss += 1.4 * np.exp(-step / 25)
            line = {"phase": name, "step": step, "tokens": tokens, "flops": flops, "seconds": seconds}
            line |= {"loss": loss + 0.03 * noise.normal(), "grad_norm": 0.4, "lr": 1e-3 * (1 - decayed)}
            line |= {"tokens_per_second": speed, "mfu": None, "memory_bytes": 2**31}
            if step % 50 == 0 or step + 10 > steps:
                line |= {"val_loss": loss + 0.005 * noise.normal(), "val_bits_per_byte": loss / np.log(2) / 3.6}
            lines.append(line)
    return lines


def write_run(folder: Path, *, grown: bool, ease: float, finished: bool = True, storage_path: str = ".") -> Path:
    phases = [("base", 250), ("target", 1400)] if grown else [("target", 1480)]
    lines = history(phases, ease=ease)
    lines = lines if finished else lines[: len(lines) // 2]
    plan = {name: {"growth": GROWTH.operator} if grown and name == "target" else {} for name, _ in phases}
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "name": folder.name,
        "storage_path": storage_path,
        "plan": {"phases": plan},
        "train": {"seq_len": 512},
        "data": {"path": "data"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    if grown:
        (folder / "growth").mkdir()
        (folder / "growth" / "target.json").write_text(json.dumps(GROWTH.to_json()))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "phases": []}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A finished grown run and its control, which growth beats."""
    grown = write_run(tmp_path / "demo", grown=True, ease=1.5)
    return grown, write_run(tmp_path / "demo-scratch", grown=False, ease=1.0)


@pytest.fixture
def failed_growth(pair: tuple[Path, Path]) -> Path:
    """A run whose growth gave no finite loss, and which ended there."""
    (pair[0] / "growth" / "target.json").write_text(json.dumps(BROKEN_GROWTH.to_json()))
    (pair[0] / "summary.json").write_text(json.dumps({"status": "failed", "reason": "growth failed", "phases": []}))
    return pair[0]
