"""Decoding with sparse activations on one GPU, beside dense decoding at its best: products, and whole steps.

    python benchmarks/sparse_decode.py                      7B Llama shapes, random weights, bf16, one H200
    python benchmarks/sparse_decode.py --methods grouped    steps of this method alone
    python benchmarks/sparse_decode.py --smoke              tiny, also on a CPU (then by the torch twins)

Products: each is launched once per Block, over that Block's own weights, in one CUDA graph, so that no weight is in the
cache; the time of a launch is that of the graph by the number of Blocks, gaps included. The floor is the bytes that
must be read by the measured rate of a large copy. `lists` is given what is kept, and lists what the next one reads;
`selected` finds the largest entries of its input first; `threshold` drops what does not exceed one. Of several rows,
the dense product is beside the one that leaves out what none of them needs.

Steps: all of the model from tokens to the likeliest next ones, as the engine records them, replayed CUDA graphs on both
sides, 512 tokens of cache. A sparsity is split so that what reads the residual stream drops 0.8 of it, which is about
what searched splits come to. Thresholds and groups are calibrated on random tokens.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import copy_bytes_per_second, write_results
from torch import Tensor
from workload import SEVEN, SMOKE, random_model

from raygrow.infer.attention import Decodes, cache_attends
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.sampler import likeliest
from raygrow.kernels.group_select import Groups, group_sizes, groups_of, list_groups
from raygrow.kernels.list_linear import list_linear
from raygrow.kernels.row_linear import Around, row_linear
from raygrow.kernels.sparse_linear import masked, norm_select, select, sparse_linear
from raygrow.kernels.threshold_linear import threshold_linear
from raygrow.kernels.zeros import nonzero_linear
from raygrow.nn.config import ModelConfig
from raygrow.nn.joined import join
from raygrow.nn.rack import Rack
from raygrow.sparsity.allocate import ratio_split
from raygrow.sparsity.inputs import INPUTS, Input, block_weights, input_size, input_weights
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.methods import METHODS, THRESHOLDED, Method

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LEVELS, RATIO = (0.25, 0.4, 0.5, 0.75), 0.8
ROWS, PAST = (1, 2, 4, 8), 512
EPS = 1e-5
NORMED: tuple[Input, ...] = ("attention", "mlp")
NEXT: dict[Input, Input] = {"attention": "o", "o": "mlp", "mlp": "down", "down": "attention"}
CALIBRATION = 4, 128
"""Sequences and tokens of each."""


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grouped", "rotated_teal", "rotated_wina"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    if not (CUDA or arguments.smoke):
        parser.error("a GPU is needed to measure anything; --smoke runs all of it tiny, on a CPU too")
    config = SMOKE if arguments.smoke else SEVEN
    rate = copy_bytes_per_second(DEVICE) if CUDA else 1e11
    print(f"a large copy: {rate / 1e12:.2f} TB/s, read and written")
    result: dict[str, Any] = {"copy_bytes_per_second": rate, "ratio": RATIO, "products": [], "steps": []}
    for name in INPUTS:
        result["products"] += products(config, name, arguments.levels, rate)
    for rows in ROWS:
        result["steps"] += steps(config, rows, arguments.methods, arguments.levels, rate)
    if not arguments.smoke:
        print(f"written to {write_results('sparse_decode', result)}")


def products(config: ModelConfig, name: Input, levels: list[float], rate: float) -> Iterator[dict[str, Any]]:
    """One input's projections, of one row and of several, dense and at every level."""
    size, features = input_size(config, 0, name), input_weights(config, 0, name) // input_size(config, 0, name)
    gated = name == "mlp"
    out = features // 2 if gated else features
    weights_DF = [random(size, features, scale=size**-0.5) for _ in range(config.n_blocks)]
    weights_FD = [weight.T.contiguous() for weight in weights_DF]
    x_1D, addend = random(1, size), None if name in NORMED else random(1, out)
    around = Around(eps=EPS if name in NORMED else None, gated=gated, addend_RF=addend)

    def row(way: str, share: float, rows: int, product: Callable[[int], object]) -> dict[str, Any]:
        us = 1e3 * milliseconds(lambda: [product(block) for block in range(config.n_blocks)]) / config.n_blocks
        floor = 1e6 * 2 * size * features * (1 - share) / rate
        told = f"{us:8.1f} us, floor {floor:6.1f}" if us else "runs"
        print(f"{name:<10}{rows} rows  drops {share:.2f}  {way:<10}{told}")
        return {"input": name, "way": way, "rows": rows, "dropped": share, "us": us, "floor_us": floor}

    yield row("dense", 0.0, 1, lambda block: row_linear(x_1D, weights_FD[block], around))
    for rows in ROWS[1:]:
        yield row("dense", 0.0, rows, partial(dense_rows, random(rows, size), weights_DF))
    for level in levels:
        split = ratio_split(config, level, RATIO)
        share, then = split[0, name], even(out, split[0, NEXT[name]]) if name != "attention" else None
        for way, product in ways(x_1D, weights_DF, around, share, then).items():
            yield row(way, share, 1, product)
        for rows in ROWS[1:]:
            yield row("union", share, rows, partial(union, masked(random(rows, size), kept(size, share)), weights_DF))


def ways(
    x_1D: Tensor, weights_DF: list[Tensor], around: Around, share: float, then: Groups | None
) -> dict[str, Callable[[int], object]]:
    """Sparse products of one row with a Block's weight. Attention lists what `o` reads, not q, k and v."""
    size = x_1D.shape[1]
    keep, scale_D = kept(size, share), torch.rand(size, device=DEVICE) + 0.5
    listed = list_groups(x_1D, even(size, share))
    factor = x_1D.float().square().mean() ** -0.5 if around.eps else 1.0
    score_D = x_1D[0].float().abs() * factor * scale_D
    threshold = score_D.sort(descending=True).values[keep - 1].item() * (1 - 1e-6)

    def selected(block: int) -> Tensor:
        of_x = norm_select(x_1D, keep, EPS, None, scale_D) if around.eps else select(x_1D, keep, scale_D)
        return sparse_linear(of_x, weights_DF[block], addend_RF=around.addend_RF, gated=around.gated)

    return {
        "lists": lambda block: list_linear(listed, weights_DF[block], around, then),
        "threshold": lambda block: threshold_linear(x_1D, weights_DF[block], threshold, scale_D, around),
        "selected": selected,
    }


def dense_rows(x_RD: Tensor, weights_DF: list[Tensor], block: int) -> Tensor:
    return x_RD @ weights_DF[block]


def union(x_RD: Tensor, weights_DF: list[Tensor], block: int) -> Tensor:
    return nonzero_linear(x_RD, weights_DF[block])


def steps(
    config: ModelConfig, rows: int, methods: list[Method], levels: list[float], rate: float
) -> Iterator[dict[str, Any]]:
    """Whole steps of some rows, dense and sparse."""
    head, blocks = 2 * config.d_model * config.vocab_size, 2 * block_weights(config)

    def row(method: str, sparsity: float, ms: float, dense: float) -> dict[str, Any]:
        floor = 1e3 * (head + blocks * (1 - sparsity)) / rate
        told = f"{ms:7.3f} ms, {floor / ms:.1%} of the floor, {dense / ms:.3f} times as fast as dense" if ms else "runs"
        print(f"{rows} rows  {method:<13} {sparsity:.2f}  {told}")
        return {"rows": rows, "method": method, "sparsity": sparsity, "ms": ms, "floor_ms": floor, "dense_ms": dense}

    dense = step_ms(join(random_model(config, DEVICE)), rows)
    yield row("dense", 0.0, dense, dense)
    for method in methods:
        model = random_model(config, DEVICE)
        tokens_BT = torch.randint(config.vocab_size, CALIBRATION, generator=torch.Generator().manual_seed(0))
        made = Levels(model, method, tokens_BT)
        for level in levels:
            found = made.made(ratio_split(config, level, RATIO), level)
            made.use(found.choices)
            made.rows.start, made.rows.stop = 0, None
            # what thresholds keep of these tokens is not what they keep of the calibration's, on which they are fitted
            yield row(method, found.nominal if method in THRESHOLDED else level, step_ms(model, rows), dense)


@torch.inference_mode()
def step_ms(model: Rack, rows: int) -> float:
    """Milliseconds of a step of sequences with full caches."""
    config = model.config
    free()
    cache = KvCache(
        config, slots=rows, max_tokens=PAST + 1, dtype=torch.bfloat16, device=DEVICE, layout="interleaved",
        budget_bytes=2**30 + 8 * rows * (PAST + 1) * config.n_blocks * config.n_kv_heads * config.head_dim,
    )  # fmt: skip
    for slot in range(rows):
        assert cache.ensure(slot, PAST + 1)
        for tensor in (*cache.k, *cache.v):
            tensor[slot, :PAST].normal_()
    slots_R = torch.arange(rows, device=DEVICE)
    tokens_R, positions_R = slots_R + 1, torch.full_like(slots_R, PAST)

    def step() -> Tensor:
        attends = cache_attends(model, cache, Decodes(slots_R, positions_R), [])
        return likeliest(model(tokens_R[None], positions_T=positions_R, attends=attends)[0])

    found = milliseconds(step)
    cache.close()
    return found


def random(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=torch.bfloat16) * scale


def kept(size: int, share: float) -> int:
    """Entries that are left when a share is dropped."""
    return max(1, round((1 - share) * size))


def even(size: int, share: float) -> Groups:
    """Groups that all keep about as much."""
    counts = [kept(own, share) for own in group_sizes(size)]
    return groups_of(counts, DEVICE, torch.rand(size, device=DEVICE) + 0.5)


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of what is replayed as a CUDA graph; on a CPU, 0 after one run."""
    run()
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replays(graph.replay)


def replays(replay: Callable[[], None], count: int = 9) -> float:
    """The median time of a replay, in milliseconds: from one event to the next."""
    for _ in range(3):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events:
        event.record()
        replay()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def free() -> None:
    """Gives back what the model before has left."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
