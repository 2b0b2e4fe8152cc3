"""Numbers and keys as people read them. A value that is not there is a dash."""

from collections.abc import Sequence

DASH = "-"


def flops(value: float | None) -> str:
    """FLOPs with three digits: `4.24e17`."""
    return DASH if value is None else f"{value:.2e}".replace("e+", "e")


def count(value: float | None) -> str:
    """Parameters, tokens: `135M`, `1.35B`, `820`."""
    if value is None:
        return DASH
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Time in its two largest units: `3h 05m`, `7m 12s`, `41s`."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with a fixed number of decimals."""
    return DASH if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 2) -> str:
    """A number of any size, with a fixed number of significant digits."""
    return DASH if value is None else f"{value:.{digits}g}"


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share in percent: `5.2 %`; `+5.2 %` when signed."""
    return DASH if value is None else f"{100 * value:{'+' if signed else ''}.1f} %"


def memory(value: float | None) -> str:
    """Bytes of memory: `18.4 GiB`."""
    return DASH if value is None else f"{value / 2**30:.3g} GiB"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Every dotted key by as few of its last words as tell it from the others."""
    names = {}
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        names[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) <= 1)
    return names
