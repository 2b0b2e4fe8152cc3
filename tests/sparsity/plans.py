"""Plans for models that nobody has calibrated."""

from pathlib import Path

from raygrow.kernels.group_select import group_sizes
from raygrow.sparsity.allocate import ratio_split
from raygrow.sparsity.inputs import input_size
from raygrow.sparsity.methods import Choice, Method
from raygrow.sparsity.plan import Calibration, SparsityPlan, make_level
from raygrow.weights.fingerprint import fingerprint
from raygrow.weights.folder import open_folder


def add_plan(folder: Path, *levels: float, method: Method = "wina", threshold: float | None = None) -> SparsityPlan:
    """Lets a model folder be run sparse, in its own basis; inputs of the residual stream keep more than the others."""
    opened = open_folder(folder)
    config = opened.config
    made = {}

    def chosen(keep: int, size: int) -> Choice:
        return Choice(keep, threshold, spread(keep, size) if method == "grouped" else None)

    for level in levels:
        split = ratio_split(config, level, 0.8)
        choices = {
            place: chosen(max(1, round((1 - share) * input_size(config, *place))), input_size(config, *place))
            for place, share in split.items()
        }
        made[level] = make_level(config, choices)
    calibration = Calibration(data="none", sequences=0, seq_len=0, sha256="")
    plan = SparsityPlan(
        method=method, rotation="none", fingerprint=fingerprint(opened), calibration=calibration, levels=made
    )
    plan.save(folder)
    return plan


def spread(keep: int, size: int) -> tuple[int, ...]:
    """So many entries, about as many of each group."""
    sizes = group_sizes(size)
    ends = [round(keep * sum(sizes[: group + 1]) / size) for group in range(len(sizes))]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
