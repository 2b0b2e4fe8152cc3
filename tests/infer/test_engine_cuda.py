"""The engine on a GPU: with and without graphs, in fp32 and bf16, within its memory."""

import pytest
import torch

from raygrow.infer.graphs import graph_sizes
from raygrow.weights.folder import load_model
from tests.infer.subjects import Subject, finish, prompts, request, tokens_of, widest_gap


def test_graphs_cover_every_number_of_rows():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    for largest in (64, 100, 256, 300):
        sizes = graph_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert len(sizes) < 30


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_greedy_tokens_on_a_gpu(each_subject: Subject, enforce_eager: bool):
    engine = each_subject.engine(device="cuda", dtype="float32", enforce_eager=enforce_eager, max_num_batched_tokens=31)
    given = prompts(14, vocab_size=each_subject.vocab_size)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=20))
    found = finish(engine)
    assert [tokens_of(found[str(i)]) for i in range(14)] == [each_subject.greedy(prompt, 20) for prompt in given]


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_bf16_tokens_differ_only_at_near_ties(each_subject: Subject, enforce_eager: bool):
    engine = each_subject.engine(device="cuda", enforce_eager=enforce_eager)
    model = load_model(each_subject.folder, dtype=torch.bfloat16, device="cuda")
    given = prompts(10, vocab_size=each_subject.vocab_size)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=20, ignore_eos=True))
    found = finish(engine)
    for i, prompt in enumerate(given):
        assert widest_gap(model, prompt, tokens_of(found[str(i)])) < 0.1


@pytest.mark.gpu
def test_memory_of_a_gpu_stays_within_the_budget(each_subject: Subject):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    engine = each_subject.engine(device="cuda", max_num_seqs=64)
    for i, prompt in enumerate(prompts(100, vocab_size=each_subject.vocab_size)):
        engine.add(request(str(i), prompt, max_tokens=20, temperature=1.0, seed=i, top_p=0.9))
    finish(engine)
    stats = engine.stats
    assert stats.kv_used_bytes <= stats.kv_mapped_bytes <= stats.kv_budget_bytes < free
    engine.reclaim()
    assert engine.stats.kv_mapped_bytes == engine.stats.kv_used_bytes
