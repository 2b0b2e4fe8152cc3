"""`sparsity.json`: what a model folder says about running its model with less weights.

    version, method, rotation
    fingerprint    of the weights that it was made for, see `weights/fingerprint.py`
    calibration    which text the bases and levels were chosen on
    levels         by sparsity: what is kept of each input of each Block, and what that saves

Sparsity is the share of the Blocks' weights that a token does not multiply by; what is skipped is less where adapters
have to be read in exchange.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from raygrow.kernels.group_select import group_sizes
from raygrow.nn.config import ModelConfig
from raygrow.sparsity.inputs import (
    INPUTS,
    Place,
    adapter_share,
    block_weights,
    input_size,
    input_weights,
    places,
)
from raygrow.sparsity.methods import METHODS, THRESHOLDED, Choice, Method, Rotation
from raygrow.weights.fingerprint import fingerprint
from raygrow.weights.folder import ModelFolder
from raygrow.weights.json_file import read_json

PLAN_FILE = "sparsity.json"
VERSION = 2
_AGAIN = "run `raygrow sparsify` again, on the dense model"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that a plan was made on."""

    data: str
    sequences: int
    seq_len: int
    sha256: str
    """Of its token ids."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One sparsity that a model can run at."""

    nominal: float
    """Share of the Blocks' weights that a token does not multiply by; with thresholds, as on the calibration text."""
    skipped: float
    """The same with the adapters counted: what is saved of the bytes that a dense model's Blocks read."""
    choices: Mapping[Place, Choice]


@dataclass(frozen=True, kw_only=True)
class SparsityPlan:
    """How a model can be made sparse."""

    method: Method
    rotation: Rotation
    fingerprint: str
    """Of the weights that it was made for: norms, thresholds and splits are theirs alone."""
    calibration: Calibration
    levels: Mapping[float, Level]

    def level(self, sparsity: float) -> Level:
        """What to keep at a sparsity.

        Raises:
            ValueError: If the plan has no such level; names those that it has.
        """
        if sparsity not in self.levels:
            held = ", ".join(f"{level:g}" for level in self.levels)
            raise ValueError(
                f"sparsity={sparsity}: this model was made for {held}; choose one of them, or sparsify the model that "
                "it was made from again with this one among them"
            )
        return self.levels[sparsity]

    def save(self, folder: Path) -> None:
        """Writes `sparsity.json`."""
        levels = {
            str(sparsity): {
                "nominal": level.nominal,
                "skipped": level.skipped,
                "blocks": [
                    {name: _plain(level.choices[block, name]) for name in INPUTS}
                    for block in range(1 + max(block for block, _ in level.choices))
                ],
            }
            for sparsity, level in self.levels.items()
        }
        content = {
            "version": VERSION,
            "method": self.method,
            "rotation": self.rotation,
            "fingerprint": self.fingerprint,
            "calibration": asdict(self.calibration),
            "levels": levels,
        }
        (folder / PLAN_FILE).write_text(json.dumps(content, indent=2) + "\n")


def make_level(config: ModelConfig, choices: Mapping[Place, Choice], method: Method = "topk") -> Level:
    """A level, with what it saves worked out."""
    dropped = sum(
        _weights(config, method, place) * (1 - choice.keep / input_size(config, *place))
        for place, choice in choices.items()
    )
    nominal = dropped / block_weights(config)
    return Level(nominal=nominal, skipped=nominal - adapter_share(config), choices=choices)


def _weights(config: ModelConfig, method: Method, place: Place) -> int:
    """Weights of a place that need not be read when all of its entries are dropped."""
    weights = input_weights(config, *place)
    # a unit that its gate has made zero needs neither its part of `down` nor that of `up`
    return 2 * weights if method == "relu" and config.gated and place[1] == "down" else weights


def load_plan(folder: ModelFolder) -> SparsityPlan:
    """The plan of a model folder. Reads samples of its weights.

    Raises:
        FileNotFoundError: If it has none.
        ValueError: If it cannot be read, or is of another model or of other weights; names what is wrong.
    """
    path, config = folder.path / PLAN_FILE, folder.config
    if not path.exists():
        raise FileNotFoundError(
            f"{folder.path} is a dense model: it has no {PLAN_FILE}; make it sparse with `raygrow sparsify` first"
        )
    content = read_json(path)
    try:
        if content.get("version") != VERSION:
            raise ValueError(f"version {content.get('version')!r}, this raygrow reads {VERSION}")
        method, rotation = _one_of(content, "method", METHODS), _one_of(content, "rotation", get_args(Rotation))
        levels = {float(key): _read_level(level, config, method) for key, level in content["levels"].items()}
        calibration, weights = Calibration(**content["calibration"]), content["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); {_AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_AGAIN}") from error
    if weights != fingerprint(folder):
        raise ValueError(
            f"{path}: it was made for other weights than those that now lie beside it; put its own back, or {_AGAIN}"
        )
    return SparsityPlan(method=method, rotation=rotation, fingerprint=weights, calibration=calibration, levels=levels)


def _read_level(tree: dict[str, Any], config: ModelConfig, method: Method) -> Level:
    blocks = tree["blocks"]
    if len(blocks) != config.n_blocks:
        raise ValueError(f"it is about a model of {len(blocks)} blocks, this one has {config.n_blocks}")
    choices = {}
    for block, name in places(config):
        choice, size = _read_choice(blocks[block][name]), input_size(config, block, name)
        if type(choice.keep) is not int or not 1 <= choice.keep <= size:
            raise ValueError(f"block {block} keeps {choice.keep!r} entries of `{name}`, which has {size}")
        if choice.threshold is not None and type(choice.threshold) is not float:
            raise ValueError(f"block {block}: threshold {choice.threshold!r} of `{name}` is no number")
        if choice.groups is not None and not _fills(choice.groups, choice.keep, size):
            raise ValueError(
                f"block {block}: the groups of `{name}` do not make up what it keeps, {choice.keep} entries"
            )
        if not _fits(choice, size, method):
            raise ValueError(f"block {block}: what is kept of `{name}` is not chosen as method {method} does")
        choices[block, name] = choice
    return make_level(config, choices, method)


def _read_choice(tree: dict[str, Any]) -> Choice:
    choice = Choice(**tree)
    return choice if choice.groups is None else replace(choice, groups=tuple(choice.groups))


def _fills(groups: Sequence[Any], keep: int, size: int) -> bool:
    """Whether groups of an input hold, together, what it keeps."""
    most = group_sizes(size)
    whole = len(groups) == len(most) and all(type(n) is int and 0 <= n <= m for n, m in zip(groups, most, strict=True))
    return whole and sum(groups) == keep


def _fits(choice: Choice, size: int, method: Method) -> bool:
    """Whether an input that drops something says by what it is chosen: a threshold, groups or nothing but a number."""
    if method == "relu":  # is not chosen: it is zero
        return choice.groups is None
    by = choice.threshold is not None, choice.groups is not None
    return by == (method in THRESHOLDED, method == "grouped") or (choice.keep == size and not any(by))


def _one_of(content: dict[str, Any], key: str, known: tuple[str, ...]) -> Any:
    if content[key] not in known:
        raise ValueError(f"{key}={content[key]!r} is none of {', '.join(known)}")
    return content[key]


def _plain(choice: Choice) -> dict[str, Any]:
    return {key: value for key, value in asdict(choice).items() if value is not None}
