"""Whether two folders hold the same weights, told by samples of them."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from raygrow.weights.folder import ModelFolder
from raygrow.weights.rules import take
from raygrow.weights.shapes import parameter_shapes

SAMPLES = 16
"""Of every matrix. Training changes nearly all of a matrix, so a few entries tell."""


def fingerprint(folder: ModelFolder) -> str:
    """A hash of the shapes of all parameters and of entries spread over every matrix, an expert's being one.

    It is that of the model, not of its files: names and number of files, the format and conversion between float32 and
    bfloat16 do not change it. Some pages of the files are read, not all: a single entry that is damaged may go unseen.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(parameter_shapes(folder.config).items()):
        digest.update(f"{name} {tuple(shape)}\n".encode())
        for matrix in _matrices(folder, name, shape):
            last = matrix.numel() - 1
            places = [last * place // (SAMPLES - 1) for place in range(SAMPLES)]
            digest.update(matrix.flatten()[places].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _matrices(folder: ModelFolder, name: str, shape: torch.Size) -> Iterator[Tensor]:
    if ".experts." not in name:
        yield folder.tensors[name]
        return
    for expert in range(shape[0]):
        yield take(folder.tensors, name, expert)  # all at once would have to be read and put together
