"""An engine from a folder: which device and dtype, sparse or dense, and the tokens that end a text."""

import logging
from pathlib import Path

import torch

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.nn.device import choose_device
from raygrow.nn.joined import join
from raygrow.sparsity.apply import sparse
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.plan import SparsityPlan, load_plan
from raygrow.text.tokenizer import load_tokenizer
from raygrow.weights.folder import ModelFolder, finished_model, load_model, open_folder
from raygrow.weights.json_file import read_json

logger = logging.getLogger(__name__)


def load_engine(folder: str | Path, config: EngineConfig | None = None) -> Engine:
    """The engine of a model folder, raygrow's or Hugging Face's, or of a finished run.

    Raises:
        FileNotFoundError: If the folder, its tensors or its tokenizer are missing, or a dense model is to be sparse.
        ValueError: If a file is damaged, the model cannot generate, was not made for that sparsity, or there is no such
            device.
    """
    config = config or EngineConfig()
    folder = finished_model(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder; give one that holds a model, or a finished run")
    tokenizer, plan = load_tokenizer(folder), sparsity_plan(open_folder(folder), config)
    device = choose_device(config.device)
    logger.info("loading %s on %s", folder, device)
    dtype = (
        getattr(torch, config.dtype) if config.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else None
    )
    model, rows = load_model(folder, dtype=dtype, device=device), None
    if plan is not None and config.sparsity:
        rows = SparseRows() if plan.method != "relu" else None  # which leaves out what is zero, of any token
        sparse(model, plan, config.sparsity, rows=rows)
    if device.type == "cuda":
        join(model)
    return Engine(model, tokenizer, config, end_ids={tokenizer.eos_id, *_end_ids(folder)}, rows=rows)


def sparsity_plan(folder: ModelFolder, config: EngineConfig) -> SparsityPlan | None:
    """The plan of a model that is to be sparse, None if it is to be dense. Reads samples of the weights.

    Raises:
        FileNotFoundError: If the model is a dense one.
        ValueError: If its plan is damaged or of other weights, or it was not made for that sparsity; names those that
            it was made for.
    """
    if not config.sparsity:
        return None
    plan = load_plan(folder)
    plan.level(config.sparsity)
    return plan


def _end_ids(folder: Path) -> list[int]:
    """Further tokens that end a text: chat models of Hugging Face name several."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.exists() else None
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
