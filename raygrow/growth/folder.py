"""Growing a model folder into another, tensor by tensor: the model is never in memory, whatever its size."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from raygrow.growth.operator import GrowthConfig
from raygrow.nn import cost
from raygrow.progress import Progress, silent
from raygrow.weights.apply import Derived
from raygrow.weights.folder import Format, describe, layout_of, open_folder, write_stored
from raygrow.weights.rules import Rule, Rules, Stacked


def grow_folder(
    source: str | Path,
    target: str | Path,
    operator: GrowthConfig,
    *,
    format: Format | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Writes the grown model of a folder as a new folder of the same dtypes, tokenizer included.

    The source is read once and the target written once; in memory is one tensor at a time, and one expert at a time
    where the format stores them one by one.

    Args:
        source: A model folder, raygrow's or a Hugging Face one.
        target: The folder to write. It appears when it is complete.
        operator: What to do, e.g. `Gstack(factor=2)`.
        format: Of the target; that of the source when not given. A Hugging Face model stays one, in the family that
            can hold what it grew into: a Llama with experts is a Mixtral.
        progress: Told of every tensor written.

    Returns:
        A summary: folders, format and model type, operator, blocks and parameters before and after, seconds.

    Raises:
        ValueError: If the source cannot be read, the operator cannot grow it or the format cannot hold the result;
            names the tensor, key or file.
        OSError: If the target exists already or cannot be written.
    """
    start = time.perf_counter()
    folder = open_folder(source)
    format = format or folder.format
    growth = operator.grow(folder.config)
    settings = folder.settings if folder.format == "hf" else None
    description = describe(growth.config, format, settings=settings, tokenizer_from=folder.path)
    layout = layout_of(growth.config, format)
    store = in_order_of_sources(layout.store, growth.rules, folder.tensors)
    grown = Derived(store, Derived(growth.rules, folder.tensors))

    def reported() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(grown.items(), start=1):
            yield pair
            progress(done, len(grown), "tensors written")

    write_stored(target, reported(), layout, description, companions_from=folder.path)
    return {
        "source": str(source),
        "target": str(target),
        "format": format,
        "model_type": description["model_type"],
        "operator": asdict(operator),
        "n_blocks": [folder.config.n_blocks, growth.config.n_blocks],
        "parameters": [cost.parameters(folder.config), cost.parameters(growth.config)],
        "seconds": time.perf_counter() - start,
    }


def in_order_of_sources(store: Mapping[str, Rule], growth: Rules, sources: Iterable[str]) -> dict[str, Rule]:
    """The rules of `store`, sorted so that all that is made from one source tensor follows one another.

    In the order of the target, every copy of a Block would be a pass over the source, from the disk each time where
    the model is larger than the memory that the system has to spare.

    Args:
        store: How what is stored is made from the parameters of the grown model.
        growth: How those are made from the source's.
        sources: Names of the source's parameters in its own order.
    """
    place_of = {name: place for place, name in enumerate(sources)}
    places: dict[str, tuple[int, int]] = {}
    place = 0
    for name, rule in store.items():
        grown, expert = growth[rule.terms[0].source], _expert(rule)
        if isinstance(grown, Stacked) and expert is not None:
            grown = grown.rules[expert]
        # what has no source stays behind what comes before it
        place = place_of[grown.sources[0]] if grown.sources else place
        places[name] = place, expert or 0
    return {name: store[name] for name in sorted(store, key=places.__getitem__)}


def _expert(rule: Rule) -> int | None:
    """The number of the expert that a rule takes by itself."""
    gather = rule.terms[0].gather
    return gather[0] if gather and isinstance(gather[0], int) else None
