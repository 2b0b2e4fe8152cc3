"""Makes a model folder sparse on prepared data: its train split calibrates, its validation split measures."""

import logging
from datetime import UTC, datetime
from pathlib import Path

import torch

from raygrow.data.sampler import fixed_batch
from raygrow.data.shards import Tokens, check_tokenizer, open_tokens
from raygrow.evaluate.perplexity import LONGEST
from raygrow.evaluate.record import commit, versions
from raygrow.evaluate.speed import decode_speeds, hardware
from raygrow.nn.config import ModelConfig
from raygrow.nn.device import choose_device
from raygrow.progress import Progress, silent
from raygrow.sparsity.card import CARD_FILE, Origin
from raygrow.sparsity.config import SparsifyConfig, check_source
from raygrow.sparsity.sparsify import Sparsified, Texts, sparsify_folder
from raygrow.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from raygrow.weights.atomic import replace_file
from raygrow.weights.folder import ModelFolder, open_folder

logger = logging.getLogger(__name__)


def sparsify_model(
    model_folder: Path, target: Path, data_path: Path, config: SparsifyConfig, *, progress: Progress = silent
) -> Sparsified:
    """Writes the sparse model of a folder, with its plan and card.

    Args:
        model_folder: A raygrow or Hugging Face model folder.
        target: The folder to write.
        data_path: A folder of prepared data.
        config: How.
        progress: Told how far it is.

    Raises:
        FileNotFoundError: If a folder or a file in it is missing.
        ValueError: If the model cannot be made sparse so, the data was prepared with another tokenizer, or is too
            short, there is no such device or it has too little memory, or speed is to be measured of a model without a
            tokenizer; nothing is written. Also if the engine fails while speed is measured: then the model is there.
        OSError: If the target exists already or cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it or choose another name")
    folder = open_folder(model_folder)
    check_source(folder, config)
    device = choose_device(config.device)
    if config.speed and not (folder.path / TOKENIZER_FILE).is_file():
        raise ValueError(f"speed=true: {folder.path} has no {TOKENIZER_FILE}, which the engine needs; add it")
    texts = _texts(folder, data_path, config)
    origin = Origin(
        device=hardware(device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        versions=versions(),
    )
    try:
        made = sparsify_folder(folder, target, texts, config, origin, progress=progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"batch_size={config.batch_size}: the device has too little memory for {folder.path} and as many sequences "
            "at a time: lower batch_size or seq_len, or use device=cpu"
        ) from error
    if config.speed:
        found = decode_speeds(target, made.plan.levels, texts.validation[0][0].tolist(), device=config.device)
        replace_file(target / CARD_FILE, (target / CARD_FILE).read_text(encoding="utf-8") + "\n" + found.told())
        logger.info("how fast it decodes:\n%s", found.told())
    return made


def _texts(folder: ModelFolder, data_path: Path, config: SparsifyConfig) -> Texts:
    train, validation = (open_tokens(data_path, split) for split in ("train", "validation"))
    if (folder.path / TOKENIZER_FILE).is_file():
        check_tokenizer(train.manifest, load_tokenizer(folder.path), name=f"the tokenizer of {folder.path}")
    if train.manifest.vocab_size > folder.config.vocab_size:
        raise ValueError(
            f"{folder.path} knows {folder.config.vocab_size} tokens, but {data_path} was prepared with a tokenizer of "
            f"{train.manifest.vocab_size}: prepare the data with the model's own tokenizer"
        )
    seq_len = check_calibration(train, folder.config, config, data_path)
    return Texts(
        name=str(data_path),
        calibration=fixed_batch(train, config.sequences, seq_len),
        validation=fixed_batch(validation, config.evaluate_sequences, seq_len),
    )


def calibration_length(model: ModelConfig, config: SparsifyConfig) -> int:
    """Tokens in a sequence of the calibration text, settled.

    Raises:
        ValueError: If the model does not take as many, or the text would be too short to tell anything.
    """
    seq_len = config.seq_len or min(model.max_seq_len, LONGEST)
    if not 2 <= seq_len <= model.max_seq_len:
        raise ValueError(f"seq_len={seq_len}: this model takes 2 to {model.max_seq_len} tokens")
    if config.sequences * seq_len < model.d_model:
        raise ValueError(
            f"sequences={config.sequences}, seq_len={seq_len}: fewer tokens than d_model={model.d_model}, too few to "
            "tell where the energy of the activations lies; raise one of them"
        )
    return seq_len


def check_calibration(tokens: Tokens, model: ModelConfig, config: SparsifyConfig, data_path: Path) -> int:
    """Makes sure that a train split is long enough to calibrate on; tokens in a sequence of it.

    Raises:
        ValueError: If it is not.
    """
    seq_len = calibration_length(model, config)
    held = sum((len(shard) - 1) // seq_len for shard in tokens.shards)
    if held < config.sequences:
        raise ValueError(
            f"{data_path}: calibration needs {config.sequences} sequences of {seq_len} tokens, the train split holds "
            f"{held}: prepare more text, or lower sequences or seq_len"
        )
    return seq_len
