"""Tokens per second of the inference engine, beside transformers and beside what the memory's bandwidth allows.

    python benchmarks/engine_throughput.py                    1.37B and 6.7B parameters, bf16; one GPU, about 8 minutes
    python benchmarks/engine_throughput.py --parts engine     one part alone: engine, single, batching or generate
    python benchmarks/engine_throughput.py --parts single --sparsity 0.4 0.5      one sequence, sparse beside dense
    python benchmarks/engine_throughput.py --parts single --sparsity 0.5 --sizes 1.37B      on a CPU too
    python benchmarks/engine_throughput.py --profile          and which kernels the engine's steps spend their time in
    python benchmarks/engine_throughput.py --smoke            tiny, also on a CPU: does it all work?

Throughput: a random Llama-shaped model, written once, as a folder that both sides load. 256 requests at once, prompts
and answers of 100 to 1024 tokens each, greedy, never ended early; new tokens by the seconds until the last is there.

transformers' continuous batching (`batching`) runs with every setting below for a short while, all prompts and the
beginnings of all answers; the fastest then does the whole work. It takes flash-attn where that is installed; without,
it has two kinds of attention, `paged|sdpa` and `paged|eager`. `generate`, one request after the other, is tried with
and without a static cache, which has it compiled with CUDA graphs; the faster does some of the requests, and is told
as tokens per second. Compiling and recording are not counted, for anybody.

`single` is one sequence decoding alone. The floor of a step is the time to read the weights once, all but the
embedding, at the rate of a large copy in the same run. Sparse, it is the time to read those that are not skipped; the
inputs of the residual stream get 0.8 of a uniform split, as LaRoSA has it, scores are weighted by norms of columns, and
there are no adapters, as in the models that `raygrow sparsify` makes when nothing is said.
"""

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import copy_bytes_per_second, write_results
from workload import (
    LARGE,
    LENGTHS,
    SEVEN,
    SMOKE,
    SMOKE_LENGTHS,
    Work,
    draw_work,
    engine_config,
    make_folder,
    random_model,
    run_engine,
)

from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.nn.config import ModelConfig
from raygrow.nn.joined import join
from raygrow.nn.rack import Rack
from raygrow.sparsity.allocate import ratio_split
from raygrow.sparsity.inputs import block_weights
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import METHODS, Method
from raygrow.text.tokenizer import load_tokenizer

PARTS = "engine", "single", "batching", "generate"
STAGES: list[list[dict[str, Any]]] = [
    [{"max_requests_per_batch": count} for count in (256, 64, 24)],
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": True, "use_async_batching": True},
        {"default_compile_level": 1},
        {"attention": "paged|eager"},
    ],
]
"""Settings of continuous batching to try: the best of a stage, if it is better than without, stays for the next.
The sharing of beginnings is off in all, for these prompts have none in common."""
TRIAL_TOKENS = 48
"""New tokens of each request while settings are tried."""
TRIAL_SECONDS = 12.0
WHOLE_SECONDS = 90.0
"""After this long a run is ended, and counts with the tokens that it has made."""
CACHES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache, compiled": {"cache_implementation": "static"},
}
SINGLE_PROMPT, SINGLE_NEW = 128, 256
SIZES = {"1.37B": LARGE, "6.7B": SEVEN}
RATIO = 0.8
CALIBRATION = 4, 128
"""Sequences and tokens of each."""


def main() -> None:
    """Measures, prints, writes the rows; what was measured is written even if a later part fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3, help="of the engine, each with other prompts")
    parser.add_argument("--subset", type=int, default=4, help="requests for `generate`")
    parser.add_argument("--method", choices=METHODS, default="grouped", help="of what is sparse")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[], help="of `single`, beside dense")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of `single`")
    parser.add_argument("--profile", action="store_true", help="GPU time of each kernel of the engine's steps")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, lengths = (SMOKE, SMOKE_LENGTHS) if arguments.smoke else (LARGE, LENGTHS)
    count, turns = (6, 1) if arguments.smoke else (arguments.requests, arguments.turns)
    profile = arguments.profile and device.type == "cuda"
    works = [draw_work(count, seed=i, lengths=lengths, vocab_size=config.vocab_size) for i in range(turns)]
    result: dict[str, Any] = {
        "config": asdict(config),
        "dtype": "bfloat16",
        "requests": count,
        "prompt_tokens": sum(len(prompt) for prompt, _ in works[0]),
        "new_tokens": sum(new for _, new in works[0]),
    }
    with tempfile.TemporaryDirectory() as temporary:
        began = time.perf_counter()
        folder = make_folder(config, Path(temporary), device)
        say(f"folder written in {time.perf_counter() - began:.0f} s")
        parts: dict[str, Callable[[], Any]] = {
            "engine": lambda: throughput(folder, works, device, profile=profile),
            "single": lambda: single(
                folder,
                {"smoke": SMOKE} if arguments.smoke else {name: SIZES[name] for name in arguments.sizes},
                arguments.method,
                arguments.sparsity,
                device,
                profile=profile,
            ),
            "batching": lambda: continuous_batching(folder, works[0], device, smoke=arguments.smoke),
            "generate": lambda: generate(folder, works[0][: 2 if arguments.smoke else arguments.subset], device),
        }
        for part in arguments.parts:
            began = time.perf_counter()
            result[part] = parts[part]()
            free(device)
            say(f"{part}: {time.perf_counter() - began:.0f} s in all\n")
            if not arguments.smoke:
                result["ratios"] = ratios(result)
                write_results("engine_throughput", result)
    for name, ratio in ratios(result).items():
        say(f"{name}: {ratio:.2f}")


def say(text: str) -> None:
    """Prints at once, for whoever ends this early."""
    print(text, flush=True)


def free(device: torch.device) -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """The engine's tokens per second over those of the others."""
    rates = {part: result[part]["tokens_per_second"] for part in ("engine", "batching", "generate") if part in result}
    return {
        f"engine / {part}": rates["engine"] / rates[part] for part in rates if part != "engine" and "engine" in rates
    }


def throughput(folder: Path, works: list[list[Work]], device: torch.device, *, profile: bool) -> dict[str, Any]:
    """The engine with all requests at once."""
    longest = max(len(prompt) + new for work in works for prompt, new in work)
    began = time.perf_counter()
    engine = load_engine(folder, engine_config(device, seqs=len(works[0]), max_len=longest))
    ready = time.perf_counter() - began
    run_engine(engine, [Work(prompt, 8) for prompt, _ in shuffled(works[0])])  # warm, with other prompts
    turns = []
    for work in works:
        seconds = run_engine(engine, work)
        rate = sum(new for _, new in work) / sum(seconds)
        turns.append({"tokens_per_second": rate, "seconds": sum(seconds), "steps": len(seconds)})
        full = seconds[len(seconds) // 4 : len(seconds) // 3]
        say(f"engine: {rate:,.0f} tokens/s, {len(seconds)} steps, {1e3 * statistics.median(full):.2f} ms a full one")
    if profile:
        for request_work in (works[0], works[0][:1]):
            show_kernels(engine, [Work(prompt, 40) for prompt, _ in shuffled(request_work)])
    stats = asdict(engine.stats)
    engine.close()
    rate = statistics.median(turn["tokens_per_second"] for turn in turns)
    return {"tokens_per_second": rate, "seconds_to_load_and_record": ready, "turns": turns, "stats": stats}


def shuffled(work: list[Work]) -> list[Work]:
    """The same lengths, and prompts that begin otherwise."""
    return [Work(prompt[::-1], new) for prompt, new in work]


def show_kernels(engine: Engine, work: list[Work], top: int = 16) -> None:
    """Prints the GPU time of kernels, a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = run_engine(engine, work)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / 1e3
    say(f"{len(work)} requests, {len(seconds)} steps of {1e3 * sum(seconds) / len(seconds):.3f} ms, of which kernels:")
    say(f"{total / len(seconds):9.3f}  all")
    for event in events[:top]:
        say(f"{event.self_device_time_total / 1e3 / len(seconds):9.3f}  {event.key[:110]}")


def single(
    folder: Path,
    shapes: dict[str, ModelConfig],
    method: Method,
    levels: list[float],
    device: torch.device,
    *,
    profile: bool,
) -> list[dict[str, Any]]:
    """One sequence alone, of every size, dense and at every level."""
    rate = copy_bytes_per_second(device, size=2**26 if "smoke" in shapes else 2**32)
    say(f"copy: {rate / 1e12:.3f} TB/s, read and written")
    tokenizer = load_tokenizer(folder)
    rows = []
    for name, config in shapes.items():
        dense = single_row(name, config, method, 0.0, tokenizer, rate, device, profile=profile)
        rows.append(dense)
        for sparsity in levels:
            free(device)
            row = single_row(name, config, method, sparsity, tokenizer, rate, device, profile=profile)
            row["speedup"] = row["tokens_per_second"] / dense["tokens_per_second"]
            say(f"{name}, {method} {sparsity:g}: {row['speedup']:.3f} times the dense model's tokens/s")
            rows.append(row)
        free(device)
    return rows


def make_sparse(model: Rack, method: Method, sparsity: float) -> tuple[SparseRows, float]:
    """Makes a random model sparse, calibrated on random tokens. Also the share of its weights that is skipped."""
    tokens_BT = torch.randint(model.config.vocab_size, CALIBRATION, generator=torch.Generator().manual_seed(0))
    levels = Levels(model, method, tokens_BT)
    level = levels.made(ratio_split(model.config, sparsity, RATIO), sparsity)
    levels.use(level.choices)
    return levels.rows, level.skipped


def single_row(
    name: str,
    config: ModelConfig,
    method: Method,
    sparsity: float,
    tokenizer: Any,
    rate: float,
    device: torch.device,
    *,
    profile: bool,
) -> dict[str, Any]:
    """One sequence alone, of one model; a sparsity of 0 is the dense one."""
    model = random_model(config, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, skipped = make_sparse(model, method, sparsity) if sparsity else (None, 0.0)
    if not sparsity and device.type == "cuda":
        join(model)  # as `load_engine` does
    prompt, new = (16, 16) if config is SMOKE else (SINGLE_PROMPT, SINGLE_NEW)
    engine = Engine(model, tokenizer, engine_config(device, seqs=1, max_len=prompt + new), rows=rows)
    works = [
        draw_work(1, seed=seed, lengths=(prompt, prompt), vocab_size=config.vocab_size)[0]._replace(new=new)
        for seed in range(4)
    ]
    run_engine(engine, works[:1])
    seconds = [second for work in works[1:] for second in run_engine(engine, [work])[1:]]
    if profile:
        show_kernels(engine, [works[0]._replace(prompt=works[0].prompt[::-1])])
    engine.close()
    read = 2 * (parameters - model.embedding.weight.numel() * (not config.tie_embeddings))
    read -= 2 * round(skipped * block_weights(config))
    step, floor = statistics.mean(seconds), read / rate
    kind = f"{method} {sparsity:g}" if sparsity else "dense"
    say(
        f"{name}, one sequence, {kind}: {1 / step:,.1f} tokens/s, {1e3 * step:.3f} ms a token; "
        f"the floor of {read / 1e9:.2f} GB is {1e3 * floor:.3f} ms, {floor / step:.1%} of it"
    )
    return {
        "name": name,
        "method": method if sparsity else "dense",
        "sparsity": sparsity,
        "skipped": skipped,
        "parameters": parameters,
        "tokens_per_second": 1 / step,
        "median_ms": 1e3 * statistics.median(seconds),
        "weight_bytes_read": read,
        "copy_bytes_per_second": rate,
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / step,
    }


def load_reference(folder: Path, device: torch.device) -> Any:
    """The model of transformers, which never ends a text by itself."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    return model


def continuous_batching(folder: Path, work: list[Work], device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Those of transformers, with its best settings."""
    model = load_reference(folder, device)
    short = [Work(prompt, min(new, TRIAL_TOKENS)) for prompt, new in shuffled(work)]
    # its cache would leave no room for CUDA graphs, nor for the scores of eager attention
    base: dict[str, Any] = {"allow_block_sharing": False, "max_memory_percent": 0.6}
    if smoke:
        base |= {"num_blocks": 64, "block_size": 32, "max_batch_tokens": 256}  # else it takes half of the memory
    trials: list[dict[str, Any]] = []
    best, best_rate = base, 0.0
    for stage in STAGES:
        start = best
        for options in stage[:1] if smoke else stage:
            trial = try_settings(model, short, start | options)
            trials.append(trial)
            free(device)
            if trial.get("tokens_per_second", 0.0) > best_rate:
                best, best_rate = start | options, trial["tokens_per_second"]
    whole = batching_rate(model, work, best, WHOLE_SECONDS)
    say(f"continuous batching, the whole work with {best}: {whole['tokens_per_second']:,.0f} tokens/s")
    return {**whole, "settings": best, "trials": trials}


def try_settings(model: Any, work: list[Work], options: dict[str, Any]) -> dict[str, Any]:
    """A short run, or why there is none."""
    began = time.perf_counter()
    try:
        found = batching_rate(model, work, options, TRIAL_SECONDS)
        said = f"{found['tokens_per_second']:,.0f} tokens/s with {found['attention']}"
    except Exception as error:  # not installed, too little memory, or anything else
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        found = {"failure": said}
    say(f"continuous batching, {options}: {said} ({time.perf_counter() - began:.0f} s in all)")
    return {"settings": options, **found}


def batching_rate(model: Any, work: list[Work], options: dict[str, Any], limit: float) -> dict[str, Any]:
    """Tokens per second, warmed up before."""
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    options = dict(options)
    model.set_attn_implementation(options.pop("attention", "sdpa"))
    generation = copy.deepcopy(model.generation_config)
    generation.eos_token_id = -1  # never
    hints = WorkloadHints(
        max_prompt_length=max(len(prompt) for prompt, _ in work),
        max_generated_length=max(new for _, new in work),
        num_requests=len(work),
    )
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**options),
        workload_hints=hints,
    )
    attention = model.config._attn_implementation  # what it has made of it
    try:
        manager.warmup()
        manager.start()
        for prompt, _ in work[:4]:  # for what a recording does not meet
            manager.add_request(list(prompt[::-1]), max_new_tokens=4)
        finish(manager, 4, time.perf_counter() + 120)
        start = time.perf_counter()
        for prompt, new in work:
            manager.add_request(list(prompt), max_new_tokens=new)
        tokens, finished = finish(manager, len(work), start + limit)
        if finished < len(work):
            manager.stop(block=True, timeout=20, hard_stop=True)
        end = time.perf_counter()
        while (result := manager.get_result(timeout=0.1)) is not None:  # of those that were cut off
            tokens += len(result.generated_tokens)
    finally:
        manager.stop(block=True, timeout=20, hard_stop=True)
        manager.destroy()
    if finished == len(work):
        assert tokens == sum(new for _, new in work)
    return {
        "tokens_per_second": tokens / (end - start),
        "attention": attention,
        "finished": finished,
        "seconds": end - start,
    }


def finish(manager: Any, count: int, deadline: float) -> tuple[int, int]:
    """Waits for requests. Returns the new tokens of those that are done, and how many these are."""
    tokens, finished = 0, 0
    while finished < count and time.perf_counter() < deadline:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("its thread has ended; its log says why")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            tokens += len(result.generated_tokens)
            finished += 1
    return tokens, finished


@torch.inference_mode()
def generate(folder: Path, work: list[Work], device: torch.device) -> dict[str, Any]:
    """One request after the other."""
    model = load_reference(folder, device)
    longest = max(work, key=lambda request: len(request.prompt) + request.new)
    trial = Work(longest.prompt, max(16, longest.new // 8))
    found: dict[str, float] = {}
    for name, options in CACHES.items():
        began = time.perf_counter()
        generate_one(model, longest, options)  # warm: the longest first, for its cache is kept
        found[name] = trial.new / generate_one(model, trial, options)
        say(f"generate, {name}: {found[name]:,.1f} tokens/s ({time.perf_counter() - began:.0f} s)")
    best = max(found, key=lambda name: found[name])
    for request in work:
        generate_one(model, request._replace(new=8), CACHES[best])
    seconds = sum(generate_one(model, request, CACHES[best]) for request in work)
    rate = sum(new for _, new in work) / seconds
    say(f"generate, {best}, {len(work)} requests one after the other: {rate:,.1f} tokens/s")
    return {"tokens_per_second": rate, "settings": best, "trials": found, "requests": len(work), "seconds": seconds}


def generate_one(model: Any, request: Work, options: dict[str, Any]) -> float:
    """Seconds of one request."""
    ids = torch.tensor([request.prompt], device=model.device)
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.new, min_new_tokens=request.new, **options
    )
    out_T = out[0].tolist()  # waits for the device
    assert len(out_T) == len(request.prompt) + request.new
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
