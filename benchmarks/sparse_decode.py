"""Decoding with sparse activations on one GPU, beside dense decoding at its best: kernels, and whole steps.

    python benchmarks/sparse_decode.py            7B Llama shapes, random weights, bf16, one H200, under 5 minutes
    python benchmarks/sparse_decode.py --smoke    tiny, also on a CPU (then by the torch twins): does it all work?

Kernels: each is launched once per Block, over that Block's own weights, in one CUDA graph, so that no weight is in the
cache; the time of a launch is that of the graph by the number of Blocks, gaps included. The floor is the bytes that
must be read by the measured rate of a large copy. Products are measured in several tilings; the best is used below.

Steps: from a token to the next (embedding, Blocks, head, argmax), with a cache of 512 tokens, replayed CUDA graphs on
both sides. Dense is the best of cuBLAS and our own kernels reading all rows. Sparsity p is split between inputs as
LaRoSA's code does: 0.8 p of what is rotated, 1.2 p of what is not. Adapters are dense and run beside the MLP.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from common import copy_bytes_per_second, write_results
from torch import Tensor

from raygrow.kernels.decode_attention import decode_attention
from raygrow.kernels.sparse_linear import (
    UNION_ROWS,
    Selection,
    masked,
    masked_linear,
    norm_masked,
    norm_select,
    scatter,
    select,
    sparse_linear,
)
from raygrow.nn.rope import rope_angles

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EPS, THETA = 1e-5, 10_000.0
KINDS = ("qkv", "o", "gate_up", "down", "adapter", "head")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama whose heads share no keys."""

    d_model: int = 4096
    n_heads: int = 32
    d_ff: int = 11008
    n_blocks: int = 32
    vocab: int = 32_000
    past: int = 512

    def matrix(self, kind: str) -> tuple[int, int]:
        """Input and output of a projection; `gate_up` is two side by side."""
        d, f = self.d_model, self.d_ff
        return {
            "qkv": (d, 3 * d),
            "o": (d, d),
            "gate_up": (d, 2 * f),
            "down": (f, d),
            "adapter": (d, d),
            "head": (d, self.vocab),
        }[kind]


SMOKE = Shape(d_model=64, n_heads=4, d_ff=160, n_blocks=2, vocab=96, past=8)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is computed."""

    name: str
    cublas: bool = False
    """Dense by torch's products; else by ours."""
    keep: dict[str, int] | None = None
    """Entries kept of each input; None is dense by our own kernels."""
    adapters: bool = False
    beside: bool = True
    """Whether adapters run on a stream of their own."""
    lists: bool = True
    """Whether one row is read by its list of indices, or by its zeros."""
    pdl: bool = True
    """Whether selections and products start while the kernel before them ends; attention does where it can."""
    hints: bool = True


class Model:
    """Weights, cache and the step. Ours are input-major, cuBLAS has its own, output-major."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self.shape = shape
        make = torch.Generator(DEVICE).manual_seed(0)
        dtype = torch.bfloat16 if CUDA else torch.float32

        def random(*size: int, scale: float) -> Tensor:
            return torch.randn(size, generator=make, device=DEVICE, dtype=dtype) * scale

        self.weights: dict[str, list[Tensor]] = {}
        for kind in KINDS:
            d_in, d_out = shape.matrix(kind)
            # what is added to the residual stream is kept small
            scale = d_in**-0.5 * (0.3 if kind in ("o", "down") else 1.0)
            count = 1 if kind == "head" else shape.n_blocks
            self.weights[kind] = [random(d_in, d_out, scale=scale) for _ in range(count)]
        self.transposed = {kind: [w.T.contiguous() for w in ws] for kind, ws in self.weights.items()}
        self.embedding = random(shape.vocab, shape.d_model, scale=1.0)
        self.side = torch.cuda.Stream() if CUDA else None
        self.tilings: dict[tuple[str, bool], Any] = {}
        self.select_warps: dict[int, int] = {}
        self.resize(rows)

    def resize(self, rows: int) -> None:
        """Makes room for so many rows."""
        s, dtype = self.shape, self.embedding.dtype
        cache = (s.n_blocks, rows, s.past + 1, s.n_heads, s.d_model // s.n_heads)
        self.k, self.v = (torch.randn(cache, device=DEVICE, dtype=dtype) for _ in range(2))
        self.slots, self.positions = torch.arange(rows, device=DEVICE), torch.full((rows,), s.past, device=DEVICE)
        self.rope = rope_angles(self.positions, head_dim=cache[-1], theta=THETA)
        self.hints = torch.zeros(s.n_blocks, 4, rows, device=DEVICE, dtype=torch.int32)
        self.tokens = torch.arange(rows, device=DEVICE)

    def choose(self, x: Tensor, way: Way, place: str, block: int, *, norm: bool) -> Selection | Tensor:
        """The input of a projection: a list of entries, or rows with zeros."""
        if way.keep is None and (not norm or not CUDA or way.cublas):
            return F.rms_norm(x, x.shape[1:], None, EPS) if norm else x
        keep = x.shape[1] if way.keep is None else way.keep[place]
        lists = way.lists and len(x) == 1 and way.keep is not None
        if not CUDA:
            if norm:
                return norm_select(x, keep, EPS) if lists else norm_masked(x, keep, EPS)
            return select(x, keep) if lists else masked(x, keep)
        from raygrow.kernels.triton_select import masked_triton, select_triton

        hints = self.hints[block, list(INPUTS).index(place)] if way.hints else None
        eps, warps = EPS if norm else None, self.select_warps.get(x.shape[1])
        if lists:
            return Selection(*select_triton(x, keep, eps=eps, hints_R=hints, warps=warps, pdl=way.pdl))
        return masked_triton(x, keep, eps=eps, hints_R=hints, warps=warps, pdl=way.pdl)

    def project(
        self, x: Selection | Tensor, kind: str, block: int, way: Way, addend: Tensor | None = None, *, pdl: bool = True
    ) -> Tensor:
        """A product, gated where it is gate and up, plus what is added."""
        weight, gated = self.weights[kind][block], kind == "gate_up"
        if isinstance(x, Tensor) and (way.cublas or len(x) > UNION_ROWS or (len(x) > 1 and way.keep is None)):
            y = F.linear(x, self.transposed[kind][block])
            if gated:
                gate, up = y.chunk(2, 1)
                return F.silu(gate) * up
            return y if addend is None else y + addend
        if not CUDA:
            product = sparse_linear if isinstance(x, Selection) else masked_linear
            return product(x, weight, addend_RF=addend, gated=gated)  # pyright: ignore[reportArgumentType]
        from raygrow.kernels.triton_sparse_linear import masked_linear_triton, sparse_linear_triton

        rest: dict[str, Any] = {"addend_RF": addend, "gated": gated, "pdl": way.pdl and pdl}
        sparse = way.keep is not None and kind not in ("adapter", "head")
        if isinstance(x, Tensor) and len(x) > 1:
            return masked_linear_triton(x, weight, **rest)
        index, value = x if isinstance(x, Selection) else (None, x)
        tiling = fit(self.tilings.get((kind, sparse)), value.shape[1], y_features(weight, gated))
        skip = sparse and index is None
        return sparse_linear_triton(index, value, weight, skip_zeros=skip, tiling=tiling, **rest)

    def attend(self, qkv: Tensor, block: int) -> Tensor:
        """Attention over the cache and the new token."""
        q, k, v = qkv.unflatten(1, (3, self.shape.n_heads, -1)).unbind(1)
        cache = self.k[block], self.v[block]
        return decode_attention(q, k, v, self.rope, *cache, self.slots, self.positions).flatten(1)

    def adapt(self, x: Tensor, block: int, way: Way) -> Tensor:
        """The residual stream in the next Block's basis."""
        dense = replace(way, keep=None)
        if self.side is None or not way.beside:
            return self.project(x, "adapter", block, dense)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            return self.project(x, "adapter", block, dense, pdl=False)

    @torch.inference_mode()
    def step(self, way: Way) -> Tensor:
        """Logits of the next tokens."""
        x = self.embedding[self.tokens]
        for block in range(self.shape.n_blocks):
            h = self.choose(x, way, "attention", block, norm=True)
            h = self.attend(self.project(h, "qkv", block, way), block)
            x = self.project(self.choose(h, way, "o", block, norm=False), "o", block, way, x)
            residual = self.adapt(x, block, way) if way.adapters and block + 1 < self.shape.n_blocks else x
            h = self.project(self.choose(x, way, "mlp", block, norm=True), "gate_up", block, way)
            h = self.choose(h, way, "down", block, norm=False)
            joined = residual is not x and way.beside and self.side is not None
            if joined and self.side is not None:
                torch.cuda.current_stream().wait_stream(self.side)
            x = self.project(h, "down", block, way, residual, pdl=not joined)
        dense = replace(way, keep=None)
        return self.project(self.choose(x, dense, "attention", 0, norm=True), "head", 0, dense)


INPUTS = {"attention": "qkv", "o": "o", "mlp": "gate_up", "down": "down"}
"""The inputs that are made sparse, and what reads them."""


def y_features(weight: Tensor, gated: bool) -> int:
    """Outputs of a product."""
    return weight.shape[1] // 2 if gated else weight.shape[1]


def keeps(shape: Shape, sparsity: float, split: tuple[float, float]) -> dict[str, int]:
    """Entries kept of each input: `split` says how much of the sparsity the rotated and the other inputs get."""
    shares = {"attention": split[0], "o": split[1], "mlp": split[0], "down": split[1]}
    return {
        name: max(round((1 - min(sparsity * shares[name], 0.99)) * shape.matrix(kind)[0]), 1)
        for name, kind in INPUTS.items()
    }


def step_bytes(shape: Shape, keep: dict[str, int] | None, *, adapters: bool) -> int:
    """Bytes of weights that a step of one row must read."""
    block = 0
    for name, kind in INPUTS.items():
        d_in, d_out = shape.matrix(kind)
        block += d_out * (d_in if keep is None else keep[name])
    total = shape.n_blocks * block + shape.d_model * shape.vocab
    if adapters:
        total += (shape.n_blocks - 1) * shape.d_model**2
    return 2 * total


def milliseconds(run: Callable[[], object], *, replays: int = 30) -> float:
    """The median time of a replayed CUDA graph; on a CPU, 0 after one run."""
    run()
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    # from one event to the next is one replay
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def fit(tiling: Any, keep: int, features: int) -> Any:
    """A tiling whose `parts` says programs per processor, for a product of this size; None stays None."""
    if tiling is None:
        return None
    from raygrow.kernels.triton_sparse_linear import spread

    return spread(tiling, keep, features, 1, per_processor=tiling.parts, device=DEVICE)


def try_tilings(model: Model, keep: dict[str, int], rate: float) -> list[dict[str, Any]]:
    """The best tiling of every product, of all rows and of some; left in the model. `parts` is per processor here."""
    from raygrow.kernels.triton_sparse_linear import Tiling, sparse_linear_triton

    cuts = [(128, 32, 4, 1), (256, 16, 4, 1), (256, 16, 4, 3), (256, 32, 8, 1), (512, 16, 8, 1), (128, 16, 4, 2)]
    rows = []
    for kind in KINDS:
        weights = model.weights[kind] if kind != "head" else model.weights[kind] * 4
        gated, place = kind == "gate_up", next((name for name, k in INPUTS.items() if k == kind), None)
        size = weights[0].shape[0]
        features = y_features(weights[0], gated)
        x = torch.randn(1, size, device=DEVICE, dtype=weights[0].dtype)
        for sparse in (False, True) if place else (False,):
            index, value = select(x, keep[place]) if sparse and place else (None, x)
            nbytes = value.shape[1] * weights[0].shape[1] * 2
            timed = []
            for columns, chunk, warps, stages in cuts:
                columns = columns // 2 if gated else columns
                for per in (2, 4, 6, 8) if stages == 1 else (2, 4, 6):
                    cut = Tiling(columns, chunk, per, warps, stages)
                    real = fit(cut, value.shape[1], features)

                    def run(real: Any = real) -> None:
                        for weight in weights:  # noqa: B023
                            sparse_linear_triton(index, value, weight, gated=gated, tiling=real)  # noqa: B023

                    timed.append((milliseconds(run, replays=6) / len(weights), cut, real))
            ms, cut, real = min(timed, key=lambda row: row[0])
            model.tilings[kind, sparse] = cut
            row = {"product": kind, "rows": value.shape[1], "of": size, "us": 1e3 * ms, "tiling": list(real)}
            row |= {"floor_us": 1e6 * nbytes / rate, "of_floor": nbytes / rate / ms * 1e3}
            if not sparse:

                def run_cublas() -> None:
                    for weight in model.transposed[kind] * (len(weights) // len(model.transposed[kind])):  # noqa: B023
                        F.linear(x, weight)  # noqa: B023

                row["cublas_us"] = 1e3 * milliseconds(run_cublas, replays=6) / len(weights)
            else:
                zeros = scatter(Selection(index, value), size)  # pyright: ignore[reportArgumentType]
                real = fit(cut, size, features)

                def run_masked() -> None:
                    for weight in weights:  # noqa: B023
                        sparse_linear_triton(
                            None, zeros, weight, gated=gated, skip_zeros=True, tiling=real  # noqa: B023
                        )  # fmt: skip

                row["by_zeros_us"] = 1e3 * milliseconds(run_masked, replays=6) / len(weights)
            row["all"] = [[*cut[:2], *cut[3:], cut.parts, round(1e3 * ms, 2)] for ms, cut, _ in sorted(timed)]
            rows.append(row)
            beside = f"cuBLAS {row['cublas_us']:6.1f}" if "cublas_us" in row else f"zeros {row['by_zeros_us']:7.1f}"
            print(
                f"  {kind:8}{value.shape[1]:6} of {size:6}{row['us']:8.1f} us, floor {row['floor_us']:6.1f}, "
                f"{100 * row['of_floor']:4.0f} % of it, {beside}  {tuple(real)}",
                flush=True,
            )
            for i in (1, 2, 3, len(timed) - 1):
                print(
                    f"{'':24}{row['all'][i][-1]:8.1f} us  columns, chunk, warps, stages, per SM: {row['all'][i][:-1]}"
                )
    return rows


def time_selections(model: Model) -> list[dict[str, Any]]:
    """Selections with and without a norm, a hint and an early start; the best number of warps is left in the model."""
    from raygrow.kernels.triton_select import select_triton

    rows, blocks = [], model.shape.n_blocks
    for size, norm in ((model.shape.d_model, True), (model.shape.d_model, False), (model.shape.d_ff, False)):
        x = torch.randn(blocks, 1, size, device=DEVICE, dtype=model.embedding.dtype)
        timed = []
        for warps, hinted in itertools.product((4, 8, 16, 32), (False, True)):
            hints = torch.zeros(blocks, 1, dtype=torch.int32, device=DEVICE) if hinted else None

            def run(
                pdl: bool | None = None,
                warps: int = warps,
                hints: Tensor | None = hints,
                x: Tensor = x,
                eps: float | None = EPS if norm else None,
            ) -> None:
                for block in range(blocks):
                    hints_R = None if hints is None else hints[block]
                    select_triton(x[block], int(0.6 * x.shape[-1]), eps=eps, warps=warps, hints_R=hints_R, pdl=pdl)

            if warps * 32 * 64 < size:
                continue  # too much for the registers
            timed.append((1e3 * milliseconds(run) / blocks, warps, hinted, run))
        best = min(timed, key=lambda row: row[0])
        model.select_warps[size] = best[1]
        alone = 1e3 * milliseconds(lambda run=best[3]: run(False)) / blocks
        rows.append({"size": size, "norm": norm, "us": best[0], "warps": best[1], "hint": best[2], "no_pdl_us": alone})
        rows[-1]["all"] = [[w, h, round(us, 2)] for us, w, h, _ in timed]
        print(
            f"  select{' after a norm' if norm else '':13}{size:6}: {best[0]:.2f} us, {alone:.2f} without early starts"
        )
        print(f"{'':24}warps, hint, us: {rows[-1]['all']}", flush=True)
    return rows


def check(model: Model) -> dict[str, float]:
    """How far the ways are from each other where they must agree, as a share of the logits' norm."""
    shape = model.shape
    every = {name: shape.matrix(kind)[0] for name, kind in INPUTS.items()}
    some = keeps(shape, 0.4, (0.8, 1.2))
    true = model.step(Way(name="cublas", cublas=True)).float()
    sparse = model.step(Way(name="lists", keep=some)).float()

    def away(way: Way, from_: Tensor) -> float:
        return ((model.step(way).float() - from_).norm() / from_.norm()).item()

    found = {
        "our dense": away(Way(name="own"), true),
        "all rows by lists": away(Way(name="all", keep=every), true),
        "zeros instead of lists": away(Way(name="zeros", keep=some, lists=False), sparse),
        "without early starts": away(Way(name="no pdl", keep=some, pdl=False), sparse),
        "without hints": away(Way(name="no hints", keep=some, hints=False), sparse),
        "once more": away(Way(name="lists", keep=some), sparse),
    }
    print("relative differences of logits:", {name: f"{value:.1e}" for name, value in found.items()}, flush=True)
    return found


def breakdown(model: Model, way: Way) -> dict[str, float]:
    """Microseconds of a step by kernel, from the profiler; without early starts, whose waiting would count twice."""
    way = replace(way, pdl=False, beside=False)
    run_us: dict[str, float] = {}
    model.step(way)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.step(way)
        torch.cuda.synchronize()
    for event in sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:10]:
        run_us[f"{event.key[:60]} x {event.count}"] = round(event.device_time_total, 1)
        print(f"  {event.device_time_total:9.1f} us  {event.count:4} x  {event.key[:80]}")
    return run_us


def time_steps(
    model: Model, levels: list[float], split: tuple[float, float], rate: float, rows: int
) -> list[dict[str, Any]]:
    """Steps of so many rows, dense and at every level."""
    shape = model.shape
    ways = [Way(name="dense, cuBLAS", cublas=True)]
    if rows == 1:
        ways += [Way(name="dense, ours"), Way(name="dense, ours, no early starts", pdl=False)]
    for level in levels:
        keep = keeps(shape, level, split)
        ways.append(Way(name=f"sparse {level:.0%}", keep=keep))
        ways.append(Way(name=f"sparse {level:.0%}, adapters", keep=keep, adapters=True))
    if rows == 1:
        keep = keeps(shape, 0.4, split)
        sparse = Way(name="", keep=keep)
        ways += [
            replace(sparse, name="sparse 40%, adapters in line", adapters=True, beside=False),
            replace(sparse, name="sparse 40%, by zeros", lists=False),
            replace(sparse, name="sparse 40%, no hints", hints=False),
            replace(sparse, name="sparse 40%, no early starts", pdl=False),
            replace(sparse, name="sparse 40%, even split", keep=keeps(shape, 0.4, (1.0, 1.0))),
        ]
    found, dense_bytes = [], step_bytes(shape, None, adapters=False)
    for way in ways:
        ms = milliseconds(lambda way=way: model.step(way).argmax(-1))
        nbytes = step_bytes(shape, way.keep, adapters=way.adapters)
        row = {"rows": rows, "way": way.name, "ms": ms, "keep": way.keep, "adapters": way.adapters}
        row["skipped"] = 1 - nbytes / dense_bytes
        if rows == 1:
            row["floor_ms"] = 1e3 * nbytes / rate
        found.append(row)
    dense = min(row["ms"] for row in found if row["way"].startswith("dense"))
    for row in found:
        row["speedup"] = dense / row["ms"] if row["ms"] else None
    return found


def print_steps(rows: list[dict[str, Any]]) -> None:
    """The table of steps."""
    print(f"\n{'rows':>4}  {'way':34}{'ms':>8}{'floor ms':>10}{'of floor':>10}{'not read':>10}{'speedup':>9}")
    for row in rows:
        floor = row.get("floor_ms")
        share = f"{floor:10.3f}{floor / row['ms']:10.1%}" if floor and row["ms"] else " " * 20
        print(
            f"{row['rows']:4}  {row['way']:34}{row['ms']:8.3f}{share}{row['skipped']:10.1%}{row['speedup'] or 0:9.3f}"
        )


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.4, 0.5, 0.75])
    parser.add_argument("--split", type=float, nargs=2, default=(0.8, 1.2), help="of rotated inputs, of the others")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    shape, split = (SMOKE if arguments.smoke else Shape()), tuple(arguments.split)
    model = Model(shape, 1)
    result: dict[str, Any] = {"shape": vars(shape), "split": split}
    rate = float("inf")
    if CUDA:
        rate = result["copy_bytes_per_second"] = copy_bytes_per_second(DEVICE)
        print(
            f"a large copy: {rate / 1e12:.2f} TB/s; a dense step reads {step_bytes(shape, None, adapters=False)} bytes"
        )
        result["selections"] = time_selections(model)
        result["products"] = try_tilings(model, keeps(shape, 0.4, split), rate)
    result["differences"] = check(model)
    result["kernels_us"] = {}
    for way in (
        Way(name="dense, ours"),
        Way(name="sparse 40%, adapters", keep=keeps(shape, 0.4, split), adapters=True),
    ):
        if CUDA:
            print(f"kernels of a step, {way.name}:")
            result["kernels_us"][way.name] = breakdown(model, way)
    result["steps"] = []
    for rows in (1, 2, 4, 8):
        model.resize(rows)
        levels = arguments.levels if rows == 1 else [level for level in arguments.levels if level >= 0.4]
        result["steps"] += time_steps(model, levels, split, rate, rows)
    if not arguments.smoke:
        print(f"written to {write_results('sparse_decode', result)}")
    print_steps(result["steps"])


if __name__ == "__main__":
    main()
