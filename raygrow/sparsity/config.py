"""How a model is made sparse, and what stands against it: told before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raygrow.nn.config import ModelConfig
from raygrow.sparsity import allocate
from raygrow.sparsity.absorb import absorbed_config
from raygrow.sparsity.allocate import SplitName
from raygrow.sparsity.methods import ROTATIONS, THRESHOLDED, Method, Rotation
from raygrow.sparsity.plan import PLAN_FILE
from raygrow.weights.folder import ModelFolder
from raygrow.weights.json_file import read_json

LEVELS = (0.25, 0.4, 0.5)
"""Made when nobody names any."""
SEARCH_SEQUENCES = 4


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """How a model is made sparse.

    Raises:
        ValueError: If a field is out of range, or has no place beside another; names them.
    """

    sparsity: float | tuple[float, ...] | None = None
    """Shares of the Blocks' weights that a token is not to multiply by; a level for each, LEVELS when not given. Not
    for method `relu`, which has one level, what the model does by itself, under its own share."""
    method: Method = "rotated_teal"
    """Which entries are kept, see `sparsity/methods.py`."""
    rotation: Literal["auto", "none", "global", "block"] = "auto"
    """The basis: the model's own, one for the whole model, or one for each Block, with adapters; `auto` is the
    method's."""
    split: SplitName | None = None
    """How a level is split between inputs, see `sparsity/allocate.py`; `search` when not given. Not for `relu`."""
    sequences: int = 16
    """Of the calibration text."""
    seq_len: int = 0
    """Tokens in a sequence; 0 is what the model takes, 2048 at most."""
    search_sequences: int | None = None
    """The first of them, on which splits and thresholds are tried out; 4 when not given. Not for a uniform split
    without thresholds."""
    evaluate_sequences: int = 32
    """Of the validation text, for the card; 0 is all."""
    batch_size: int = 4
    """Sequences at a time."""
    device: str | None = None
    """CUDA where there is one, when not given."""
    speed: bool = False
    """Measure on that device how fast the finished model decodes, dense and at every level, and tell it in the card."""

    def __post_init__(self) -> None:
        if self.method == "relu":
            for name, value in (("sparsity", self.sparsity), ("split", self.split)):
                if value is not None:
                    told = list(value) if isinstance(value, tuple) else value
                    raise ValueError(
                        f"{name}={told}: method=relu drops what is zero in every case, so there is nothing to choose; "
                        f"leave {name} out, or take another method"
                    )
        else:
            given = LEVELS if self.sparsity is None else self.sparsity
            levels = given if isinstance(given, Sequence) else (given,)
            if not levels:
                raise ValueError("sparsity=[]: name at least one, such as 0.4")
            object.__setattr__(self, "sparsity", tuple(sorted({float(level) for level in levels})))
            object.__setattr__(self, "split", self.split or "search")
        if self.split == "uniform" and self.method not in THRESHOLDED:
            if self.search_sequences is not None:
                raise ValueError(
                    f"search_sequences={self.search_sequences}: with split=uniform, method={self.method} tries nothing "
                    "out; leave search_sequences out, or take another split"
                )
        elif self.search_sequences is None:
            object.__setattr__(self, "search_sequences", self.searched)
        for level in self.levels:
            if not 0 <= level < 1:
                raise ValueError(f"sparsity={level:g}: must be at least 0 and below 1")
        for name, value, least in (
            ("sequences", self.sequences, 1),
            ("seq_len", self.seq_len, 0),
            ("search_sequences", self.searched, 1),
            ("evaluate_sequences", self.evaluate_sequences, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.searched > self.sequences:
            raise ValueError(
                f"search_sequences={self.searched}: they are the first of the calibration text, which has "
                f"sequences={self.sequences}; raise that, or lower search_sequences"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsities, the smallest first; none of method `relu`."""
        return self.sparsity if isinstance(self.sparsity, tuple) else ()

    @property
    def searched(self) -> int:
        """Sequences that splits and thresholds are tried out on, settled."""
        default = max(1, min(SEARCH_SEQUENCES, self.sequences))
        return default if self.search_sequences is None else self.search_sequences

    @property
    def basis(self) -> Rotation:
        """The rotation, settled."""
        return ROTATIONS[self.method] if self.rotation == "auto" else self.rotation


def check_source(folder: ModelFolder, config: SparsifyConfig) -> None:
    """Says what stands against making a model sparse, before any work is done.

    Raises:
        ValueError: If the model is rotated already, is of a kind that cannot be made sparse so, or has not enough to
            drop.
    """
    planned = (
        read_json(folder.path / PLAN_FILE).get("rotation", "none") if (folder.path / PLAN_FILE).exists() else "none"
    )
    rotation = folder.config.rotation if folder.config.rotation != "none" else planned
    if rotation != "none":
        raise ValueError(
            f"{folder.path} is rotated already (rotation={rotation}): sparsify the model that it was made from"
        )
    check_model(folder.config, config, str(folder.path))


def check_model(model: ModelConfig, config: SparsifyConfig, name: str) -> None:
    """Says what stands against making a model of this kind sparse.

    Args:
        model: The dense model, which is not rotated.
        config: How it is to be made sparse.
        name: What to call it.

    Raises:
        ValueError: If it cannot be made sparse so, or has not enough to drop.
    """
    if model.attention_mode != "causal":
        raise ValueError(
            f"{name}: attention_mode={model.attention_mode}: only a model that generates text has "
            "tokens to decode sparsely"
        )
    if config.basis != "none" and model.norm != "rmsnorm":
        raise ValueError(
            f"{name}: rotation={config.basis}: only rmsnorm is the same in every basis, not {model.norm}; set "
            "rotation=none, and it is made sparse in its own"
        )
    target = model if config.basis == "none" else absorbed_config(model, config.basis)
    if config.method == "relu":
        if not model.rectified:
            raise ValueError(
                f"{name}: method=relu: hidden units of mlp={model.mlp} are never exactly zero, only those of models "
                "that were trained with mlp=reglu, relu or relu2"
            )
        if all(map(model.has_experts, range(model.n_blocks))):
            raise ValueError(
                f"{name}: method=relu: every Block of this model has experts, which are read whole; only hidden units "
                "of dense MLPs are left out"
            )
        return
    for level in config.levels:
        allocate.uniform(target, level)
