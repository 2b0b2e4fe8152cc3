"""Growing a model folder into another, tensor by tensor: the model is never in memory, whatever its size."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from raygrow.growth.operator import GrowthConfig
from raygrow.nn import cost
from raygrow.progress import Progress, silent
from raygrow.weights.apply import apply_rules
from raygrow.weights.folder import open_folder, write_folder


def grow_folder(
    source: str | Path, target: str | Path, operator: GrowthConfig, *, progress: Progress = silent
) -> dict[str, Any]:
    """Writes the grown model of a folder as a new folder of the same format and dtypes, tokenizer included.

    Args:
        source: A model folder, raygrow's or a Hugging Face Llama.
        target: The folder to write. It appears when it is complete.
        operator: What to do, e.g. `Gstack(factor=2)`.
        progress: Told of every tensor written.

    Returns:
        A summary: folders, operator, blocks and parameters before and after, seconds.

    Raises:
        ValueError: If the source cannot be read; names the tensor, key or file.
        OSError: If the target exists already or cannot be written.
    """
    start = time.perf_counter()
    folder = open_folder(source)
    growth = operator.grow(folder.config)

    def grown() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(apply_rules(growth.rules, folder.tensors), start=1):
            yield pair
            progress(done, len(growth.rules), "tensors written")

    write_folder(
        target,
        growth.config,
        grown(),
        format=folder.format,
        tokenizer_from=folder.path,
        settings=folder.settings if folder.format == "hf" else None,
    )
    return {
        "source": str(source),
        "target": str(target),
        "format": folder.format,
        "operator": asdict(operator),
        "n_blocks": [folder.config.n_blocks, growth.config.n_blocks],
        "parameters": [cost.parameters(folder.config), cost.parameters(growth.config)],
        "seconds": time.perf_counter() - start,
    }
