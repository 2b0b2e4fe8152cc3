"""A sparse model from a dense one: calibrated, rotated, its splits searched and measured, with a plan and a card."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from raygrow.nn.device import choose_device
from raygrow.nn.rack import Rack
from raygrow.progress import Progress, silent
from raygrow.sparsity.absorb import absorb_rules, absorbed_config
from raygrow.sparsity.calibrate import calibrate
from raygrow.sparsity.card import CARD_FILE, Card, Origin, Row
from raygrow.sparsity.config import SparsifyConfig, check_source
from raygrow.sparsity.inputs import Place
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import Choice
from raygrow.sparsity.plan import Calibration, Level, SparsityPlan
from raygrow.sparsity.policy import POLICIES, Policy, policy_loss
from raygrow.sparsity.rotation import block_bases, global_basis
from raygrow.weights.apply import Derived
from raygrow.weights.atomic import new_folder
from raygrow.weights.fingerprint import fingerprint
from raygrow.weights.folder import ModelFolder, describe, layout_of, load_model, open_folder, write_stored

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


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
        policy: [policy_loss(model, SparseRows(), sequence, policy) for sequence in _sequences(batch)]
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
