"""How work says how far it has come, in every room."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total, and what is counted, e.g. `(3, 40, "files read")`."""


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody wants to see."""
