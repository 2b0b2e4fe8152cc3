"""What activation sparsity costs a model: rises of perplexity by method, at equal weights skipped.

    python benchmarks/sparsity_quality.py --model FOLDER --data FOLDER [FOLDER ...]    one GPU, minutes for 135M
    python benchmarks/sparsity_quality.py --smoke                                      tiny, also on a CPU

Each arm is calibrated on the train split of a corpus and measured on its validation split. At each level all arms skip
the same share of the bytes that the dense model's Blocks read: adapters count as read, so an arm with adapters has to
drop more. What thresholds really skip on the validation text is told beside. Two policies: every token sparse, and
decoding alone (the first half of each sequence is a dense prompt, the second half is sparse and counts).

Splits: `uniform` drops the same share of every input; `ratio` one share of what comes from the residual stream and
another of the rest; `search` what costs least, input by input (`raygrow/sparsity/allocate.py`).
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import write_results
from torch import Tensor

from raygrow.data.sampler import fixed_batch
from raygrow.data.shards import Manifest, ShardWriter, SplitInfo, open_tokens
from raygrow.nn.config import ModelConfig
from raygrow.nn.device import choose_device
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.sparsity.absorb import absorb_rules, absorbed_config
from raygrow.sparsity.allocate import SplitName
from raygrow.sparsity.calibrate import Moments, calibrate
from raygrow.sparsity.inputs import adapter_share, block_weights, input_weights
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import THRESHOLDED, Method, Rotation
from raygrow.sparsity.policy import POLICIES, Policy, policy_loss
from raygrow.sparsity.rotation import block_bases, global_basis
from raygrow.weights.apply import Derived
from raygrow.weights.folder import load_model, open_folder, write_folder
from raygrow.weights.shapes import meta_rack

LEVELS = (0.25, 0.4, 0.5)
SEARCH_SEQUENCES = 4


@dataclass(frozen=True)
class Arm:
    """A way to make the model sparse."""

    method: Method
    rotation: Rotation
    split: SplitName

    @property
    def name(self) -> str:
        return f"{self.method}, {self.rotation}, {self.split}"


ARMS = (
    Arm("teal", "none", "uniform"),
    Arm("teal", "none", "search"),
    Arm("topk", "none", "uniform"),
    Arm("topk", "none", "search"),
    Arm("wina", "none", "uniform"),
    Arm("wina", "none", "search"),
    Arm("larosa", "block", "ratio"),
    Arm("larosa", "block", "search"),
    Arm("larosa", "global", "ratio"),
    Arm("larosa", "global", "search"),
    Arm("rotated_wina", "block", "search"),
    Arm("rotated_wina", "global", "search"),
    Arm("rotated_teal", "block", "search"),
    Arm("rotated_teal", "global", "search"),
    Arm("grouped", "none", "search"),
    Arm("grouped", "global", "search"),
)


@dataclass(frozen=True)
class Corpus:
    """Texts, and what the dense model makes of the first."""

    calibration_BT: Tensor
    validation: tuple[Tensor, Tensor]
    moments: list[Moments]
    dense: Mapping[Policy, float]
    """Nats per token of the model as it came, by policy."""


def turned(model: Rack, rotation: Rotation, corpus: Corpus) -> Rack:
    """A model of its own, in the bases that the corpus gives."""
    device = model.embedding.weight.device
    config, tensors = model.config, {name: parameter.detach() for name, parameter in model.named_parameters()}
    if rotation == "none":
        made, found = meta_rack(config), {name: tensor.clone() for name, tensor in tensors.items()}
    else:
        moments = corpus.moments
        bases = block_bases(moments, device) if rotation == "block" else global_basis(moments, config, device)
        made = meta_rack(absorbed_config(config, rotation))
        found = dict(Derived(absorb_rules(config, bases, rotation, device), tensors))
    made.load_state_dict(found, assign=True)
    return made.eval()


def measure(model: Rack, arm: Arm, corpus: Corpus, targets: tuple[float, ...], batch_size: int) -> Iterator[dict]:
    """A row for every level of one arm."""
    start = time.perf_counter()
    sparse = turned(model, arm.rotation, corpus)
    levels = Levels(sparse, arm.method, corpus.calibration_BT, searched=SEARCH_SEQUENCES, batch_size=batch_size)
    for target in targets:
        level = levels.level(target + adapter_share(sparse.config), arm.split)
        row: dict[str, Any] = {"arm": arm.name, "target": target, "nominal": level.nominal, "skipped": level.skipped}
        for policy in POLICIES:
            for selector in levels.selectors.values():
                selector.seen = (0, 0)
            loss = levels.measure(level.choices, corpus.validation, policy)
            row[policy] = {
                "dense_perplexity": math.exp(corpus.dense[policy]),
                "perplexity": math.exp(loss),
                "rise": math.expm1(loss - corpus.dense[policy]),
            }
        if arm.method in THRESHOLDED:
            row["skipped_measured"] = seen_share(levels, sparse.config)
        row["seconds"] = time.perf_counter() - start
        yield row


def seen_share(levels: Levels, config: ModelConfig) -> float:
    """What thresholds have really dropped of the Blocks' weights, decoding."""
    dropped = 0.0
    for place, selector in levels.selectors.items():
        kept, total = selector.seen or (0, 0)
        dropped += input_weights(config, *place) * (1 - kept / total) if total else 0.0
    return dropped / block_weights(config) - adapter_share(config)


def read_corpus(model: Rack, path: Path, sequences: int, validation: int, seq_len: int, batch_size: int) -> Corpus:
    tokens_BT, _ = fixed_batch(open_tokens(path, "train"), sequences, seq_len)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = model.embedding.weight.device
    moments = list(calibrate(model.config, tensors, tokens_BT, device=device, batch_size=batch_size))
    batch = fixed_batch(open_tokens(path, "validation"), validation, seq_len)
    dense: dict[Policy, float] = {
        policy: policy_loss(model, SparseRows(), batch, policy, batch_size=batch_size) for policy in POLICIES
    }
    return Corpus(tokens_BT, batch, moments, dense)


def smoke(folder: Path) -> tuple[Path, Path]:
    """A tiny model and a corpus of random tokens."""
    config = ModelConfig(
        vocab_size=96, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, blocks_per_stack=2, max_seq_len=64, init_std=0.2
    )
    model = Rack(config)
    init_weights(model, config, seed=0)
    write_folder(folder / "model", config, ((name, p.detach()) for name, p in model.named_parameters()))
    data = folder / "data"
    data.mkdir()
    splits, random = {}, np.random.default_rng(0)
    for split in ("train", "validation"):
        writer = ShardWriter(data, split, dtype=np.dtype("<u2"), shard_tokens=2000)
        writer.write(random.integers(0, 96, 1200))
        splits[split] = SplitInfo(documents=1, bytes=1200, tokens=1200, shards=writer.finish())
    Manifest(tokenizer_sha256="", vocab_size=96, eos_id=0, dtype="<u2", splits=splits, settings={}).save(data)
    return folder / "model", data


def table(rows: list[dict], targets: tuple[float, ...]) -> str:
    """Rises of perplexity, a line per arm."""
    lines = [f"{'arm (method, rotation, split)':32}" + "".join(f"{f'{t:.0%} all':>12}{'decode':>10}" for t in targets)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [row for row in rows if row["arm"] == arm]
        lines.append(
            f"{arm:32}" + "".join(f"{row['all']['rise']:>12.2%}{row['decode']['rise']:>10.2%}" for row in cells)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder")
    parser.add_argument("--data", type=Path, nargs="+", help="folders of prepared data")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of the bytes to skip")
    parser.add_argument("--sequences", type=int, default=16, help="of the calibration text")
    parser.add_argument("--validation", type=int, default=64, help="sequences of the validation text")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it all work?")
    options = parser.parse_args()
    if not options.smoke and not (options.model and options.data):
        parser.error("--model and --data are needed, or --smoke")
    with TemporaryDirectory() as aside:
        if options.smoke:
            model_folder, data = smoke(Path(aside))
            options.data, options.sequences, options.validation, options.seq_len = [data], 8, 8, 64
        else:
            model_folder = options.model
        model = load_model(model_folder, device=choose_device()).eval()
        assert open_folder(model_folder).config.rotation == "none", "the model is rotated already"
        seq_len, targets, corpora = min(options.seq_len, model.config.max_seq_len), tuple(options.levels), {}
        for path in options.data:
            corpus = read_corpus(model, path, options.sequences, options.validation, seq_len, options.batch_size)
            rows: list[dict] = []
            for arm in ARMS:
                rows += measure(model, arm, corpus, targets, options.batch_size)
                print(f"{path.name}: {arm.name}, {rows[-1]['seconds']:.0f} s", flush=True)
            corpora[path.name] = rows
            print(f"\n{path.name}\n{table(rows, targets)}\n", flush=True)
    if not options.smoke:
        content = {
            "model": str(model_folder),
            "calibration": {"sequences": options.sequences, "search_sequences": SEARCH_SEQUENCES, "seq_len": seq_len},
            "validation_sequences": options.validation,
            "corpora": corpora,
        }
        print(write_results("sparsity_quality", content))


if __name__ == "__main__":
    main()
