"""Safetensors folders: what is written is what safetensors itself reads; what is broken is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from raygrow.weights.safetensors_io import INDEX_FILE, SafetensorsFolder, write_safetensors

TENSORS = {
    "odd.bf16": torch.randn(3).bfloat16(),  # three bf16 leave the next tensor unaligned
    "matrix": torch.randn(5, 7),
    "double": torch.randn(2, 1, 2).double(),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3.5),
    "ids": torch.arange(6),
    "turned": torch.randn(4, 6).T,
}


def write(folder, **options):
    folder.mkdir(exist_ok=True)
    return write_safetensors(folder, TENSORS.items(), names=TENSORS, **options)


def test_one_file_reads_back_bit_equal_here_and_in_safetensors(tmp_path):
    assert write(tmp_path)["odd.bf16"] == torch.bfloat16
    ours, theirs = SafetensorsFolder(tmp_path), load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(TENSORS)
    assert ours.shapes() == {name: tensor.shape for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert ours[name].dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)


def test_many_files_get_an_index(tmp_path):
    write(tmp_path, max_shard_bytes=150)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)), INDEX_FILE]
    folder = SafetensorsFolder(tmp_path)
    assert all(torch.equal(folder[name], tensor) for name, tensor in TENSORS.items())


def test_a_folder_without_safetensors_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, max_shard_bytes=150)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        SafetensorsFolder(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        SafetensorsFolder(tmp_path)


def test_a_dtype_that_raygrow_does_not_know_is_named(tmp_path):
    save_file({"small": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'small' is stored as F8_E4M3"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    write(tmp_path, max_shard_bytes=150)
    index = tmp_path / INDEX_FILE
    index.write_text(index.read_text().replace('"scalar"', '"scalars"'))
    with pytest.raises(ValueError, match="tensor 'scalars' is missing"):
        SafetensorsFolder(tmp_path)
