"""How fast a sparse model decodes on this machine: one sequence alone, by the engine, dense and at every level."""

import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.device import choose_device

PROMPT, ANSWER = 64, 64
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of one sequence that decodes alone; the first token, which the prompt gives, is left out."""

    sparsity: float | None
    """None is dense."""
    tokens_per_second: float
    """The median of rounds."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What has been measured, and on what. The dense model comes first."""

    rows: Sequence[Speed]
    prompt: int
    answer: int
    hardware: str
    dtype: str

    def told(self) -> str:
        """A section of a card."""
        dense = self.rows[0].tokens_per_second
        return "\n".join(
            [
                "## Speed",
                "",
                "| sparsity | tokens per second | times dense |",
                "|---------:|------------------:|------------:|",
                *(
                    f"| {'dense' if row.sparsity is None else f'{row.sparsity:g}'} "
                    f"| {row.tokens_per_second:.4g} | {row.tokens_per_second / dense:.2f} |"
                    for row in self.rows
                ),
                "",
                f"One sequence alone, {self.answer} tokens after a prompt of {self.prompt}, by raygrow's engine in "
                f"{self.dtype} on {self.hardware}; the median of {ROUNDS} rounds. Several sequences at once gain less.",
                "",
            ]
        )


def decode_speeds(folder: Path, levels: Iterable[float], text: Sequence[int], *, device: str | None = None) -> Speeds:
    """Measures a model folder. One model is loaded at a time.

    Args:
        folder: Of a sparse model, with its tokenizer.
        levels: Of its plan.
        text: Tokens that prompts are the beginning of; at least 2.
        device: CUDA where there is one, when not given.
    """
    place, rows, dtype = choose_device(device), [], ""
    prompt = tuple(text[: min(PROMPT, len(text) // 2)])
    answer = 0
    for sparsity in (None, *levels):
        config = EngineConfig(
            device=str(place), max_num_seqs=1, sparsity=sparsity, async_scheduling=False, enable_prefix_caching=False
        )
        with closing(load_engine(folder, config)) as engine:
            answer, dtype = min(ANSWER, engine.max_model_len - len(prompt)), engine.dtype
            _decode(engine, prompt, answer)  # warm
            seconds = [_decode(engine, prompt, answer) for _ in range(ROUNDS)]
        rows.append(Speed(sparsity=sparsity, tokens_per_second=(answer - 1) / statistics.median(seconds)))
    return Speeds(rows=rows, prompt=len(prompt), answer=answer, hardware=hardware(place), dtype=dtype)


def hardware(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The name of this machine's CPU."""
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return (names or [platform.processor() or platform.machine()])[0]


def _decode(engine: Engine, prompt: tuple[int, ...], answer: int) -> float:
    """Seconds of all tokens but the first."""
    sampling = Sampling(max_tokens=answer, temperature=0, ignore_eos=True)
    engine.add(Request(id="speed", prompt=prompt, sampling=sampling))
    engine.step()
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start
