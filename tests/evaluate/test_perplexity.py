import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from raygrow.data.shards import open_tokens
from raygrow.evaluate import perplexity
from raygrow.evaluate.perplexity import evaluate_model
from raygrow.evaluate.unigram import token_counts, unigram_loss
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import train_tokenizer
from raygrow.weights.folder import write_folder


def test_the_loss_is_that_of_plain_cross_entropy(model_folder: Path, data: Path, model: Rack):
    seen = []
    record = evaluate_model(
        model_folder,
        data,
        sequences=5,
        seq_len=16,
        batch_size=2,
        device="cpu",
        progress=lambda *done: seen.append(done[:2]),
    )
    tokens = open_tokens(data, "validation")
    text = torch.from_numpy(tokens.window(0, 81).astype("int64"))
    with torch.no_grad():
        logits_BTV = model(text[:80].view(5, 16))
    expected = F.cross_entropy(logits_BTV.flatten(0, 1).double(), text[1:]).item()
    assert record.loss == pytest.approx(expected, rel=1e-5)
    assert record.perplexity == pytest.approx(math.exp(record.loss))
    assert record.bits_per_byte == pytest.approx(expected / math.log(2) / tokens.bytes_per_token, rel=1e-5)
    assert (record.sequences, record.seq_len, record.tokens) == (5, 16, 80)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_record_says_what_was_measured(model_folder: Path, data: Path):
    first, again = (json.loads(evaluate_model(model_folder, data, device="cpu").to_json()) for _ in range(2))
    assert first["loss"] == again["loss"]
    assert first["model_sha256"] == again["model_sha256"]
    assert first["seq_len"] == 48  # the model's own
    assert (first["device"], first["dtype"]) == ("cpu", "float32")
    assert first["versions"]["torch"]
    with (model_folder / "config.json").open("a") as file:
        file.write("\n")
    assert evaluate_model(model_folder, data, device="cpu").model_sha256 != first["model_sha256"]


def test_a_model_of_long_sequences_is_scored_on_shorter_ones(
    model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(perplexity, "LONGEST", 32)
    assert evaluate_model(model_folder, data, sequences=2).seq_len == 32


def test_a_model_without_numbers_is_named(config: ModelConfig, data: Path, tmp_path: Path):
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    rack.state_dict()["blocks.1.attention.o.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "broken", config, rack.named_parameters())
    with pytest.raises(ValueError, match="broken: the loss of this model is nan"):
        evaluate_model(tmp_path / "broken", data, device="cpu")


def test_a_sparsity_of_0_is_none(model_folder: Path, data: Path):
    dense = evaluate_model(model_folder, data, sparsity=0.0, device="cpu")
    assert (dense.sparsity, dense.policy) == (None, "all")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sequences": -1}, "sequences=-1: must be at least 1, or 0 for all"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"seq_len": 0}, "seq_len=0: this model takes 1 to 48 tokens"),
        ({"seq_len": 49}, "seq_len=49: this model takes 1 to 48 tokens"),
    ],
)
def test_numbers_out_of_range_are_named(model_folder: Path, data: Path, wrong: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate_model(model_folder, data, device="cpu", **wrong)  # type: ignore[arg-type]


def test_too_little_memory_says_what_to_lower(model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("raygrow.evaluate.perplexity.sum_loss", full)
    with pytest.raises(ValueError, match=r"^seq_len=48, batch_size=8: cpu has too little memory for .*model"):
        evaluate_model(model_folder, data, device="cpu")


def test_another_tokenizer_is_refused(model_folder: Path, data: Path):
    train_tokenizer(["something else entirely"], 270).save(model_folder)
    with pytest.raises(ValueError, match=r"the tokenizer of .*model is not the one"):
        evaluate_model(model_folder, data, device="cpu")


def test_data_with_more_tokens_than_the_model_is_refused(model_folder: Path, data: Path):
    (model_folder / "tokenizer.json").unlink()
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 999}))
    with pytest.raises(ValueError, match="prepared with a tokenizer of 999"):
        evaluate_model(model_folder, data, device="cpu")


def test_unigram_loss_is_the_cross_entropy_of_smoothed_frequencies(data: Path):
    train, validation = (open_tokens(data, split) for split in ("train", "validation"))
    vocab_size = train.manifest.vocab_size
    seen = train.window(0, train.n_tokens).tolist()
    held_out = validation.window(0, validation.n_tokens).tolist()
    share = [(seen.count(token) + 1) / (len(seen) + vocab_size) for token in range(vocab_size)]
    expected = -sum(math.log(share[token]) for token in held_out) / len(held_out)
    assert unigram_loss(data) == pytest.approx(expected)
    assert token_counts(data, "train").sum() == train.n_tokens
