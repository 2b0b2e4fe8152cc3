"""The README's commands do what it says: each is run, in order, as a newcomer would type them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import write_folder
from tests.processes import run_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = (shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines())
COMMANDS = [words for words in LINES if words]
QUICK = [command for command in COMMANDS if "dry_run=true" in command or "timing" in command]


def script(command: list[str]) -> tuple[Path, list[str]]:
    """The file that a command runs, this environment's raygrow or a job, and the words after it."""
    program, *arguments = command
    if program == "raygrow":
        return Path(sys.executable).with_name("raygrow"), arguments
    return ROOT / arguments[0], arguments[1:]


def run(command: list[str], folder: Path) -> str:
    """Runs a command line in `folder`; gives its output."""
    file, arguments = script(command)
    line = [sys.executable, str(file), *arguments]
    if arguments[:1] == ["serve"]:
        return serve(line, folder)
    typed = "Hello\n/quit\n" if arguments[:1] == ["chat"] else None
    done = subprocess.run(line, cwd=folder, input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


SERVERS: list[subprocess.Popen[str]] = []


def serve(line: list[str], folder: Path) -> str:
    """Starts a server, which goes on; gives what it says when it is ready."""
    server = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True)
    SERVERS.append(server)
    assert server.stderr
    for said in server.stderr:
        if "/v1" in said:
            return said
    raise AssertionError(f"{shlex.join(line)} ended with {server.wait()}")


@pytest.fixture
def _servers_end() -> Iterator[None]:
    yield
    for server in SERVERS:
        server.terminate()
        server.communicate()


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert targets[:2] == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    explained = re.findall(r"^([a-z-]+) +\w", shown, flags=re.MULTILINE)
    assert sorted(explained) == sorted(phony[1].split())


@pytest.mark.parametrize("command", QUICK, ids=shlex.join)
def test_commands_that_only_look(command: list[str], tmp_path: Path) -> None:
    done = run_script(*script(command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    config = ModelConfig(vocab_size=300, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, max_seq_len=32)
    model = Rack(config)
    init_weights(model, config, seed=0)
    write_folder(tmp_path / "runs/quickstart/model", config, model.state_dict().items())
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(example, made)
    assert made["target"].config.n_blocks == 4 * made["base_model"].config.n_blocks
    assert made["wider"].config.d_model == 2 * made["base_model"].config.d_model


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_servers_end")
def test_commands_that_work(tmp_path: Path) -> None:
    outputs = {
        command[1]: run(command, tmp_path) for command in COMMANDS if command[0] == "raygrow" and command not in QUICK
    }
    assert "at equal compute" in outputs["train"].lower()
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 10_000
    assert "From text to a served sparse model" in outputs["pipeline"]
    assert (tmp_path / "runs/pipeline-quickstart/report.html").stat().st_size > 10_000
    assert outputs["generate"].startswith("def ")
    assert "http://localhost:8000" in outputs["serve"]
    assert outputs["chat"].startswith("quickstart. ")
    assert " tokens · " in outputs["chat"]
    assert (tmp_path / "out/llama-x2/config.json").exists()
    assert (tmp_path / "out/sparse/sparsity.json").exists()


def test_links_and_figures_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert all((ROOT / link).exists() for link in links), links
