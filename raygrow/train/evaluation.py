"""Validation during training: always the same sequences, split over the workers."""

from pathlib import Path

from torch import Tensor

from raygrow.data.sampler import fixed_batch
from raygrow.data.shards import open_tokens
from raygrow.nn.rack import Rack
from raygrow.nn.score import bits_per_byte, sum_loss
from raygrow.train.batches import Batch, to_device, worker_rows
from raygrow.train.parallel import reshard
from raygrow.train.worker import Worker


class Validation:
    """The validation sequences of a phase, cut in batches that one forward pass can take.

    Args:
        data: Prepared data folder.
        sequences: How many sequences, from the start of the validation split; 0 takes all.
        seq_len: Tokens in each.
        batch_size: Sequences per forward pass of one worker.
    """

    def __init__(self, data: Path, *, sequences: int, seq_len: int, batch_size: int) -> None:
        tokens = open_tokens(data, "validation", verify=False)
        self.bytes_per_token = tokens.bytes_per_token
        self._batch = fixed_batch(tokens, sequences, seq_len)
        self._batch_size = batch_size

    def parts(self, worker: Worker) -> list[Batch]:
        """This worker's batches."""
        rows = worker_rows(self._batch, rank=worker.rank, workers=worker.count)
        return list(zip(*(part.split(self._batch_size) for part in rows), strict=True))

    def probe(self, sequences: int, tokens: int) -> Tensor:
        """The first tokens of the first sequences, the same for every worker."""
        return self._batch[0][:sequences, :tokens]

    def loss(self, model: Rack, worker: Worker) -> float:
        """Mean loss in nats per token; every worker gets the same."""
        total, count = worker.sum(*sum_loss(model, (to_device(part, worker.device) for part in self.parts(worker))))
        reshard(model)
        return total / count

    def scores(self, model: Rack, worker: Worker) -> dict[str, float]:
        """The evaluation's metrics, by name."""
        loss = self.loss(model, worker)
        return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, bytes_per_token=self.bytes_per_token)}
