"""A fingerprint is that of the weights, however they are stored."""

from pathlib import Path

import pytest
import torch

from raygrow.weights.fingerprint import fingerprint
from raygrow.weights.folder import open_folder, write_folder
from tests.growth.racks import random_rack, tiny

KINDS = {
    "dense": {"n_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "mixtral": {"n_experts": 4, "top_k": 2, "d_expert": 20},
}


def stored(folder: Path, model, **settings) -> str:
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return fingerprint(open_folder(write_folder(folder, model.config, tensors, **settings)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_in_another_format_in_other_files_and_in_bf16(kind: str, tmp_path: Path) -> None:
    model = random_rack(tiny(**KINDS[kind]), torch.float32)
    expected = stored(tmp_path / "own", model)
    assert stored(tmp_path / "hf", model, format="hf") == expected
    assert stored(tmp_path / "pieces", model, max_shard_bytes=5000) == expected
    assert stored(tmp_path / "bf16", model, dtype=torch.bfloat16) == expected
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    assert fingerprint(open_folder(tmp_path / "elsewhere")) == expected


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_another_when_any_matrix_is(kind: str, tmp_path: Path) -> None:
    model = random_rack(tiny(**KINDS[kind]), torch.float32)
    found = {stored(tmp_path / "model", model)}
    for index, parameter in enumerate(model.parameters()):
        part = parameter[-1] if parameter.dim() == 3 else parameter  # the last expert alone
        part.mul_(1.02)
        found.add(stored(tmp_path / str(index), model))
    assert len(found) == 1 + len(list(model.parameters()))


@torch.no_grad()
def test_it_is_another_when_only_the_end_of_a_matrix_is(tmp_path: Path) -> None:
    model = random_rack(tiny(), torch.float32)
    before = stored(tmp_path / "before", model)
    model.embedding.weight[-1].mul_(1.02)
    assert stored(tmp_path / "after", model) != before


def test_it_is_another_of_another_shape(tmp_path: Path) -> None:
    found = {stored(tmp_path / str(d_ff), random_rack(tiny(d_ff=d_ff), torch.float32)) for d_ff in (20, 24)}
    assert len(found) == 2
