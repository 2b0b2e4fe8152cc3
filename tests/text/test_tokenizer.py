"""Tokenizers: trained ones, and those of Hugging Face folders."""

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from raygrow.text.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["def grow(model):\n    return model\n", "a stack of blocks, \u00fcber alles \u2014 \U0001f33f\r\n\t x"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_any_text_comes_back_byte_for_byte(tokenizer: Tokenizer) -> None:
    for text in (*TEXTS[:2], "\x00\x7f  \n\n", "\u4f60\u597d, never seen", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS[:2]) == [tokenizer.encode(text) for text in TEXTS[:2]]


def test_training_is_reproducible(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), 300).sha256 == tokenizer.sha256
    assert train_tokenizer(TEXTS[:1], 300).sha256 != tokenizer.sha256


def test_vocabulary_is_as_large_as_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert max(max(ids) for ids in tokenizer.encode_batch(TEXTS)) < 300
    assert train_tokenizer([], 300).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_tokenizer(TEXTS, 256)


def test_a_spelled_out_special_token_is_text(tokenizer: Tokenizer) -> None:
    for same in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = same.encode(f"a{END_OF_TEXT}b")
        assert same.eos_id not in ids
        assert same.decode(ids) == f"a{END_OF_TEXT}b"


def test_saved_tokenizer_is_the_same_and_transformers_reads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.eos_id == tokenizer.eos_id
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert hf.eos_token_id == tokenizer.eos_id
    assert [hf(text)["input_ids"] for text in TEXTS[:2]] == tokenizer.encode_batch(TEXTS[:2])


def test_folder_of_another_model_keeps_its_files_but_not_its_limits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "made")
    backend = Backend.from_file(str(tmp_path / "made" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_tokenizer(source)
    assert loaded.encode_batch(TEXTS[:2]) == tokenizer.encode_batch(TEXTS[:2])
    assert loaded.eos_id == tokenizer.encode("a")[0]
    loaded.save(target)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == {
        file.name: file.read_bytes() for file in target.iterdir()
    }


def test_folder_of_a_slow_tokenizer_is_converted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "made")
    Backend.from_file(str(tmp_path / "made" / "tokenizer.json")).model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == tokenizer.eos_id
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize("lists_added_tokens", [False, True])
def test_older_folders_name_their_special_tokens_in_a_file_of_their_own(
    tokenizer: Tokenizer, tmp_path: Path, lists_added_tokens: bool
) -> None:
    tokenizer.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    settings |= {"added_tokens_decoder": {}} if lists_added_tokens else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>", "lstrip": false}}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.token(loaded.eos_id) == (END_OF_TEXT if lists_added_tokens else "<end>")
    assert loaded.eos_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_errors_name_the_folder_and_what_is_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match="'<end>' is not in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"id": 1}}')
    with pytest.raises(ValueError, match=r"\{'id': 1\} is not in it"):
        load_tokenizer(tmp_path)
    for content, message in {"[]": "holds a list", "{": "cannot be read"}.items():
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{tmp_path}: tokenizer_config\.json {message}"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
