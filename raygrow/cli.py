"""The `raygrow` command. The only file that knows Hydra: it composes a plain tree, and `config.build` takes over.

Words become a call of a function in `composed.py` or `commands.py`; an error that people can mend is one paragraph.
"""

import argparse
import inspect
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from raygrow.commands import COMMANDS
from raygrow.composed import COMPOSED

OVERVIEW = """\
raygrow pre-trains language models by growth: train a small one, grow it, go on training.

  start     raygrow prepare --config-name quickstart          first steps: a small text ...
            raygrow train --config-name quickstart            ... and a tiny model, minutes on two CPU cores
  text      raygrow prepare                                   Python's standard library -> token shards
  train     raygrow train plan=gstack control=true            a grown model, and one from scratch; hours on a CPU
  search    raygrow tune space=growth_timing                  when to grow, and by how much, tried out on a cluster
  look      raygrow report runs/tiny-gstack                   loss against FLOPs, growth checks, who won
            raygrow evaluate runs/tiny-gstack --data data/python_source
            raygrow generate runs/tiny-gstack --prompt "def "
  serve     raygrow serve runs/tiny-gstack                    OpenAI's API and a page to chat, on Ray Serve
            raygrow chat http://localhost:8000                or in the terminal
  export    raygrow export runs/tiny-gstack OUT --format hf   a folder for transformers
  all       raygrow pipeline                                  end to end: text, growth, sparse model, server
  sparse    raygrow sparsify runs/tiny-gstack OUT data=data/python_source     decoding reads part of the weights
  by hand   raygrow grow SMALL BIG operator=gstack factor=2   grow any model folder
  plan      raygrow timing --params 1.1e9 --tokens 1e11       when to grow

`raygrow COMMAND --help` explains one, with examples. RAYGROW_TRACEBACK=1 shows where an error came from,
`raygrow --version` what is installed.
"""

CONF = Path(__file__).parent / "conf"
GROUPS = ("model", "data", "plan", "train", "space")
"""Folders of raygrow/conf: `plan=gstack` chooses a file there."""

OWN = "own"
"""Subfolder of `space` for the user's file."""

SIGNALLED = 128
"""From here on, a status says which signal has stopped a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words after `raygrow`; those of the process when not given.

    Returns:
        The exit status: 0, 1 where a run ended without success, 2 for an error that the user can mend, 143 where a
        run was told to stop and has saved, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"] if words[1:] else []
    if not words:
        print(OVERVIEW, end="")
        return 0
    if words == ["--version"]:
        print(f"raygrow {metadata.version('raygrow')}")
        return 0
    parser = _parser()
    parsed, rest = parser.parse_known_args(words)
    composed = words[0] in {run.__name__ for run, _ in COMPOSED}
    # settings may also follow options, where argparse does not know them for what they are
    takes_settings = composed or words[0] == "serve"
    if unknown := [word for word in rest if not takes_settings or word.startswith("-")]:
        parser.error(f"{' '.join(unknown)}: not understood, see `raygrow {words[0]} --help`")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("raygrow").setLevel(logging.INFO)
    if words[0] == "serve":
        parsed.models += rest
    try:
        if not composed:
            return _explained(lambda: parsed.run(parsed))
        settings = [*parsed.settings, *rest]
        options = [word for word in words[1:] if word not in settings]
        return _explained(lambda: _compose(parsed.run, parsed.config_name, options, settings))
    except KeyboardInterrupt:
        return 130


def _explained(command: Callable[[], int]) -> int:
    """Runs a command; an error that people can mend becomes one paragraph and status 2."""
    try:
        return command()
    except (ValueError, OSError) as error:
        if os.environ.get("RAYGROW_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"raygrow: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raygrow", usage="raygrow COMMAND ...", description=OVERVIEW, formatter_class=_Formatter
    )
    commands = parser.add_subparsers(prog="raygrow", metavar="COMMAND", required=True)
    for run, arguments in (*COMPOSED, *COMMANDS):
        explained = inspect.getdoc(run) or ""
        summary = explained.partition("\n")[0].rstrip(".")
        command = commands.add_parser(run.__name__, help=summary, description=explained, formatter_class=_Formatter)
        command.set_defaults(run=run)
        for name, options in arguments:
            command.add_argument(name, **options)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines, and leaves room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


def _compose(
    command: Callable[[dict[str, Any]], int], config_name: str, options: list[str], settings: list[str]
) -> int:
    """Lets Hydra compose the settings, and calls `command` with the tree: once, or for each run of `--multirun`."""
    import hydra
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    @contextmanager
    def plain_errors() -> Iterator[None]:
        try:
            yield
        except MissingMandatoryValue as error:
            raise ValueError(f"{error.full_key} is missing: it has no default, so give it a value") from error
        except OverrideParseException as error:
            raise ValueError(
                f"{error.override.lstrip('+')}: cannot be read as key=value; {_own_words(error)}"
            ) from error
        except MissingConfigException as error:
            raise ValueError(_missing(error.missing_cfg_file, error.options) or _own_words(error)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_own_words(error)) from error

    @hydra.main(version_base="1.3", config_path="pkg://raygrow.conf", config_name=config_name)
    def job(composed: DictConfig) -> None:
        def run() -> int:
            with plain_errors():
                tree: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            return command(tree)

        statuses.append(_explained(run))
        if statuses[-1] >= SIGNALLED:  # the runs after this one are not wanted either
            sys.exit(statuses[-1])

    statuses: list[int] = []
    OmegaConf.register_new_resolver("last", lambda path: str(path).rsplit("/")[-1], replace=True)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what is wrong instead of printing it and leaving
    with plain_errors(), tempfile.TemporaryDirectory() as aside:
        # Hydra notes down what --multirun was told, which each run's run.yaml says too
        settings = [_with_space_file(word, Path(aside)) for word in settings]
        searched = [f"hydra.searchpath=['file://{aside}']"] if (Path(aside) / "space").exists() else []
        sys.argv[1:] = [*options, *map(_settable, settings), f"hydra.sweep.dir='{aside}'", *searched]
        job()
    return max(statuses, default=0)


def _with_space_file(word: str, aside: Path) -> str:
    """`space=path/to/this.yaml` as Hydra can find it: a file of a group, in a folder that it searches.

    It is in a folder of its own there, since Hydra would rather take a shipped file of the same name.
    """
    file = Path(word.removeprefix("space="))
    if not word.startswith("space=") or file.suffix != ".yaml":
        return word
    (aside / "space" / OWN).mkdir(parents=True, exist_ok=True)
    shutil.copy(file, aside / "space" / OWN)
    return f"space={OWN}/{file.stem}"


def _missing(file: str | None, options: Sequence[str] | None) -> str | None:
    """Names the files of a group, those in its folders too, which Hydra leaves out; None if another file is missing."""
    group = (file or "").partition("/")[0]
    if group not in GROUPS:
        return None
    nested = {path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*/*.yaml")}
    known = ", ".join(sorted({*(options or ()), *nested}))
    return f"{file}: there is no such settings file. Available for {group}: {known}"


def _own_words(error: Exception) -> str:
    """What Hydra says, without where it looked and links to the manual of an old version."""
    said = re.split(r"\n *(?:Config search path|full_key)", str(error))[0]
    return re.sub(r"\s*See https://hydra\.cc\S* for details", "", said)


def _settable(word: str) -> str:
    """Marks `key=value` so that Hydra also takes keys which no YAML file mentions; `build` refuses unknown ones."""
    key = re.match(r"([A-Za-z_][\w.]*)=", word)
    return f"++{word}" if key and key[1] not in GROUPS else word
