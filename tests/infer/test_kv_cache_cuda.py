"""The key-value cache on a device: the driver's own word on memory, and kernels that run while pages come and go.

Shapes: R rows, N heads, H head dim.
"""

import pytest
import torch

from raygrow.infer.kv_cache import KvCache
from raygrow.infer.kv_layout import Layout
from raygrow.kernels.decode_attention import decode_attention
from raygrow.nn.config import ModelConfig
from tests.infer.test_kv_cache import LAYOUTS, Sequences, assert_holds, settle, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# 64 tokens of one Block in 2 MiB
CONFIG = ModelConfig(vocab_size=16, d_model=64, n_heads=32, head_dim=128, d_ff=32, blocks_per_stack=3)


def make_cache(layout: Layout, *, strips: int, dtype: torch.dtype = torch.float32) -> KvCache:
    tensors = 1 if layout == "interleaved" else 3
    return KvCache(
        CONFIG,
        slots=6,
        max_tokens=400,
        dtype=dtype,
        device="cuda",
        budget_bytes=strips * tensors * 2**21,
        layout=layout,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks_and_nothing_is_shared(layout: Layout) -> None:
    cache = make_cache(layout, strips=12 if layout == "block" else 28)
    sequences = Sequences(cache, seed=0)
    for step in range(10_000):
        sequences.operate()
        if step % 50 == 0:
            settle(cache)
            sequences.check()
    assert sequences.refused > 100
    for slot in sequences.running:
        cache.release(slot)
    settle(cache)
    cache.reclaim()
    assert cache.usage.mapped_bytes == cache.usage.used_bytes
    cache.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_counts_as_the_cache_does(layout: Layout, dtype: torch.dtype) -> None:
    torch.zeros(1, device="cuda")
    outside = torch.cuda.mem_get_info()[0]
    cache = make_cache(layout, strips=50, dtype=dtype)

    def taken() -> int:
        return outside - torch.cuda.mem_get_info()[0]

    def use() -> None:
        for slot in range(3):
            assert cache.ensure(slot, 300)
            write(cache, slot, 0, 300, value=slot)
        for slot in range(3):
            assert_holds(cache, slot, 300, value=slot)
            cache.release(slot)

    assert cache.k[0].dtype == dtype
    use()  # and all that torch needs for it besides
    cache.reclaim()
    floor = taken()
    counted = cache.usage.mapped_bytes + cache.usage.spare_bytes
    use()
    assert taken() - floor == cache.usage.mapped_bytes + cache.usage.spare_bytes - counted
    cache.reclaim()
    assert taken() == floor
    cache.close()
    assert taken() < floor


def test_a_graph_is_replayed_while_pages_are_mapped() -> None:
    """Rows without a sequence read the scratch slot; slots that have no memory at all are not touched."""
    cache = make_cache("block", strips=60, dtype=torch.bfloat16)
    slots_R = torch.full((4,), cache.scratch, device="cuda")
    positions_R = torch.zeros(4, dtype=torch.int64, device="cuda")
    q_RNH, k_RKH = (torch.randn(4, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = [100 * slot + CONFIG.n_blocks + 1 for slot in (4, 2)]  # as `write` numbers the tensors
    v_RKH = torch.tensor([*v, 0, 0], device="cuda")[:, None, None].expand_as(k_RKH).to(k_RKH)
    rope = torch.ones(4, 128, device="cuda"), torch.zeros(4, 128, device="cuda")
    inputs = q_RNH, k_RKH, v_RKH.contiguous(), rope, cache.k[1], cache.v[1], slots_R, positions_R
    decode_attention(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RNH, _ = decode_attention(*inputs)
    slots_R[:2] = torch.tensor([4, 2], device="cuda")
    for length in range(1, 400):
        for slot in (4, 2):
            assert cache.ensure(slot, length)
            write(cache, slot, length - 1, length, value=slot)
            cache.map_ahead(slot, length + 16)
        positions_R[:2] = length - 1
        graph.replay()
        torch.cuda.synchronize()
    assert_close(out_RNH[0], v[0])
    assert_close(out_RNH[1], v[1])
    assert not out_RNH[2:].any()
    cache.close()


def assert_close(found: torch.Tensor, value: float) -> None:
    torch.testing.assert_close(found.float(), torch.full_like(found, value).float(), rtol=1e-2, atol=0)
