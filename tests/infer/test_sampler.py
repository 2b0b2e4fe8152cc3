import pytest
import torch

from raygrow.infer import sampler
from raygrow.infer.sampler import NOT_A_NUMBER, likeliest, logprobs, uniform
from raygrow.infer.sampling import Sampling


def choose_tokens(logits: torch.Tensor, *of_rows: list) -> list[int]:
    return sampler.choose_tokens(logits, likeliest(logits), *of_rows).tolist()


def draw(logits: torch.Tensor, count: int = 300, **sampling) -> list[int]:
    """The first tokens that a sequence would be given if its logits never changed."""
    samplings = [Sampling(**sampling)] * count
    return choose_tokens(logits.expand(count, -1), samplings, [5] * count, list(range(count)))


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()
    assert set(draw(logits, top_p=0.4)) == {0}
    assert set(draw(logits, top_p=0.7)) == {0, 2}
    assert set(draw(logits, top_p=1.0)) == {0, 1, 2, 3}


def test_top_k_keeps_the_likeliest_and_top_p_counts_from_those():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert set(draw(logits, top_k=1)) == {0}
    assert set(draw(logits, top_k=3)) == {0, 2, 3}
    assert set(draw(logits, top_k=9)) == {0, 1, 2, 3}
    assert set(draw(logits, top_k=2**70)) == {0, 1, 2, 3}
    assert set(draw(logits, top_k=2, top_p=0.55)) == {0}  # 4/7 of what top_k has left


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.1, 0.0, 0.7, 0.2])
    drawn = torch.bincount(torch.tensor(draw(p.log(), 5000)), minlength=4) / 5000
    assert torch.allclose(drawn, p, atol=0.02)
    assert drawn[1] == 0
    warm = torch.bincount(torch.tensor(draw(p.log(), 5000, temperature=2.0)), minlength=4) / 5000
    assert torch.allclose(warm, p.sqrt() / p.sqrt().sum(), atol=0.02)


def test_uniform_numbers_are_spread_and_their_own():
    numbers = [uniform(seed, number) for seed in (-1, 0, 1, 2**63 - 1) for number in range(2500)]
    assert len(set(numbers)) > 9980  # of 2**24 values some repeat
    assert torch.histc(torch.tensor(numbers), bins=20, min=0, max=1).sub(500).abs().max() < 100
    neighbours = torch.tensor([numbers[:-1], numbers[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.05


def test_a_row_does_not_depend_on_the_rows_beside_it():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator)
    kinds = [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.8), Sampling(top_k=7, temperature=0.6)]
    samplings = [kinds[row % 4] for row in range(40)]
    seeds, numbers = list(range(40)), [row * 3 % 11 for row in range(40)]
    together = choose_tokens(logits, samplings, seeds, numbers)
    alone = [choose_tokens(logits[[r]], [samplings[r]], [seeds[r]], [numbers[r]])[0] for r in range(40)]
    assert together == alone
    assert len(set(together)) > 15


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert choose_tokens(logits, [Sampling(temperature=0.0)], [0], [0]) == [1]
    assert choose_tokens(logits, [Sampling(top_k=1)], [0], [0]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told(temperature: float):
    good, nan, inf = torch.zeros(4), torch.tensor([0.0, torch.nan, 0, 0]), torch.tensor([0.0, torch.inf, 0, 0])
    none = torch.full((4,), -torch.inf)
    tokens = choose_tokens(
        torch.stack([good, nan, inf, none]), [Sampling(temperature=temperature)] * 4, [0] * 4, [0] * 4
    )
    assert tokens[0] in range(4)
    assert tokens[1:] == [NOT_A_NUMBER] * 3


def test_a_hot_and_a_cold_distribution_stay_within_the_vocabulary():
    logits = torch.tensor([-1e4, 0.0, 1e4])
    assert set(draw(logits, temperature=1e-9)) == {2}
    assert set(draw(logits, temperature=1e9)) == {0, 1, 2}


def test_what_is_nothing_or_endless_in_fp32_is_not_taken_as_such():
    logits = torch.tensor([0.0, 1.0, -torch.inf])
    assert set(draw(logits, top_p=1e-300)) == {1}
    assert set(draw(logits, temperature=1e300)) == {0, 1}
    assert set(draw(logits, temperature=1e-300)) == {1}


def test_logprobs_hold_the_likeliest_in_order_and_the_same_floats():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0], [3.0, 0.0, 1.0, 2.0, -1.0]])
    first, second = logprobs(logits, [3, 4], [2, 0])
    expected = logits.log_softmax(-1)
    assert first.token_id == 3
    assert [token for token, _ in first.top] == [1, 3]  # equals: the lower id first
    assert first.top[1][1] == first.logprob == float(expected[0, 3])
    assert second == (4, float(expected[1, 4]), ())


def test_logprobs_of_many_rows_come_in_slabs():
    logits = torch.randn(600, 9, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = [row % 9 for row in range(600)]
    expected = logits.float().log_softmax(-1)[range(600), tokens]
    assert [logprob.logprob for logprob in logprobs(logits, tokens, [1] * 600)] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": 2**64},
        {"stop": ("a", "")},
        {"logprobs": -1},
        {"prompt_logprobs": 1000},
    ],
)
def test_wrong_settings_are_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)


@pytest.mark.gpu
def test_choosing_does_not_wait_for_the_device():
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))
    kinds = [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.8), Sampling(top_k=7, temperature=0.6)]
    on_device = logits.cuda()
    for samplings in ([kinds[row % 4] for row in range(12)], [kinds[0]] * 12, [kinds[1]] * 12, [kinds[3]] * 12):
        expected = choose_tokens(logits, samplings, list(range(12)), [3] * 12)
        sampler.choose_tokens(on_device, likeliest(on_device), samplings, list(range(12)), [3] * 12)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sampler.choose_tokens(on_device, likeliest(on_device), samplings, list(range(12)), [3] * 12)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.tolist() == expected
