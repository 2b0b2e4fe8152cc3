"""Sparse activations on a CPU: single projections, and decoding with a Llama of 1B parameters, random weights.

    python benchmarks/sparse_cpu.py --threads 1
    python benchmarks/sparse_cpu.py --threads 1 --dtype float32

Projections are of shapes of a 1B model, over so many different weights that none stays in the cache. Decoding has 16
Blocks of d 2048, 8192 hidden, 32 heads that share 8 keys, and a cache of 128 tokens, which is attended to on both
sides. Dense is the better of torch's `linear` and our own kernel reading all rows; sparse is our kernel: over the
largest entries, finding them included, and a token also over what exceeds a threshold. Rounds alternate, so that what
else the machine does hits all alike; medians are told. Memory: about 4.5 GB in bf16, 9 GB in fp32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import write_results
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.sparse_linear import norm_select, select, sparse_linear
from raygrow.kernels.threshold_linear import threshold_linear

D, HIDDEN, HEADS, KV_HEADS, BLOCKS, VOCAB, PAST = 2048, 8192, 32, 8, 16, 32_000, 128
SHAPES = [(2048, 2048), (2048, 5504), (5504, 2048), (2048, 16384), (8192, 2048)]
EPS = 1e-5


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def projections(dtype: torch.dtype, keeps: list[float], rounds: int) -> list[dict[str, Any]]:
    """Times of single projections, selection included."""
    rows = []
    for d_in, d_out in SHAPES:
        count = max(200_000_000 // (d_in * d_out * dtype.itemsize), 2)
        ours = [torch.randn(d_in, d_out).to(dtype) for _ in range(count)]
        theirs = [weight.T.contiguous() for weight in ours]
        x = torch.randn(1, d_in).to(dtype)

        def dense(theirs: list[Tensor] = theirs, x: Tensor = x) -> None:
            for weight in theirs:
                F.linear(x, weight)

        def sparse(keep: int, ours: list[Tensor] = ours, x: Tensor = x) -> None:
            for weight in ours:
                sparse_linear(select(x, keep), weight)

        ways: dict[str, Callable[[], object]] = {"linear": dense}
        ways |= {f"{keep:.0%}": partial(sparse, round(keep * d_in)) for keep in keeps}
        found = {name: ms / count for name, ms in medians(ways, rounds).items()}
        rows.append({"shape": [d_in, d_out], "ms": found})
        cells = "".join(f"{found['linear'] / found[name]:8.2f}" for name in list(ways)[1:])
        print(f"{d_in:6} x {d_out:6} linear {found['linear']:7.3f} ms; times faster, keeping:{cells}", flush=True)
    return rows


class Llama:
    """Weights in both orders, a cache, and a step, dense or sparse."""

    def __init__(self, dtype: torch.dtype) -> None:
        head = D // HEADS
        sizes = {
            "qkv": (D, D + 2 * KV_HEADS * head),
            "o": (D, D),
            "gate_up": (D, 2 * HIDDEN),
            "down": (HIDDEN, D),
        }
        self.ours, self.theirs = [], []
        for _ in range(BLOCKS):
            block = {name: torch.randn(size).mul_(0.3 * size[0] ** -0.5).to(dtype) for name, size in sizes.items()}
            self.ours.append(block)
            self.theirs.append({name: weight.T.contiguous() for name, weight in block.items()})
        self.head = torch.randn(VOCAB, D).mul_(D**-0.5).to(dtype)
        self.embedding = torch.randn(VOCAB, D).to(dtype)
        self.thresholds: dict[tuple[float, int, str], float] = {}
        self.k, self.v = torch.randn(2, BLOCKS, KV_HEADS, PAST + 1, head).to(dtype)

    def attend(self, qkv: Tensor, block: int) -> Tensor:
        """Over the cache and the new token; rotary positions are left out on both sides."""
        q, k, v = qkv.view(-1, D // HEADS).split([HEADS, KV_HEADS, KV_HEADS])
        self.k[block, :, PAST], self.v[block, :, PAST] = k, v
        q = q.view(1, KV_HEADS, HEADS // KV_HEADS, -1)
        return F.scaled_dot_product_attention(q, self.k[block, None], self.v[block, None]).view(1, D)

    @torch.inference_mode()
    def dense(self) -> Tensor:
        """By torch's `linear`."""
        x = self.embedding[:1]
        for block, weights in enumerate(self.theirs):
            h = self.attend(F.linear(F.rms_norm(x, (D,), None, EPS), weights["qkv"]), block)
            x = x + F.linear(h, weights["o"])
            gate, up = F.linear(F.rms_norm(x, (D,), None, EPS), weights["gate_up"]).chunk(2, 1)
            x = x + F.linear(F.silu(gate) * up, weights["down"])
        return F.linear(F.rms_norm(x, (D,), None, EPS), self.head)

    @torch.inference_mode()
    def largest(self, keep: float) -> Tensor:
        """By our kernel, the same share of every input."""
        x = self.embedding[:1]
        d, hidden = round(keep * D), round(keep * HIDDEN)
        for block, weights in enumerate(self.ours):
            h = self.attend(sparse_linear(norm_select(x, d, EPS), weights["qkv"]), block)
            x = sparse_linear(select(h, d), weights["o"], addend_RF=x)
            h = sparse_linear(norm_select(x, d, EPS), weights["gate_up"], gated=True)
            x = sparse_linear(select(h, hidden), weights["down"], addend_RF=x)
        return F.linear(F.rms_norm(x, (D,), None, EPS), self.head)

    @torch.inference_mode()
    def above(self, keep: float) -> Tensor:
        """By our kernel, as much of every input as exceeds its threshold."""
        x = self.embedding[:1]
        for block in range(BLOCKS):
            product = partial(self._above, keep, block)
            h = self.attend(product("qkv", x, Around(eps=EPS)), block)
            x = product("o", h, Around(addend_RF=x))
            h = product("gate_up", x, Around(eps=EPS, gated=True))
            x = product("down", h, Around(addend_RF=x))
        return F.linear(F.rms_norm(x, (D,), None, EPS), self.head)

    def _above(self, keep: float, block: int, name: str, x: Tensor, around: Around) -> Tensor:
        place = keep, block, name
        if place not in self.thresholds:  # the first time: afterwards all is as it was then
            scores = (F.rms_norm(x, x.shape[1:], None, EPS) if around.eps else x).abs().float()
            least = scores.flatten().sort(descending=True).values[round(keep * x.shape[1]) - 1].item()
            self.thresholds[place] = least * (1 - 1e-6)
        return threshold_linear(x, self.ours[block][name], self.thresholds[place], None, around)


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    keeps = [1.0, 0.75, 0.5, 0.25]
    print(f"{arguments.dtype}, {arguments.threads} threads; keeping {keeps}")
    rows = projections(dtype, keeps, arguments.rounds)
    model = Llama(dtype)
    difference = (model.largest(1.0).float() - model.dense().float()).norm() / model.dense().float().norm()
    print(f"all entries kept: {difference:.1e} from dense")
    ways: dict[str, Callable[[], object]] = {"dense, linear": model.dense}
    ways |= {f"sparsity {1 - keep:.0%}, largest": partial(model.largest, keep) for keep in keeps}
    ways |= {f"sparsity {1 - keep:.0%}, above": partial(model.above, keep) for keep in keeps[1:]}
    found = medians(ways, arguments.rounds)
    dense = min(found["dense, linear"], found["sparsity 0%, largest"])
    for name, ms in found.items():
        print(f"{name:22}{ms:8.1f} ms a token, {dense / ms:5.2f} times dense at its best")
    name = f"sparse_cpu_{arguments.dtype}"
    content = {"dtype": arguments.dtype, "threads": arguments.threads, "projections": rows, "step_ms": found}
    print(f"written to {write_results(name, content | {'difference': difference.item(), 'dense_ms': dense})}")


if __name__ == "__main__":
    main()
