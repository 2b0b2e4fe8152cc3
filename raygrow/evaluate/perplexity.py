"""Loss, perplexity and bits per byte of a finished model on the validation split of prepared data."""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from raygrow.data.sampler import fixed_batch
from raygrow.data.shards import MANIFEST_FILE, check_tokenizer, open_tokens
from raygrow.evaluate.record import commit, sha256_of, versions
from raygrow.nn.device import choose_device
from raygrow.nn.score import bits_per_byte, in_pieces, sum_loss
from raygrow.progress import Progress, silent
from raygrow.sparsity.apply import sparse
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.plan import PLAN_FILE, load_plan
from raygrow.sparsity.policy import Policy, under_policy
from raygrow.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from raygrow.weights.folder import load_model, open_folder

logger = logging.getLogger(__name__)

LONGEST = 2048
"""Tokens of a sequence when nobody says; some models take 64 times as many."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """A result with all that is needed to get it again."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Tokens that were predicted."""
    seconds: float
    sequences: int
    seq_len: int
    sparsity: float | None
    """Of a model that has been made sparse; None where it ran dense."""
    policy: Policy
    """Which tokens counted, and were sparse if any were, see `sparsity/policy.py`."""
    device: str
    dtype: str
    model: str
    model_sha256: str
    """Of config.json and the tensors, and of the plan of a model that ran sparse."""
    data: str
    data_sha256: str
    """Of the manifest, which holds the shards' own."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    commit: str | None = field(default_factory=commit)
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def evaluate_model(
    model_folder: Path,
    data_path: Path,
    *,
    sequences: int = 0,
    seq_len: int | None = None,
    batch_size: int = 8,
    sparsity: float | None = None,
    policy: Policy | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> EvaluationRecord:
    """Scores a model folder on the validation split, in the precision that its weights are stored in.

    Args:
        model_folder: A raygrow or Hugging Face model folder.
        data_path: A folder of prepared data.
        sequences: How many, from the start of the split; 0 takes all.
        seq_len: Tokens in each; what the model takes when not given, `LONGEST` at most.
        batch_size: Sequences in one forward pass.
        sparsity: A level of a model that has been made sparse; it runs dense when not given, or 0.
        policy: Which tokens count, and are sparse if any are: of `decode` the second half of each sequence. When not
            given, `all` for a dense model and `decode` for a sparse one.
        device: `cuda`, `cpu`, ...; CUDA where there is one when not given.
        progress: Called after each batch.

    Raises:
        FileNotFoundError: If a folder or a file in it is missing.
        ValueError: If a file is damaged, the data was prepared with another tokenizer than the model's, the split is
            shorter than one sequence, a number is out of range, the model was not made for that sparsity, its loss is
            no number, or there is no such device or it has too little memory for so many tokens.
    """
    if sequences < 0:
        raise ValueError(f"sequences={sequences}: must be at least 1, or 0 for all")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    sparsity = sparsity or None  # as the engine has it
    tokens = open_tokens(data_path, "validation")
    if (model_folder / TOKENIZER_FILE).is_file():
        check_tokenizer(tokens.manifest, load_tokenizer(model_folder), name=f"the tokenizer of {model_folder}")
    place = choose_device(device)
    plan = load_plan(open_folder(model_folder)) if sparsity is not None else None
    model, rows = load_model(model_folder, device=place).eval(), SparseRows()
    if plan is not None and sparsity is not None:
        sparse(model, plan, sparsity, rows=rows)
    if tokens.manifest.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{model_folder} knows {model.config.vocab_size} tokens, but {data_path} was prepared with a tokenizer of "
            f"{tokens.manifest.vocab_size}: prepare the data with the model's own tokenizer"
        )
    seq_len = min(model.config.max_seq_len, LONGEST) if seq_len is None else seq_len
    if not 1 <= seq_len <= model.config.max_seq_len:
        raise ValueError(f"seq_len={seq_len}: this model takes 1 to {model.config.max_seq_len} tokens")
    batch = fixed_batch(tokens, sequences, seq_len)
    policy = policy or ("all" if sparsity is None else "decode")
    batch = under_policy(batch, rows, policy)
    logger.info("evaluating %s on %s, %d sequences of %d tokens", model_folder, place, *batch[0].shape)
    started = time.perf_counter()
    try:
        total, count = sum_loss(model, in_pieces(batch, batch_size, place, progress))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"seq_len={seq_len}, batch_size={batch_size}: {place} has too little memory for {model_folder} and as many "
            "tokens at a time: lower one of them"
        ) from error
    loss = total.item() / count
    if not math.isfinite(loss):
        raise ValueError(f"{model_folder}: the loss of this model is {loss:g}: look for NaN and inf in its weights")
    return EvaluationRecord(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, a float overflows
        bits_per_byte=bits_per_byte(loss, bytes_per_token=tokens.bytes_per_token),
        tokens=count,
        seconds=time.perf_counter() - started,
        sequences=batch[0].shape[0],
        seq_len=batch[0].shape[1],
        sparsity=sparsity,
        policy=policy,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        model=str(model_folder),
        model_sha256=sha256_of(
            [
                model_folder / "config.json",
                *model_folder.glob("*.safetensors"),
                *([] if sparsity is None else [model_folder / PLAN_FILE]),
            ]
        ),
        data=str(data_path),
        data_sha256=sha256_of([data_path / MANIFEST_FILE]),
    )
