"""What the benchmarks of serving share: shapes, random models and their folders, requests of mixed lengths."""

import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import train_tokenizer
from raygrow.weights.folder import write_folder

LARGE = ModelConfig(
    vocab_size=32_768, d_model=2048, n_heads=16, d_ff=5632, blocks_per_stack=24, max_seq_len=2048, mlp="swiglu"
)
"""1.37B parameters."""
SEVEN = replace(
    LARGE, vocab_size=32_000, d_model=4096, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11_008, blocks_per_stack=32
)
"""6.7B parameters, Llama 2's shape."""
SMOKE = replace(
    LARGE,
    vocab_size=512,
    d_model=64,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    d_ff=64,
    blocks_per_stack=2,
    max_seq_len=256,
)
LENGTHS = 100, 1024
"""Tokens of a prompt, and of an answer: anything between, all alike often."""
SMOKE_LENGTHS = 10, 60
TRAINING_FILES = 1000
"""Of Python's own library."""


class Work(NamedTuple):
    """What is asked for: this many tokens after that prompt."""

    prompt: tuple[int, ...]
    new: int


def draw_work(count: int, *, seed: int, lengths: tuple[int, int], vocab_size: int) -> list[Work]:
    """Random prompts without a common beginning. The same seed gives the same."""
    draw = random.Random(seed)
    return [
        Work(tuple(draw.randrange(1, vocab_size) for _ in range(draw.randint(*lengths))), draw.randint(*lengths))
        for _ in range(count)
    ]


def random_model(config: ModelConfig, device: torch.device) -> Rack:
    """A model in bf16 that was never anywhere else than on its device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Rack(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=config.init_std)
    return model.eval().requires_grad_(False)


def make_folder(config: ModelConfig, folder: Path, device: torch.device) -> Path:
    """A random model as transformers reads it, with a tokenizer of about as many tokens."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    texts = (file.read_text(errors="replace") for file in files[:TRAINING_FILES])
    train_tokenizer(texts, config.vocab_size).save(folder / "tokenizer")
    tensors = random_model(config, device).state_dict().items()
    return write_folder(folder / "model", config, tensors, format="hf", tokenizer_from=folder / "tokenizer")


def engine_config(device: torch.device, *, seqs: int, max_len: int) -> EngineConfig:
    """As many sequences at once as there are, and room for all of them."""
    return EngineConfig(
        device=device.type, dtype="bfloat16", max_num_seqs=seqs, max_model_len=max_len, max_num_batched_tokens=4096
    )


def requests(work: list[Work], name: str = "") -> Iterator[Request]:
    """Greedy, and as long as asked for."""
    for i, (prompt, new) in enumerate(work):
        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        yield Request(id=f"{name}{i}", prompt=prompt, sampling=sampling)


def run_engine(engine: Engine, work: list[Work]) -> list[float]:
    """Seconds of every step, all requests at once."""
    for request in requests(work):
        engine.add(request)
    before, seconds = engine.stats.tokens, []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    assert engine.stats.tokens - before == sum(new for _, new in work)
    return seconds
