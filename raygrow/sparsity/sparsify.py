"""A sparse model from a dense one: calibrated, rotated, its splits searched and measured, with a plan and a card."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.device import choose_device
from raygrow.nn.rack import Rack
from raygrow.progress import Progress, silent
from raygrow.sparsity import allocate
from raygrow.sparsity.absorb import absorb_rules, absorbed_config
from raygrow.sparsity.allocate import SplitName
from raygrow.sparsity.calibrate import calibrate
from raygrow.sparsity.card import Card, Origin, Row
from raygrow.sparsity.inputs import Place
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import ROTATIONS, THRESHOLDED, Choice, Method, Rotation
from raygrow.sparsity.plan import PLAN_FILE, Calibration, Level, SparsityPlan
from raygrow.sparsity.policy import POLICIES, Policy, policy_loss
from raygrow.sparsity.rotation import block_bases, global_basis
from raygrow.weights.apply import Derived
from raygrow.weights.atomic import new_folder
from raygrow.weights.fingerprint import fingerprint
from raygrow.weights.folder import ModelFolder, describe, layout_of, load_model, open_folder, write_stored
from raygrow.weights.json_file import read_json

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
LEVELS = (0.25, 0.4, 0.5)
"""Made when nobody names any."""
SEARCH_SEQUENCES = 4
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """How a model is made sparse.

    Raises:
        ValueError: If a field is out of range, or has no place beside another; names them.
    """

    sparsity: float | tuple[float, ...] | None = None
    """Shares of the Blocks' weights that a token is not to multiply by; a level for each, LEVELS when not given. Not
    for method `relu`, which has one level, what the model does by itself, under its own share."""
    method: Method = "rotated_wina"
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


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a model is calibrated and measured on: tokens and targets, `(B, T)` each."""

    name: str
    calibration: Batch
    validation: Batch


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """What has been made."""

    plan: SparsityPlan
    rows: list[Row]
    """What the levels cost, the dense model first."""
    tokens: int
    """That have gone through the model on the way, to calibrate, to search and to measure."""


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


def sparsify_folder(
    folder: ModelFolder,
    target: str | Path,
    texts: Texts,
    config: SparsifyConfig,
    origin: Origin,
    *,
    progress: Progress = silent,
) -> Sparsified:
    """Writes a sparse model as a new folder: the model, its plan `sparsity.json` and its card `README.md`.

    Calibration has one Block's weights on the device at a time, and the rotated model is written tensor by tensor; to
    search the splits and to measure them, the model is loaded.

    Args:
        folder: The dense model. A Hugging Face model stays one, unless it gets adapters.
        target: The folder to write. It appears when it is complete.
        texts: What to calibrate on and what to measure on.
        config: How.
        origin: For the card.
        progress: Told of Blocks, tensors and inputs that have been dealt with.

    Raises:
        ValueError: If the model cannot be made sparse so, or not on that device, or its loss is not finite; nothing is
            written.
        OSError: If the target exists already or cannot be written.
    """
    check_source(folder, config)
    device = choose_device(config.device)
    with new_folder(Path(target)) as aside:
        rows = [_dense_row(folder, texts.validation, device)]
        _write_model(folder, aside, texts.calibration[0], config, device, progress)
        model = load_model(aside, device=device).eval()
        levels = Levels(
            model, config.method, texts.calibration[0], searched=config.searched, batch_size=config.batch_size
        )
        rotated = None
        if config.basis != "none":
            rotated = Row(
                sparsity=0.0, nominal=0.0, skipped=0.0, sequence_losses=_sequence_losses(levels, {}, texts.validation)
            )
        found: dict[float, Level] = {}
        for sparsity, level in _levels(levels, config, progress):
            found[sparsity] = level
            losses = _sequence_losses(levels, level.choices, texts.validation)
            rows.append(Row(sparsity=sparsity, nominal=level.nominal, skipped=level.skipped, sequence_losses=losses))
        plan = SparsityPlan(
            method=config.method,
            rotation=config.basis,
            fingerprint=fingerprint(open_folder(aside)),
            calibration=_calibration(texts),
            levels=found,
        )
        plan.save(aside)
        told = Card(
            folder=folder,
            plan=plan,
            config=replace(config, seq_len=texts.validation[0].shape[1]),
            taken=levels.taken,
            rows=rows,
            rotated=rotated,
            sequences=texts.validation[0].shape[0],
            dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
            origin=origin,
        )
        (aside / CARD_FILE).write_text(told.text(), encoding="utf-8")
    measured_dense, calibrated = len(POLICIES) * texts.validation[0].numel(), texts.calibration[0].numel()
    rotating = calibrated if config.basis != "none" else 0
    return Sparsified(plan=plan, rows=rows, tokens=measured_dense + rotating + levels.tokens)


def _levels(levels: Levels, config: SparsifyConfig, progress: Progress) -> Iterator[tuple[float, Level]]:
    if config.split is None:
        level = levels.zeros()
        yield round(level.nominal, 2), level
        return
    for sparsity in config.levels:
        yield sparsity, levels.level(sparsity, config.split, progress=progress)


def _write_model(
    folder: ModelFolder,
    target: Path,
    tokens_BT: Tensor,
    config: SparsifyConfig,
    device: torch.device,
    progress: Progress,
) -> None:
    """The model in its new bases, or as it is."""
    rotation, tensors, model = config.basis, folder.tensors, folder.config
    if rotation != "none":
        blocks = calibrate(model, tensors, tokens_BT, device=device, batch_size=config.batch_size, progress=progress)
        bases = block_bases(blocks, device) if rotation == "block" else global_basis(blocks, model, device)
        if model.tie_embeddings:
            logger.info("the model is untied: its embedding and its head are in different bases")
        tensors = Derived(absorb_rules(model, bases, rotation, device), tensors)
        model = absorbed_config(model, rotation)
    format = "raygrow" if rotation == "block" else folder.format
    if format != folder.format:
        logger.info("written in raygrow's format: Hugging Face's models have no place for adapters")
    description = describe(
        model, format, settings=folder.settings if format == "hf" else None, tokenizer_from=folder.path
    )
    layout = layout_of(model, format)
    stored = Derived(layout.store, tensors)

    def reported() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(stored.items(), start=1):
            yield pair
            progress(done, len(stored), "tensors written")

    write_stored(target, reported(), layout, description, companions_from=folder.path, replace=True)


def _dense_row(folder: ModelFolder, batch: Batch, device: torch.device) -> Row:
    model: Rack = load_model(folder.path, device=device).eval()
    found: dict[Policy, list[float]] = {
        policy: [policy_loss(model, SparseRows(), sequence, policy)[0] for sequence in _sequences(batch)]
        for policy in POLICIES
    }
    row = Row(sparsity=0.0, nominal=0.0, skipped=0.0, sequence_losses=found)
    if not all(map(math.isfinite, row.losses.values())):
        raise ValueError(
            f"{folder.path}: the loss of this model is {row.losses['all']:g} on the validation text, so there is "
            "nothing to choose by: look for NaN and inf in its weights"
        )
    return row


def _sequence_losses(levels: Levels, choices: Mapping[Place, Choice], batch: Batch) -> dict[Policy, list[float]]:
    """Nats per token of every sequence by itself, which is what tells how far their mean is to be trusted."""
    return {
        policy: [levels.measure(choices, sequence, policy) for sequence in _sequences(batch)] for policy in POLICIES
    }


def _sequences(batch: Batch) -> Iterator[Batch]:
    return zip(*(part_BT.split(1) for part_BT in batch), strict=True)


def _calibration(texts: Texts) -> Calibration:
    tokens_BT = texts.calibration[0]
    return Calibration(
        data=texts.name,
        sequences=tokens_BT.shape[0],
        seq_len=tokens_BT.shape[1],
        sha256=hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest(),
    )
