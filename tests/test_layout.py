"""Who may import what, where import-linter cannot see it; the rest of the directions is its business (make lint)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SINGLE_DEVICE = ("nn", "weights", "growth", "sparsity", "data", "kernels", "text")
LARGEST_FILE = 500


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("room", SINGLE_DEVICE)
def test_single_device_rooms_know_no_processes(room: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files(f"raygrow/{room}")
        for module in imported(file)
        if f"{module}.".startswith("torch.distributed.")
    ]
    assert not found


def test_jobs_only_call_the_command_line() -> None:
    for file in files("jobs"):
        ours = {module for module in imported(file) if module.startswith("raygrow")}
        assert ours == {"raygrow.cli.main"}, file


def test_files_stay_small() -> None:
    large = {
        str(file.relative_to(ROOT)) for file in files("raygrow") if len(file.read_text().splitlines()) > LARGEST_FILE
    }
    assert not large
