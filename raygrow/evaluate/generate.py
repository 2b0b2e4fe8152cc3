"""Text from a model folder: one prompt, continued by the inference engine."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling


def generate_text(model_folder: Path, prompt: str, sampling: Sampling, *, device: str | None = None) -> Iterator[str]:
    """The continuation of a prompt by the model of a folder, without the prompt, piece by piece.

    An empty prompt starts a new document.

    Raises:
        FileNotFoundError: If the folder, its tensors or its tokenizer are missing.
        ValueError: If a file is damaged, the model cannot continue this prompt, or its outputs are not numbers.
    """
    with closing(load_engine(model_folder, EngineConfig(device=device, max_num_seqs=1))) as engine:
        ids = engine.tokenizer.encode(prompt, special_tokens=True) or [engine.tokenizer.eos_id]
        engine.add(Request(id="text", prompt=tuple(ids), sampling=sampling))
        while engine.has_work:
            for delta in engine.step():
                if delta.error:
                    raise ValueError(f"{model_folder}: {delta.error}")
                yield delta.text
