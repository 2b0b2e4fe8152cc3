"""Folders of searches as they are left behind, from a made-up loss with a known best timing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from raygrow.config import RunConfig, as_yaml, build, to_tree
from raygrow.train.plan import resolve, scratch_plan

SHARE, FACTOR = "plan.phases.base.share", "plan.phases.stacked.growth.factor"
BEST_SHARE = 0.08


def tree(*, share: float, factor: int, seed: int, tokens: float, d_model: int = 64) -> dict[str, Any]:
    """A run's settings."""
    return {
        "name": "trial",
        "seed": seed,
        "model": {"vocab_size": 512, "d_model": d_model, "n_heads": 2, "d_ff": 128, "blocks_per_stack": 8},
        "data": {"kind": "python_source", "path": "data/made_up", "tokenizer": {"vocab_size": 512}},
        "plan": {
            "tokens": tokens,
            "phases": {
                "base": {"share": share},
                "stacked": {"growth": {"operator": "gstack", "factor": factor}, "optimizer_state": "drop"},
            },
        },
        "train": {"seq_len": 64, "batch_size": 32, "optimizer": {"lr": 3e-3}, "schedule": {"warmup_steps": 7}},
    }


def noise(name: str) -> float:
    """Of a trial: the same whenever it is written."""
    return 0.004 * float(np.random.default_rng(list(name.encode())).normal())


def write_trial(
    search: Path,
    *,
    share: float | None,
    factor: int = 4,
    seed: int = 0,
    tokens: float = 4e6,
    d_model: int = 64,
    status: str = "finished",
    formula: bool = False,
    spread: float = 1.0,
    best: float = BEST_SHARE,
    values: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one trial's run folder and gives its line of results.json; no share is the control."""
    run = build(RunConfig, tree(share=share or 0.1, factor=factor, seed=seed, tokens=tokens, d_model=d_model))
    phases = resolve(run.plan, run.model, run.train)
    chosen: dict[str, Any] = {SHARE: share, FACTOR: factor, "seed": seed}
    if share is None:
        run = build(RunConfig, {**to_tree(run), "plan": to_tree(scratch_plan(phases))})
        phases = resolve(run.plan, run.model, run.train)
        chosen = {"seed": seed}
    chosen |= values or {}
    name = "_".join(f"{key.rsplit('.')[-1]}-{value}" for key, value in chosen.items())
    name = f"{'formula_' if formula else ''}{'scratch_' if share is None else ''}{name}_{tokens:g}"
    folder = search / "trials" / name
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(as_yaml(run) + as_yaml({"made_with": {"commit": "made up"}}))
    total = sum(phase.flops for phase in phases)
    ease = 1.0 if share is None else 1.6 - 0.25 * math.log(share / best) ** 2 - 0.1 * abs(factor - 4)
    missed = spread * noise(name)
    lines: list[dict[str, Any]] = []
    for phase in phases:
        for step in range(10, phase.steps + 1, 10):
            flops = phase.flops_before + step * phase.step_tokens * phase.flops_per_token
            if status == "stopped" and flops > 0.4 * total:
                break
            decayed = max(0.0, flops / total - 0.8) / 0.2
            loss = 1.5 + 5 * (1 + ease * flops / 1e12) ** -0.3 - 0.1 * decayed + missed
            line = {"phase": phase.name, "step": step, "tokens": phase.tokens_before + step * phase.step_tokens}
            line |= {"flops": flops, "seconds": flops / 1e10, "loss": loss, "lr": 3e-3 * (1 - decayed)}
            line |= {"grad_norm": 0.4, "tokens_per_second": 1e4, "mfu": None, "memory_bytes": 2**31}
            if step % 50 == 0 or step + 10 > phase.steps:
                line["val_loss"] = loss
            lines.append(line)
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "finished":
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "phases": []}))
    last = lines[-1]
    return {
        "name": name,
        "values": chosen,
        "status": status,
        "val_loss": last.get("val_loss", last["loss"]),
        **{key: last[key] for key in ("flops", "tokens", "seconds")},
        "control": share is None,
        "formula": formula,
        "folder": f"trials/{name}",
    }


def write_search(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes what makes the folder of trials a search."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text("search: grid\n")
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def grid(
    folder: Path, *, seeds: tuple[int, ...] = (0, 1), budgets: tuple[float, ...] = (4e6,), control: bool = True
) -> Path:
    """Three timings by two factors, the formula's timing, scratch, and one trial stopped early."""
    rows = []
    for tokens in budgets:
        more: dict[str, Any] = {"plan.tokens": tokens} if len(budgets) > 1 else {}
        for seed in seeds:
            common: dict[str, Any] = {"seed": seed, "tokens": tokens, "values": more}
            rows += [write_trial(folder, share=s, factor=f, **common) for s in (0.03, 0.08, 0.2) for f in (2, 4)]
            rows.append(write_trial(folder, share=0.05, formula=True, **common))
            rows += [write_trial(folder, share=None, **common)] if control else []
        rows.append(write_trial(folder, share=0.4, factor=2, tokens=tokens, status="stopped", values=more))
    return write_search(folder, rows)
