"""Shared work: a forked trial is the trial run alone, each stretch is trained once, a kill leaves states to use."""

import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raygrow.growth.gstack import Gstack
from raygrow.nn.config import ModelConfig
from raygrow.train.config import OptimizerConfig, PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import Phase, resolve
from raygrow.train.session import FolderSession, checkpoint_name
from raygrow.train.shared import (
    Segment,
    growths_of,
    history_of,
    is_trained,
    remove_unkept,
    segments,
    spent_flops,
    total_flops,
    train_segment,
)
from raygrow.train.states import States
from tests.distributed import run_distributed
from tests.processes import PROCESSES

TARGET = ModelConfig(vocab_size=512, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32, blocks_per_stack=4, max_seq_len=32)
TRAIN = TrainConfig(
    seq_len=32,
    batch_size=4,
    report_every=2,
    evaluate_every=4,
    evaluate_sequences=3,
    checkpoint_every=4,
    optimizer=OptimizerConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=3, decay=0.4),
)


def plan(
    base: int,
    stacked: int,
    *,
    train: TrainConfig = TRAIN,
    target: ModelConfig = TARGET,
    factor: int = 2,
    base_lr: float | None = None,
    **of_stacked: Any,
) -> tuple[Phase, ...]:
    """A base of so many steps, and so many after growth, of which the last 40 % decay."""
    growth, of_stacked = Gstack(factor=factor), {"decay": train.schedule.decay, **of_stacked}
    phases = {
        "base": PhaseConfig(steps=base, lr=base_lr),
        "stacked": PhaseConfig(steps=stacked, growth=growth, **of_stacked),
    }
    return resolve(PlanConfig(phases=phases), target, train)


def scratch(steps: int) -> tuple[Phase, ...]:
    """The control."""
    return resolve(PlanConfig(phases={"scratch": PhaseConfig(steps=steps)}), TARGET, TRAIN)


TRIALS = {
    "late": plan(9, 10),  # 9 steps end between two reports
    "early": plan(6, 14),
    "longer": plan(6, 20),
    "longer scratch": scratch(23),
    "scratch": scratch(16),
}
UNFORESEEN = "longer"


def train_alone(phases: tuple[Phase, ...], folder: Path, data: Path) -> None:
    source = None
    for phase in phases:
        session = FolderSession(folder / phase.name)
        train_phase(phase, TRAIN, data=data, seed=0, source=source, session=session, device="cpu")
        source = folder / phase.name / checkpoint_name(phase.steps)


def alone(phases: tuple[Phase, ...], folder: Path, data: Path) -> list[dict[str, Any]]:
    """The history of a run that shares nothing."""
    run_distributed(train_alone, 1, phases, folder, data)
    return [line for phase in phases for line in FolderSession(folder / phase.name).records()]


def untimed(lines: Iterable[Any]) -> list[dict[str, Any]]:
    timing = ("seconds", "tokens_per_second", "memory_bytes")
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def train(segment: Segment, states: Path, data: Path, **options: Any) -> Outcome:
    return train_segment(segment, TRAIN, states=states, data=data, seed=0, device="cpu", **options)


def cut(data: Path, phases: tuple[Phase, ...], train: TrainConfig = TRAIN, seed: int = 0) -> tuple[Segment, ...]:
    return segments(phases, train, data=data, seed=seed)


def stretches(found: tuple[Segment, ...]) -> list[tuple[str, int, int]]:
    return [(segment.phase.name, segment.start, segment.stop) for segment in found]


@pytest.fixture(scope="module")
def trials(data: Path) -> dict[str, tuple[Segment, ...]]:
    return {name: cut(data, phases) for name, phases in TRIALS.items()}


@pytest.fixture(scope="module")
def searched(trials, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Segment, int]]]:
    """The states of all trials, and segment and step of every line that was told on the way."""
    states, logged = tmp_path_factory.mktemp("search") / "states", []
    foreseen = [segment for name in trials if name != UNFORESEEN for segment in trials[name]]
    for segment in (segment for trial in trials.values() for segment in trial):
        forks = [other.stop for other in foreseen if other.key == segment.key and other.stop < segment.stop]
        outcome = train(
            segment,
            states,
            data,
            save_at=forks,
            on_record=lambda line, segment=segment: logged.append((segment, line["step"])),
        )
        assert outcome == Outcome("finished")
    return states, logged


@pytest.mark.parametrize("name", TRIALS)
def test_a_forked_trial_is_the_trial_run_alone(name: str, trials, searched, data: Path, tmp_path: Path) -> None:
    assert untimed(history_of(trials[name], searched[0])) == untimed(alone(TRIALS[name], tmp_path, data))


def test_growth_in_a_fork_is_recorded(trials, searched) -> None:
    assert growths_of(trials["early"], searched[0]).keys() == {"stacked"}


def test_flops_are_the_closed_form(trials, searched) -> None:
    spent = 0.0
    for segment, step in searched[1]:
        steps = (step - 1) % TRAIN.report_every + 1  # a line tells of the steps since the last whole interval
        spent += steps * segment.phase.step_tokens * segment.phase.flops_per_token
    assert total_flops(trials.values()) == pytest.approx(spent)
    assert spent_flops(searched[0]) == pytest.approx(spent)
    # base up to 9; after growth at 9 all 10, after growth at 6 up to 12 and two tails; scratch up to 14 and two tails
    base, stacked = TRIALS["early"]
    steps_of_base, steps_of_target = 9, 10 + 12 + (14 - 8) + (20 - 12) + 14 + (23 - 14) + (16 - 10)
    expected = steps_of_base * base.flops / base.steps + steps_of_target * stacked.flops / stacked.steps
    assert total_flops(trials.values()) == pytest.approx(expected)


def test_only_states_to_fork_from_are_kept(trials, searched) -> None:
    states, _ = searched
    kept = {States(states / segment.key).of(segment.stop) for trial in trials.values() for segment in trial}
    assert set(states.glob("*/*step-*")) == kept


def test_what_is_trained_is_not_trained_again(trials, searched, data: Path) -> None:
    for segment in trials["late"]:
        assert train(segment, searched[0], data, on_record=pytest.fail) == Outcome("finished")


def train_until_killed(segment: Segment, states: Path, data: Path, step: int) -> None:
    def kill(line: Any) -> None:
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(segment, states, data, save_at=[8], on_record=kill)


def test_a_kill_leaves_states_to_go_on_from(data: Path, tmp_path: Path) -> None:
    phases = scratch(40)
    trunk, tail = cut(data, phases)
    process = PROCESSES.Process(target=train_until_killed, args=(trunk, tmp_path, data, 18))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    partial = tmp_path / trunk.key / f".{checkpoint_name(trunk.stop)}.dead"
    partial.mkdir()
    (partial / ".metadata").touch()
    elsewhere = tmp_path / tail.key / f".{checkpoint_name(tail.stop + 1)}.dead"
    elsewhere.mkdir(parents=True)

    logged = []
    assert not is_trained(trunk, tmp_path)
    assert len(history_of([trunk, tail], tmp_path)) in (12 / 2, 16 / 2)  # the state of 16 may not have been written
    for segment in (trunk, tail):
        assert train(segment, tmp_path, data, on_record=logged.append) == Outcome("finished")
    assert logged[0]["step"] in (14, 18)
    # up to the kill, and once more from the last state on
    steps = 18 + 40 - (logged[0]["step"] - 2)
    assert spent_flops(tmp_path) == pytest.approx(steps * phases[0].flops / phases[0].steps)
    remove_unkept(tmp_path)
    assert not partial.exists()
    assert not elsewhere.exists()
    assert is_trained(replace(trunk, stop=8), tmp_path)
    assert untimed(history_of([trunk, tail], tmp_path)) == untimed(alone(phases, tmp_path / "alone", data))


def test_two_processes_that_make_one_state_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(tmp_path)
    first, second = states.aside(8), states.aside(8)
    for aside in (first, second):
        aside.mkdir()
        (aside / "weights").touch()
    (second / "KEEP").touch()
    states.add(first, 8)
    assert second.exists()
    monkeypatch.setattr(states, "steps", lambda: [4, 8])  # the other one has removed the first of them since
    states.add(second, 8)
    assert states.is_kept(8)
    assert list(tmp_path.iterdir()) == [states.of(8)]


def test_nothing_is_removed_where_nothing_was_trained(tmp_path: Path) -> None:
    remove_unkept(tmp_path / "states")


def test_lines_told_on_the_way_are_those_of_the_trial(trials, searched, data: Path, tmp_path: Path) -> None:
    base, told = trials["late"][0], []
    train(base, tmp_path, data, save_at=[6], on_record=told.append)
    assert untimed(told) == untimed(history_of([base], searched[0]))
    assert "val_loss" not in told[6 // 2 - 1]
    assert "val_loss" in history_of([trials["early"][0]], tmp_path)[-1]


def test_a_stop_saves_and_goes_on(trials, searched, data: Path, tmp_path: Path) -> None:
    trunk, tail = trials["scratch"]
    outcome = train(trunk, tmp_path, data, stop_requested=lambda: True)
    assert outcome.status == "stopped"
    assert [line["step"] for line in history_of([trunk, tail], tmp_path)] == [2]
    assert train(trunk, tmp_path, data, save_at=[2]) == Outcome("finished")
    assert is_trained(replace(trunk, stop=2), tmp_path)  # asked for after it was there
    expected = [line for line in history_of([trunk, tail], searched[0]) if line["step"] <= trunk.stop]
    assert untimed(history_of([trunk, tail], tmp_path)) == untimed(expected)


def test_a_growth_that_fails_leaves_nothing_to_go_on_from(trials, searched, data: Path) -> None:
    *before, grown, _ = cut(data, plan(6, 14, max_loss_jump=-1.0))
    assert [segment.key for segment in before] == [trials["early"][0].key]
    assert train(grown, searched[0], data).status == "failed"
    assert history_of([grown], searched[0]) == []


def test_a_segment_whose_parent_is_not_trained_is_refused(trials, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"stacked.*{trials['early'][0].key}"):
        train(trials["early"][1], tmp_path, data)


def test_trunks_end_at_whole_intervals_before_the_rate_depends_on_the_length(data: Path) -> None:
    assert stretches(cut(data, scratch(16))) == [("scratch", 0, 10), ("scratch", 10, 16)]
    assert stretches(cut(data, scratch(23))) == [("scratch", 0, 14), ("scratch", 14, 23)]
    assert stretches(cut(data, plan(9, 4, decay=0.0))) == [("base", 0, 8), ("base", 8, 9), ("stacked", 0, 4)]
    # shorter than its warmup: it climbs faster from the first step on
    assert stretches(cut(data, plan(2, 4, decay=0.0))) == [("base", 0, 2), ("stacked", 0, 4)]
    cosine = plan(6, 8, train=replace(TRAIN, schedule=ScheduleConfig(kind="cosine", warmup_steps=3)))
    assert stretches(cut(data, cosine))[1:] == [("stacked", 0, 2), ("stacked", 2, 8)]


def keys(found: tuple[Segment, ...]) -> dict[str, str]:
    """Keys of base, and of trunk and tail after growth."""
    base, trunk, tail = found
    return {"base": base.key, "trunk": trunk.key, "tail": tail.key}


@pytest.mark.parametrize(
    ("phases", "same"),
    [
        (plan(6, 14), {"base", "trunk", "tail"}),
        (plan(6, 14, save_end="grown", workers=2, micro_batch_size=4), {"base", "trunk", "tail"}),
        (plan(6, 14, target=TARGET.regrouped(2)), {"base", "trunk", "tail"}),
        (plan(6, 20), {"base", "trunk"}),
        (plan(6, 14, decay=0.2), {"base", "trunk"}),
        (plan(8, 14), {"base"}),
        (plan(6, 14, lr=1e-3), {"base"}),
        (plan(6, 14, warmup_steps=2), {"base"}),
        (plan(6, 14, batch_size=2), {"base"}),
        (plan(6, 14, micro_batch_size=2), {"base"}),
        (plan(6, 14, optimizer_state="drop"), {"base"}),
        (plan(6, 14, frozen=("blocks.0.*",)), {"base"}),
        (plan(6, 14, factor=4), set()),
        (plan(6, 14, base_lr=1e-3), set()),
        (plan(6, 14, target=replace(TARGET, d_ff=48)), set()),
    ],
)
def test_keys_differ_when_and_only_when_the_training_does(
    phases: tuple[Phase, ...], same: set[str], data: Path
) -> None:
    expected, found = keys(cut(data, plan(6, 14))), keys(cut(data, phases))
    assert {name for name in found if found[name] == expected[name]} == same


def test_keys_of_other_settings_seeds_and_data(data: Path, tmp_path: Path) -> None:
    phases = plan(6, 14)
    expected = keys(cut(data, phases))
    saves = replace(TRAIN, checkpoint_every=2, keep_checkpoints=1)
    assert keys(cut(data, phases, saves)) == expected
    (tmp_path / "manifest.json").write_text("another corpus")
    others = [
        cut(data, phases, seed=1),
        cut(tmp_path, phases),
        cut(data, phases, replace(TRAIN, optimizer=replace(TRAIN.optimizer, weight_decay=0.0))),
        cut(data, phases, replace(TRAIN, evaluate_sequences=4)),
    ]
    for other in others:
        assert not set(keys(other).values()) & set(expected.values())
