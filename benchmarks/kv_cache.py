"""Memory of the key-value cache beside static preallocation, and what mapping pages costs the steps of a device.

    python benchmarks/kv_cache.py            1.37B parameters, 64 slots x 4096 tokens; steps are timed on a GPU only
    python benchmarks/kv_cache.py --smoke    tiny, with steps, also on a CPU: does it all work?

Memory: 64 running sequences, pages of 2 MiB, bf16, both layouts. Their lengths are drawn log-uniformly from 64 to 4096
(most are short), and uniformly. Counted is all that is mapped, the scratch slot and pages mapped ahead included; it is
arithmetic, the same on every machine. Static preallocation holds slots x 4096 tokens.

Steps: 64 sequences decode at once, by CUDA graph, from mixed lengths on. In one arm pages are mapped as the sequences
grow, in the other everything is mapped before; the arms take turns. A step is timed from the numbers of its tokens to
its logits, `ensure` and `map_ahead` of all slots included. The device's own count of its memory is read as well.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from common import write_results
from torch import Tensor

from raygrow.infer.attention import Decodes, cache_attends
from raygrow.infer.graphs import DecodeGraphs
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.kv_layout import Layout
from raygrow.infer.slots import MAPPED_AHEAD
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack

LARGE = ModelConfig(
    vocab_size=32_768, d_model=2048, n_heads=16, d_ff=5632, blocks_per_stack=24, max_seq_len=4096, mlp="swiglu"
)
SMOKE = replace(LARGE, vocab_size=64, d_model=64, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=64, blocks_per_stack=2)
SHORTEST = 64
PAGE = 2**21
WARMUP = 20
"""Steps that are not timed."""


@dataclass(kw_only=True)
class Arm:
    """Steps of one cache."""

    layout: Layout
    growing: bool
    """Whether pages are mapped as sequences grow."""
    seconds: list[float] = field(default_factory=list)
    maps: int = 0
    """Pages mapped during the timed steps."""
    mapped_bytes: int = 0
    device_bytes: int | None = None
    """What the device says that the cache takes."""
    bytes_after_reclaim: int | None = None

    def row(self) -> dict[str, Any]:
        """The figures."""
        return {
            "layout": self.layout,
            "pages": "mapped as sequences grow" if self.growing else "mapped before",
            "median_ms": 1e3 * statistics.median(self.seconds),
            "p99_ms": 1e3 * statistics.quantiles(self.seconds, n=100)[98],
            "maps": self.maps,
            "mapped_bytes": self.mapped_bytes,
            "device_bytes": self.device_bytes,
            "device_bytes_after_reclaim": self.bytes_after_reclaim,
        }


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600, help="timed steps of each arm's turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = SMOKE if arguments.smoke else LARGE
    rows = [
        memory(config, layout, draw, slots=arguments.slots) for draw in ("log-uniform", "uniform") for layout in LAYOUTS
    ]
    print_memory(rows)
    result: dict[str, Any] = {"config": asdict(config), "slots": arguments.slots, "page_bytes": PAGE, "memory": rows}
    if torch.cuda.is_available() or arguments.smoke:
        steps, turns = (40, 1) if arguments.smoke else (arguments.steps, arguments.turns)
        result["steps"] = step_times(config, slots=arguments.slots, steps=steps, turns=turns)
        print_steps(result["steps"])
    else:
        print("\nno CUDA device: steps are not timed")
    if not arguments.smoke:
        print(f"written to {write_results('kv_cache', result)}")


LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def draw_lengths(count: int, longest: int, how: str) -> list[int]:
    """Lengths of sequences."""
    draw = random.Random(0)
    if how == "uniform":
        return [draw.randint(SHORTEST, longest) for _ in range(count)]
    return [round(math.exp(draw.uniform(math.log(SHORTEST), math.log(longest)))) for _ in range(count)]


def memory(config: ModelConfig, layout: Layout, draw: str, *, slots: int) -> dict[str, Any]:
    """Bytes of busy slots, on the host: nothing is written, so nothing is taken from it."""
    longest = config.max_seq_len
    token_bytes = 2 * config.n_blocks * config.n_kv_heads * config.head_dim * torch.bfloat16.itemsize
    cache = KvCache(
        config,
        slots=slots,
        max_tokens=longest,
        dtype=torch.bfloat16,
        device="cpu",
        budget_bytes=2 * slots * longest * token_bytes + 2**30,
        layout=layout,
        page_bytes=PAGE,
    )
    floor = cache.usage.mapped_bytes
    lengths = draw_lengths(slots, longest, draw)
    for slot, length in enumerate(lengths):
        assert cache.ensure(slot, length)
        cache.map_ahead(slot, length + MAPPED_AHEAD)
    busy = cache.usage
    for slot in range(slots):
        cache.release(slot)
    cache.reclaim()
    static = slots * longest * token_bytes
    return {
        "lengths": draw,
        "mean_length": statistics.mean(lengths),
        "layout": layout,
        "token_bytes": sum(lengths) * token_bytes,
        "used_bytes": busy.used_bytes,
        "mapped_bytes": busy.mapped_bytes,
        "static_bytes": static,
        "times_less": static / busy.mapped_bytes,
        "maps": busy.maps,
        "floor_bytes": floor,
        "bytes_after_reclaim": cache.usage.mapped_bytes,
    }


@torch.inference_mode()
def step_times(config: ModelConfig, *, slots: int, steps: int, turns: int) -> list[dict[str, Any]]:
    """Times decoding of all slots, with pages mapped on the way and with all mapped before."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Rack(config).to(device, torch.bfloat16).eval()
    init_weights(model, config, seed=0)
    lengths = draw_lengths(slots, config.max_seq_len - WARMUP - steps, "log-uniform")
    arms = [Arm(layout=layout, growing=growing) for layout in LAYOUTS for growing in (True, False)]
    for turn in range(turns):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            run_arm(arm, model, lengths, steps, device)
    return [arm.row() for arm in arms]


def run_arm(arm: Arm, model: Rack, lengths: list[int], steps: int, device: torch.device) -> None:
    """One turn of an arm, with a cache of its own."""
    config, slots = model.config, len(lengths)
    outside = free_bytes(device)
    token_bytes = 2 * config.n_blocks * config.n_kv_heads * config.head_dim * torch.bfloat16.itemsize
    page = PAGE if device.type == "cuda" else 2**14
    strip = page * config.n_blocks
    cache = KvCache(
        config,
        slots=slots,
        max_tokens=config.max_seq_len,
        dtype=torch.bfloat16,
        device=device,
        budget_bytes=sum(lengths) * token_bytes + slots * (steps + WARMUP) * token_bytes + (slots + 4) * 3 * strip,
        layout=arm.layout,
        page_bytes=page,
    )
    for slot, length in enumerate(lengths):
        assert cache.ensure(slot, length if arm.growing else length + WARMUP + steps)
    kept_outside = free_bytes(device)
    forward = make_forward(model, cache, slots)
    graph_bytes = kept_outside - free_bytes(device)
    maps = 0
    for step in range(-WARMUP, steps):
        if step == 0:
            maps = cache.usage.maps
        synchronize(device)
        start = time.perf_counter()
        positions = [length + WARMUP + step for length in lengths]
        for slot, position in enumerate(positions):
            assert cache.ensure(slot, position + 1)
            cache.map_ahead(slot, position + 1 + MAPPED_AHEAD)
        forward([[1] * slots, positions, list(range(slots))]).cpu()
        if step >= 0:
            arm.seconds.append(time.perf_counter() - start)
    usage = cache.usage
    arm.maps, arm.mapped_bytes = usage.maps - maps, usage.mapped_bytes
    if device.type == "cuda":
        arm.device_bytes = outside - free_bytes(device) - graph_bytes
    for slot in range(slots):
        cache.release(slot)
    cache.reclaim()
    if device.type == "cuda":
        arm.bytes_after_reclaim = outside - free_bytes(device) - graph_bytes
    del forward
    cache.close()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_forward(model: Rack, cache: KvCache, rows: int) -> Callable[[list[list[int]]], Tensor]:
    """The likeliest tokens of a decoding step, given tokens, positions and slots of the rows."""
    if cache.k[0].is_cuda:
        graphs = DecodeGraphs(model, cache, rows)
        return lambda numbers: graphs.run(numbers)[1]

    def forward(numbers: list[list[int]]) -> Tensor:
        tokens_R, positions_R, slots_R = torch.tensor(numbers)
        attends = cache_attends(model, cache, Decodes(slots_R, positions_R), [])
        logits_BTV = model(tokens_R[None], positions_T=positions_R, attends=attends)
        assert isinstance(logits_BTV, Tensor)
        return logits_BTV[0].argmax(-1)

    return forward


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_bytes(device: torch.device) -> int:
    """What the device has left; 0 where that is not asked."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(device)[0]


def print_memory(rows: list[dict[str, Any]]) -> None:
    """The memory of busy slots as a table."""
    print(
        f"{'lengths':14}{'mean':>7}  {'layout':13}{'tokens GB':>10}{'mapped GB':>10}{'static GB':>10}{'times less':>11}"
    )
    for row in rows:
        sizes = "".join(f"{row[name] / 1e9:10.2f}" for name in ("token_bytes", "mapped_bytes", "static_bytes"))
        print(f"{row['lengths']:14}{row['mean_length']:7.0f}  {row['layout']:13}{sizes}{row['times_less']:11.2f}")
        assert row["bytes_after_reclaim"] == row["floor_bytes"]


def print_steps(rows: list[dict[str, Any]]) -> None:
    """The times of steps as a table, with the ratios that count."""
    print(f"\n{'layout':13}{'pages':26}{'median ms':>10}{'p99 ms':>9}{'maps':>8}{'mapped GB':>11}{'device GB':>11}")
    for row in rows:
        on_device = "" if row["device_bytes"] is None else f"{row['device_bytes'] / 1e9:11.2f}"
        times = f"{row['median_ms']:10.3f}{row['p99_ms']:9.3f}{row['maps']:8}{row['mapped_bytes'] / 1e9:11.3f}"
        print(f"{row['layout']:13}{row['pages']:26}{times}{on_device}")
    for growing, before in zip(rows[::2], rows[1::2], strict=True):
        print(f"{growing['layout']}: p99 with mapping is {growing['p99_ms'] / before['p99_ms']:.3f} of without")


if __name__ == "__main__":
    main()
