"""Sparsity that is trained in, beside sparsity that is chosen afterwards: what each costs, and what each gives.

    python benchmarks/trained_sparsity.py train        the arms, 100M tokens' worth of FLOPs each; one GPU, 15 minutes
    python benchmarks/trained_sparsity.py speed        decoding with 7B shapes, as sparse as the arms; 5 minutes
    python benchmarks/trained_sparsity.py train speed --smoke      tiny, also on a CPU: does it all work?

Arms: one growth plan (a quarter of 12 blocks of d 512, stacked four times), on Python source, with equal FLOPs. One arm
has SwiGLU and is made sparse afterwards, by the method that is shipped and by LaRoSA's. The others have a rectified
MLP, and the phase after growth weighs its activations (`activation_l1`): what is zero is left out, which changes
nothing. `relu2` has no gate, and half as many hidden units again: as many parameters.

Told: perplexity on validation text; the share of the Blocks' weights that a token skips, the perplexity when it does;
active hidden units, Block by Block; units that any of 1, 2, 4 or 8 tokens of different texts uses.

Speed: whole steps of the engine, sequences decoding together. A trained model of 7B is not at hand: weights are random,
and every unit's bias makes it as rare as a unit of the trained arm, at the same relative depth; what was really active
is told. SwiGLU has its inputs split as `engine_throughput.py` does.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import write_results
from engine_throughput import make_sparse
from growth_search import Bench
from torch import Tensor
from workload import LARGE, SEVEN, SMOKE, draw_work, engine_config, random_model, run_engine

from raygrow.data.sampler import fixed_batch
from raygrow.data.shards import open_tokens
from raygrow.evaluate.sparsify import sparsify_model
from raygrow.infer.engine import Engine
from raygrow.nn.config import ModelConfig
from raygrow.nn.device import choose_device
from raygrow.nn.joined import join
from raygrow.nn.rack import Rack
from raygrow.sparsity.config import SparsifyConfig
from raygrow.sparsity.zeros import skip_zeros
from raygrow.text.tokenizer import load_tokenizer
from raygrow.weights.folder import load_model

BATCHES = 1, 2, 4, 8
LEVELS = 0.25, 0.4, 0.5
SPEED_LEVEL = 0.4
D_FF, SMOKE_D_FF = 1408, 64
RARE = 1e-4
"""Units that were used less often count as used so often."""
SHAPES = {"6.7B": SEVEN, "1.37B": LARGE, "smoke": SMOKE}


def arms(kinds: list[str], weights: list[float], *, d_ff: int) -> dict[str, list[str]]:
    """What each arm adds to the command, by its name."""
    found = {"swiglu": ["model.mlp=swiglu"]}
    for kind, weight in itertools.product(kinds, weights):
        size = d_ff * 3 // 2 if kind in ("relu", "relu2") else d_ff
        words = [f"model.mlp={kind}", f"model.d_ff={size}", f"plan.phases.stacked.activation_l1={weight}"]
        found[f"{kind}_{weight:g}"] = words
    return found


def train(bench: Bench, chosen: dict[str, list[str]], tokens: float) -> dict[str, Path]:
    """The final model of every arm, trained where that has not been done."""
    bench.prepare()
    folders = {}
    for name, words in chosen.items():
        folders[name] = bench.folder / name / "models/final"
        if not folders[name].exists():
            plan = ["plan=gstack", f"plan.tokens={tokens}", "plan.phases.stacked.save_end=final"]
            bench.train(name, *plan, *words)
    return folders


def sparse_rows(folder: Path, data: Path, methods: Mapping[str, tuple[float, ...] | None], options: dict) -> list[dict]:
    """What a model costs made sparse by some methods, the dense one first."""
    rows: list[dict[str, Any]] = []
    for method, levels in methods.items():
        with tempfile.TemporaryDirectory() as aside:
            config = SparsifyConfig(method=method, sparsity=levels, **options)  # pyright: ignore[reportArgumentType]
            found = sparsify_model(folder, Path(aside) / "sparse", data, config).rows
        rows += [
            {
                "method": method,
                "sparsity": row.sparsity,
                "skipped": row.skipped,
                "dense_perplexity": math.exp(found[0].losses["all"]),
                **{f"rise_{policy}": row.rise(found[0], policy) for policy in ("all", "decode")},
            }
            for row in found[1:]
        ]
    return rows


@torch.inference_mode()
def used_units(model: Rack, tokens_BT: Tensor) -> list[Tensor]:
    """Which hidden units each token uses, `(B, T, F)` of every Block, on the CPU."""
    found: list[Tensor] = []
    blocks: Any = model.blocks
    hooks = [
        block.mlp.down.register_forward_pre_hook(lambda module, inputs: found.append((inputs[0] != 0).cpu()))
        for block in blocks
    ]
    model(tokens_BT, rows=torch.zeros(1, dtype=torch.int64, device=tokens_BT.device))
    for hook in hooks:
        hook.remove()
    return found


def activity(model: Rack, batch_BT: Tensor) -> dict[str, Any]:
    """How often units are used: of each Block, by some texts together, and by each text's share of tokens."""
    used = used_units(model, batch_BT)
    together = {
        count: statistics.mean(block[:count].any(0).float().mean().item() for block in used) for count in BATCHES
    }
    return {
        "active_by_block": [block.float().mean().item() for block in used],
        "used_together": together,
        # the distribution over units is all that speed depends on: a few quantiles hold it
        "frequencies": [block.float().mean((0, 1)).quantile(torch.linspace(0, 1, 101)).tolist() for block in used],
    }


def as_rare(model: Rack, frequencies: list[list[float]]) -> Rack:
    """Gives a random model biases that make units as rare as those of a trained one at the same relative depth."""
    config, make = model.config, torch.Generator().manual_seed(0)
    spread = config.init_std * config.d_model**0.5  # of a random projection of what a norm gives
    block: Any
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            quantiles = torch.tensor(frequencies[index * len(frequencies) // config.n_blocks]).clamp(RARE, 1 - RARE)
            place = torch.rand(block.mlp.down.in_features, generator=make) * (len(quantiles) - 1)
            low = place.long().clamp(max=len(quantiles) - 2)
            share = quantiles[low].lerp(quantiles[low + 1], place - low)
            opens = block.mlp.gate if config.gated else block.mlp.up
            for projection in (block.mlp.up, block.mlp.down, opens):
                projection.bias.zero_()
            opens.bias.copy_(spread * torch.special.ndtri(share))
    return model


def speeds(model: Rack, tokenizer: Any, device: torch.device, *, rows: Any = None, smoke: bool) -> dict[int, float]:
    """Milliseconds of a step, by how many sequences decode together. On CUDA its Blocks are joined for good."""
    if device.type == "cuda":
        join(model)  # as `load_engine` does
    prompt, new = (16, 8) if smoke else (128, 128)
    engine = Engine(model, tokenizer, engine_config(device, seqs=max(BATCHES), max_len=prompt + new), rows=rows)
    found = {}
    for count in BATCHES:
        seconds: list[float] = []
        for seed in range(2):  # the first only warms up
            work = draw_work(count, seed=100 * count + seed, lengths=(prompt, prompt), vocab_size=300)
            seconds = run_engine(engine, [one._replace(new=new) for one in work])
        # prompts come first, and take a step or more
        found[count] = 1e3 * statistics.median(seconds[len(seconds) // 4 :])
    engine.close()
    return found


def measure_speed(arms: dict[str, Any], shape: str, tokenizer: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of every arm, dense and sparse."""
    config, smoke = SHAPES[shape], shape == "smoke"
    for name, arm in arms.items():
        for make in (dense_model, sparse_model):
            model, rows, told = make(name.split("_")[0], config, arm["activity"], device)
            found = speeds(model, tokenizer, device, rows=rows, smoke=smoke)
            yield {"arm": name, "sparse": make is sparse_model, **told, "ms": found}
            del model, rows
            gc.collect()
            torch.cuda.empty_cache()


def dense_model(kind: str, config: ModelConfig, trained: Any, device: torch.device) -> tuple[Rack, None, dict]:
    """A random model of an arm's kind, whose units are as rare as those of the trained one."""
    if kind == "swiglu":
        return random_model(config, device), None, {}
    return as_rare(random_model(rectified(config, kind), device), trained["frequencies"]), None, {}


def sparse_model(kind: str, config: ModelConfig, trained: Any, device: torch.device) -> tuple[Rack, Any, dict]:
    """The same model, sparse; what its engine has to know of rows, and what is really left out."""
    model = dense_model(kind, config, trained, device)[0]
    if kind == "swiglu":
        rows, skipped = make_sparse(model, "rotated_teal", SPEED_LEVEL)
        return model, rows, {"skipped": skipped}
    prompts = torch.randint(0, 300, (max(BATCHES), 32), generator=torch.Generator().manual_seed(1))
    really = activity(model, prompts.to(device))
    del really["frequencies"]
    return skip_zeros(model), None, {"activity": really}


def rectified(config: ModelConfig, kind: str) -> ModelConfig:
    """The shape with as many parameters and biases, of which the up and down ones stay 0."""
    size = config.d_ff if kind == "reglu" else config.d_ff * 3 // 2
    return replace(config, mlp=kind, d_ff=size, mlp_bias=True)


def quality_table(found: dict[str, Any]) -> str:
    """A line for every way to be sparse."""
    lines = [f"{'arm':16}{'perplexity':>11}  {'method':14}{'skipped':>9}{'rise, all':>11}{'decoding':>10}  units used"]
    for name, arm in found.items():
        for row in arm["rows"]:
            together = arm["activity"]["used_together"].items() if arm["activity"] else ()
            lines.append(
                f"{name:16}{row['dense_perplexity']:>11.4f}  {row['method']:14}{row['skipped']:>9.1%}"
                f"{row['rise_all']:>11.2%}{row['rise_decode']:>10.2%}  "
                + ", ".join(f"{count}: {share:.1%}" for count, share in together)
            )
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Steps in ms, and how many times as fast as the SwiGLU model's dense ones."""
    lines = [f"{'arm':16}{'ms':8}" + "".join(f"{f'batch {count}':>18}" for count in BATCHES)]
    for row in rows:
        cells = [f"{row['ms'][b]:.3f} ({rows[0]['ms'][b] / row['ms'][b]:.2f}x)" for b in BATCHES]
        lines.append(f"{row['arm']:16}{'sparse' if row['sparse'] else 'dense':8}" + "".join(f"{c:>18}" for c in cells))
    return "\n".join(lines)


def main() -> None:
    """Runs the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("train", "speed"))
    parser.add_argument("--kinds", nargs="+", choices=("reglu", "relu", "relu2"), default=["reglu", "relu2"])
    parser.add_argument("--l1", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="weights of activations")
    parser.add_argument("--tokens", type=float, default=100e6, help="of the final model, whose FLOPs each arm has")
    parser.add_argument("--shape", choices=SHAPES, help="of `speed`; 1.37B on a CPU, else 6.7B")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "trained_sparsity")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device, smoke = choose_device(), options.smoke
    bench = Bench(options.folder, smoke=smoke, per_gpu=1)
    chosen = arms(options.kinds, [0.0, 5.0] if smoke else options.l1, d_ff=SMOKE_D_FF if smoke else D_FF)
    kept = bench.folder / "arms.json"
    if "train" not in options.stages and not kept.exists():
        parser.error(f"speed takes what `train` has left in {bench.folder}, where there is nothing: run that too")
    if "train" in options.stages:
        folders = train(bench, chosen, 30e3 if smoke else options.tokens)
        sizes: dict[str, Any] = {"sequences": 4, "evaluate_sequences": 8} if smoke else {"evaluate_sequences": 256}
        texts_BT = fixed_batch(open_tokens(bench.data, "validation"), max(BATCHES), 64 if smoke else 512)[0]
        found: dict[str, Any] = {}
        for name, folder in folders.items():
            is_rectified = name != "swiglu"
            methods = {"relu": None} if is_rectified else {"rotated_teal": LEVELS, "larosa": LEVELS}
            split = {"split": "ratio"} if smoke and not is_rectified else {}
            rows = sparse_rows(folder, bench.data, methods, sizes | split)
            model = load_model(folder, device=device).eval() if is_rectified else None
            found[name] = {"rows": rows, "activity": model and activity(model, texts_BT.to(device))}
        kept.write_text(json.dumps(found))
        print(quality_table(found))
        if not smoke:
            content = {"tokens": options.tokens, "arms": found, "commands": bench.commands}
            print(write_results("trained_sparsity_quality", content))
    if "speed" in options.stages:
        shape = options.shape or ("smoke" if smoke else "6.7B" if device.type == "cuda" else "1.37B")
        known = {name: arm for name, arm in json.loads(kept.read_text()).items() if name in chosen}
        tokenizer = load_tokenizer(bench.folder / "swiglu/models/final")
        rows = []
        for row in measure_speed(known, shape, tokenizer, device):
            rows.append(row)
            told = ", ".join(f"{count}: {ms:.3f}" for count, ms in row["ms"].items())
            print(f"{row['arm']}, {'sparse' if row['sparse'] else 'dense'}, ms: {told}", flush=True)
        print(speed_table(rows))
        if not smoke:
            print(write_results("trained_sparsity_speed", {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
