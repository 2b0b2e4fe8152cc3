from pathlib import Path

import pytest

from raygrow.report.runs import load_run, load_runs
from raygrow.report.tables import flatten


def test_phases_and_their_costs(pair: tuple[Path, Path]):
    run = load_run(pair[0])
    base, target = run.phases
    assert (base.name, base.steps, target.name, target.steps) == ("base", 250, "target", 1400)
    assert base.start_flops == 0
    assert target.start_flops == base.end_flops == 250 * 8192 * 1e8
    assert target.tokens == 1400 * 8192
    assert target.parameters == 41_200_000
    assert run.is_grown
    assert run.status == "finished"


def test_the_control_is_found_and_grown_runs_come_first(pair: tuple[Path, Path]):
    assert [run.name for run in load_runs([pair[0]])] == ["demo", "demo-scratch"]
    assert [run.name for run in load_runs([pair[1], pair[0]])] == ["demo", "demo-scratch"]


def test_a_damaged_line_is_named(pair: tuple[Path, Path]):
    file = pair[0] / "history.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:6], lines[6][:40], *lines[7:]]) + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl:7 is damaged"):
        load_run(pair[0])
    file.write_text('{"phase": "base", "step": 1}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:1 .* lacks flops, seconds, tokens"):
        load_run(pair[0])


def test_a_file_that_is_no_text_is_named(pair: tuple[Path, Path]):
    with (pair[0] / "history.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00\n")
    with pytest.raises(ValueError, match=r"history\.jsonl:166 is damaged"):
        load_run(pair[0])


@pytest.mark.parametrize("content", [b"name: \xff", b"na", b"- name", b"{name"])
def test_damaged_settings_are_named(content: bytes, pair: tuple[Path, Path]):
    (pair[0] / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"demo/run\.yaml (is damaged|holds a)"):
        load_run(pair[0])


def test_a_last_line_being_written_is_left_out(pair: tuple[Path, Path]):
    whole = load_run(pair[0]).history
    with (pair[0] / "history.jsonl").open("a") as file:
        file.write('{"phase": "target", "st')
    assert load_run(pair[0]).history == whole


def test_what_is_no_run_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        load_run(tmp_path)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2]}) == {"a.b": "1", "d": "[1, 2]"}
