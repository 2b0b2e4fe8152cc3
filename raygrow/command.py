"""How a command is registered: by a decorator that names its arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Argument = tuple[str, dict[str, Any]]
Run = Callable[..., int]
Commands = list[tuple[Run, tuple[Argument, ...]]]
"""Functions, each of which gives its command its name and help, and the arguments that it takes."""


def registry() -> tuple[Commands, Callable[..., Callable[[Run], Run]]]:
    """A list of commands, as yet empty, and the decorator that adds a function with its arguments."""
    commands: Commands = []

    def command(*arguments: Argument) -> Callable[[Run], Run]:
        def register(run: Run) -> Run:
            commands.append((run, arguments))
            return run

        return register

    return commands, command


def argument(name: str, text: str, **options: Any) -> Argument:
    """An argument as argparse takes it, whose help says what it is when not given."""
    default = f" (default: {options['default']})" if options.get("default") else ""
    return name, {"help": text + default, **options}


MODEL = argument("model", "model folder, or a finished run", type=Path, metavar="MODEL")
TARGET = argument("target", "folder to write", type=Path, metavar="OUT")
SETTINGS = {"nargs": "*", "metavar": "KEY=VALUE"}
