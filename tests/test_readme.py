"""The README's commands do what it says: each is run, in order, as a newcomer would type them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
QUICK = [command for command in COMMANDS if "dry_run=true" in command or "timing" in command]


def run(command: list[str], folder: Path) -> str:
    """Runs a command line in `folder` with this environment's raygrow; gives its output."""
    program, *arguments = command
    if program == "raygrow":
        line = [str(Path(sys.executable).with_name("raygrow")), *arguments]
    else:
        line = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert targets[:2] == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", QUICK, ids=shlex.join)
def test_commands_that_only_look(command: list[str], tmp_path: Path) -> None:
    assert run(command, tmp_path).strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_that_work(tmp_path: Path) -> None:
    outputs = {
        command[1]: run(command, tmp_path) for command in COMMANDS if command[0] == "raygrow" and command not in QUICK
    }
    assert "at equal compute" in outputs["train"].lower()
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 10_000
    assert outputs["generate"].startswith("def ")
    assert (tmp_path / "out/llama-x2/config.json").exists()


def test_links_and_figures_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert all((ROOT / link).exists() for link in links), links
