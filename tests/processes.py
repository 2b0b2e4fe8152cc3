"""Processes that begin as copies of one that has imported what takes seconds and has run nothing else."""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("pytest", "transformers", "raygrow.cli", "raygrow.train.shared"),
        *("raygrow.runtime.train", "raygrow.runtime.tune", "raygrow.runtime.serve_replica"),
    ]
)


def run_script(
    script: Path,
    words: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    largest_file: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script as a command line would.

    Args:
        script: A file.
        words: What follows it.
        cwd: Where it runs.
        environment: All of it; this process's when not given.
        largest_file: Most bytes that it may write to one file: a disk that is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "error")]
        arguments = (script, words, cwd, dict(environment or os.environ), largest_file, said)
        process = PROCESSES.Process(target=_run, args=arguments)
        process.start()
        process.join()
        assert process.exitcode is not None
        out, error = (file.read_text() for file in said)
        return subprocess.CompletedProcess([str(script), *words], process.exitcode, out, error)


def _run(
    script: Path,
    words: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    largest_file: int | None,
    said: Sequence[Path],
) -> None:
    for stream, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")
