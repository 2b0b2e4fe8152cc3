"""The inference engine against transformers on the CPU: several requests at a time, and one after the other.

A random model is written as a Hugging Face folder, which both load in fp32. Rounds alternate, so that what else the
machine does hits all alike; medians are told. Every way must give the same tokens.

    python benchmarks/engine_cpu.py
    python benchmarks/engine_cpu.py --model mixtral --tokens 32
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_results
from transformers import AutoModelForCausalLM

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import train_tokenizer
from raygrow.weights.folder import write_folder

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1408, "blocks_per_stack": 8},
    "mixtral": {
        "d_model": 256,
        "n_heads": 8,
        "n_kv_heads": 4,
        "d_ff": 704,
        "blocks_per_stack": 6,
        "n_experts": 8,
        "top_k": 2,
    },
}
Tokens = list[list[int]]


def make_folder(shape: str, folder: Path) -> Path:
    """A random model with a tokenizer, as transformers reads it."""
    config = ModelConfig(vocab_size=8192, max_seq_len=1024, **SHAPES[shape])
    model = Rack(config)
    init_weights(model, config, seed=0)
    train_tokenizer([f"text {i}" for i in range(100)], 300).save(folder / "tokenizer")
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return write_folder(folder / "model", config, tensors, format="hf", tokenizer_from=folder / "tokenizer")


def with_engine(engine: Engine, prompts: Tokens, new: int) -> Tokens:
    """All requests at once."""
    found: Tokens = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        engine.add(Request(id=str(i), prompt=tuple(prompt), sampling=sampling))
    while engine.has_work:
        for delta in engine.step():
            found[int(delta.id)] += delta.token_ids
    return found


@torch.inference_mode()
def with_generate(model: Any, prompts: Tokens, new: int) -> Tokens:
    """One request after the other, each with a key-value cache."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.prompt // 4, args.prompt, args.requests).int().tolist()
    prompts = [torch.randint(1, 8192, (length,), generator=generator).tolist() for length in lengths]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(args.model, Path(temporary))
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        reference.generation_config.eos_token_id = None
        reference.generation_config.pad_token_id = 0
        config = EngineConfig(device="cpu", max_num_seqs=args.requests, enable_prefix_caching=False)
        engine = load_engine(folder, config)
    ways: dict[str, Callable[[], Tokens]] = {
        "engine": lambda: with_engine(engine, prompts, args.tokens),
        "engine, one after the other": lambda: [with_engine(engine, [prompt], args.tokens)[0] for prompt in prompts],
        "transformers.generate, one after the other": lambda: with_generate(reference, prompts, args.tokens),
    }
    expected = {way: run() for way, run in ways.items()}  # warm
    same = {
        way: statistics.mean(a == b for a, b in zip(found, expected["engine"], strict=True))
        for way, found in expected.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    total = args.requests * args.tokens
    rates = {way: round(total / statistics.median(taken), 1) for way, taken in seconds.items()}
    base = rates["transformers.generate, one after the other"]
    for way, rate in rates.items():
        print(f"{way:45} {rate:8.1f} tokens/s  {rate / base:5.2f}x  same tokens: {same[way]:.0%} of requests")
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    write_results(
        f"engine_cpu_{args.model}",
        {
            "settings": vars(args) | {"parameters": parameters, "dtype": "float32", "shape": SHAPES[args.model]},
            "tokens_per_second": rates,
            "speedup_over_generate": {way: round(rate / base, 2) for way, rate in rates.items()},
            "rounds_seconds": {way: [round(second, 3) for second in taken] for way, taken in seconds.items()},
            "requests_with_the_same_tokens": same,
        },
    )


if __name__ == "__main__":
    main()
