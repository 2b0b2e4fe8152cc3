"""What the stages after training do with the finished model, in a process that may have a GPU; see `elsewhere`."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from raygrow.evaluate.perplexity import evaluate_model
from raygrow.evaluate.sparsify import sparsify_model
from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request, merged
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import block_flops, head_flops
from raygrow.progress import Progress
from raygrow.runtime.openai.responses import CompletionShape, Prompt
from raygrow.sparsity.config import SparsifyConfig
from raygrow.sparsity.policy import POLICIES
from raygrow.weights.atomic import replace_file
from raygrow.weights.folder import open_folder
from raygrow.weights.json_file import read_json


def score(
    model: Path,
    data: Path,
    out: Path,
    levels: Sequence[float | None],
    *,
    sequences: int,
    seq_len: int,
    batch_size: int,
    progress: Progress,
) -> float:
    """Evaluates a model at every sparsity (None is dense) under both policies; what has been evaluated is kept.

    Returns:
        FLOPs, counted as those of a dense model.
    """
    out.mkdir(parents=True, exist_ok=True)
    per_token = forward_flops(open_folder(model).config, seq_len)
    flops = 0.0
    for level in levels:
        for policy in POLICIES:
            file = out / f"{'dense' if level is None else f'{level:g}'}-{policy}.json"
            if not file.exists():
                record = evaluate_model(
                    model,
                    data,
                    sequences=sequences,
                    seq_len=seq_len,
                    batch_size=batch_size,
                    sparsity=level,
                    policy=policy,
                    progress=progress,
                )
                replace_file(file, record.to_json())
            record = read_json(file)
            flops += record["sequences"] * record["seq_len"] * per_token
    return flops


def make_sparse(model: Path, target: Path, data: Path, config: SparsifyConfig, *, progress: Progress) -> None:
    """Writes the sparse model, unless it is there."""
    if target.exists():
        return
    made = sparsify_model(model, target, data, config, progress=progress)
    flops = made.tokens * forward_flops(open_folder(model).config, made.plan.calibration.seq_len)
    replace_file(target.parent / "cost.json", json.dumps({"flops": flops}))


def continue_text(model: Path, engine: EngineConfig, prompt: str, tokens: int, *, progress: Progress) -> dict[str, Any]:
    """What the engine makes of a prompt, greedily, as a choice of OpenAI's completions with the tokens of its text."""
    with closing(load_engine(model, engine)) as loaded:
        tokenizer = loaded.tokenizer
        ids = tuple(tokenizer.encode(prompt, special_tokens=True, parse_special=True)) or (tokenizer.eos_id,)
        loaded.add(Request(id="text", prompt=ids, sampling=Sampling(max_tokens=tokens, temperature=0, logprobs=0)))
        deltas = []
        while loaded.has_work:
            deltas += loaded.step()
            progress(len(deltas), tokens, "tokens")
    shape = CompletionShape(tokenizer, [Prompt(ids, prompt)], echo=False, logprobs=True)
    return shape.choice(0, merged(deltas))


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of a token that goes through a dense model, in a sequence of `seq_len`."""
    blocks = sum(block_flops(config, block, seq_len).forward for block in range(config.n_blocks))
    return blocks + head_flops(config).forward
