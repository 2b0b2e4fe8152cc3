"""The evaluation harness as it is: its scores over the API are those of scoring the model directly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer
from tests.runtime.openai.local import LocalModel

DATA = Path(__file__).parents[4] / "shared/data/lm_eval"
ITEMS = 10
LAMBADA = {
    "task": "lambada_local",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
PIQA = {
    "task": "piqa_local",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}Answer:",
    "doc_to_target": "gold",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def evaluate(model: Any, task: dict[str, Any], file: str, cache: Path) -> tuple[dict[str, float], list[Any]]:
    """Metrics, and the scores of every answer."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    where = {"data_files": {"test": str(DATA / file)}, "cache_dir": str(cache)}
    config = {**task, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test"}
    only_ours = TaskManager(include_defaults=False)  # to read through its own thousands takes most of a minute
    found = simple_evaluate(model=model, tasks=[config], limit=ITEMS, bootstrap_iters=0, task_manager=only_ours)
    name = task["task"]
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
    return metrics, [sample["filtered_resps"] for sample in found["samples"][name]]


@pytest.mark.skipif(not DATA.exists(), reason="the evaluation data is not beside this checkout")
@pytest.mark.parametrize(
    ("task", "file", "concurrent"), [(LAMBADA, "lambada_openai.jsonl.xz", 1), (PIQA, "piqa.jsonl.xz", 4)]
)
def test_scores_over_the_api_are_those_of_the_model(
    url: str, model: LocalModel, rack: Rack, task: dict[str, Any], file: str, concurrent: int, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer: Tokenizer = model.tokenizer

    class Direct(TemplateLM):
        """A full forward pass for every answer."""

        eot_token_id = tokenizer.eos_id

        def tok_encode(self, string: str, **options: Any) -> list[int]:
            return tokenizer.encode(string)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            answers = []
            for _, context, continuation in requests:
                whole = torch.tensor([[*context, *continuation]])
                scores = rack(whole)[0, len(context) - 1 : -1].log_softmax(-1)
                chosen = scores.gather(1, torch.tensor(continuation)[:, None])
                greedy = scores.argmax(1).tolist() == continuation
                answers.append((float(chosen.sum()), greedy))
            return answers

        def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> list[float]:
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    over_api = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=model.id,
        num_concurrent=concurrent,
        batch_size=3,
        max_length=model.max_model_len,
        max_retries=1,
    )
    assert over_api.tokenizer_backend == "remote"  # found by itself
    metrics, scores = evaluate(over_api, task, file, tmp_path)
    expected, direct = evaluate(Direct(), task, file, tmp_path)
    assert len(scores) == ITEMS
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(direct), atol=1e-3, rtol=1e-5)
    assert metrics == pytest.approx(expected, rel=1e-4)
