"""Tokenizers: train a byte-level BPE, or take the one of any Hugging Face folder.

A Tokenizer is the files it came from. They are saved byte for byte as they were read, so the hash of `tokenizer.json`
says whether token shards and a model belong together.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that make up a tokenizer; a folder has some of them."""
SMALLEST_VOCABULARY = 257
"""Of a byte-level tokenizer: the 256 bytes and the end of text."""
COMMON_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        files: File name to content; `tokenizer.json` and what stands beside it in a Hugging Face folder.
        origin: Where the files came from, for error messages.

    Raises:
        ValueError: If `tokenizer.json` or a file of settings cannot be read, or no end-of-text token is named.
    """

    def __init__(self, files: Mapping[str, bytes], *, origin: str = "the tokenizer") -> None:
        self._files = dict(files)
        try:
            self._backend = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE].decode("utf-8"))
        except Exception as error:  # the Rust library raises a bare Exception
            raise ValueError(f"{origin}: {TOKENIZER_FILE} cannot be read ({error})") from error
        settings = _read_settings(files, origin)
        self._backend.no_truncation()  # a folder may carry the limits of the model that it was made for
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # a text that spells out a special token is still only text
        self.eos_id = _end_id(self._backend, settings, origin)
        """Id of the token that ends every document."""
        self._alone: dict[int, str] = {}
        """Texts of single tokens, as far as they were asked for."""
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        """One more than the largest id: the rows that an embedding needs."""
        self.settings: dict[str, Any] = settings
        """What `tokenizer_config.json` says, and in older folders `special_tokens_map.json`."""
        self.sha256 = hashlib.sha256(files[TOKENIZER_FILE]).hexdigest()
        """Identity of the tokenizer: the hash of its `tokenizer.json`."""

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[dict[str, bytes]]]:
        """Pickles the files: the backend by itself would forget what was set on it."""
        return Tokenizer, (self._files,)

    def encode(self, text: str, *, special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of one text.

        Args:
            text: Any text.
            special_tokens: Add what the tokenizer puts around a text, such as a token that begins it.
            parse_special: A special token that the text spells out is that token, as in `transformers`; else it is
                text like any other.
        """
        backend = self._parsing if parse_special else self._backend
        return backend.encode(text, add_special_tokens=special_tokens).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        if len(ids) != 1:
            return self._backend.decode(ids, skip_special_tokens=True)
        text = self._alone.get(ids[0])
        if text is None:  # as good as every step of every sequence asks for one token's
            text = self._alone[ids[0]] = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def is_silent(self, id: int) -> bool:
        """Whether a token has no text: it is a special one, or none of the vocabulary's."""
        return id in self._special_ids or id >= self.vocab_size

    def token(self, id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id that is not in it."""
        return self._backend.id_to_token(id)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that stand for no text, such as the end of text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    @cached_property
    def layout(self) -> dict[str, Any]:
        """What `tokenizer.json` says."""
        return json.loads(self._files[TOKENIZER_FILE])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def file(self, name: str) -> str | None:
        """The text of one of the tokenizer's files, if it has it.

        Raises:
            ValueError: If it is not UTF-8.
        """
        try:
            return self._files[name].decode("utf-8") if name in self._files else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: is not UTF-8 text ({error})") from error

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A second backend, which knows special tokens when it sees them: the setting is one of the whole backend."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, which `transformers` can read too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, as GPT-2's is. The same texts give the same tokenizer.

    Args:
        texts: What to learn the merges from.
        vocab_size: Tokens wanted, the 256 bytes and the end-of-text token included; a tiny corpus may give fewer.

    Raises:
        ValueError: If `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size}: a byte-level tokenizer needs {SMALLEST_VOCABULARY} tokens (256 bytes and end of "
            "text)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    return Tokenizer(
        {TOKENIZER_FILE: backend.to_str().encode(), SETTINGS_FILE: json.dumps(settings, indent=2).encode()}
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (raygrow's or Hugging Face's), or of a single `tokenizer.json`.

    Older Hugging Face folders without `tokenizer.json` are converted by `transformers`.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If what is there is no tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such tokenizer; give a folder that holds {TOKENIZER_FILE}")
    if path.is_file():
        return Tokenizer({TOKENIZER_FILE: path.read_bytes()}, origin=str(path))
    if not (path / TOKENIZER_FILE).exists():
        return _convert(path)
    names = [name for name in TOKENIZER_FILES if (path / name).exists()]
    return Tokenizer({name: (path / name).read_bytes() for name in names}, origin=str(path))


def _convert(folder: Path) -> Tokenizer:
    """A slow tokenizer's folder (`vocab.json` and `merges.txt`, sentencepiece), rewritten as a fast one."""
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # every tokenizer class fails in its own way
        raise ValueError(
            f"{folder}: there is no {TOKENIZER_FILE}, and transformers finds no tokenizer in it"
        ) from error
    with TemporaryDirectory() as temporary:
        converted.save_pretrained(temporary)
        if not (Path(temporary) / TOKENIZER_FILE).exists():
            raise ValueError(f"{folder}: its tokenizer has no fast version; save one with transformers' `convert_slow`")
        return load_tokenizer(temporary)


def _read_settings(files: Mapping[str, bytes], origin: str) -> dict[str, Any]:
    """What the files beside `tokenizer.json` say, as `transformers` reads them."""
    settings = _read_object(files, SETTINGS_FILE, origin)
    if "added_tokens_decoder" in settings:
        return settings
    return settings | _read_object(files, SPECIAL_TOKENS_FILE, origin)  # an older folder: the tokens' names are there


def _read_object(files: Mapping[str, bytes], name: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{origin}: {name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: {name} holds a {type(content).__name__} where an object has to be")
    return content


def _end_id(backend: tokenizers.Tokenizer, settings: dict[str, Any], origin: str) -> int:
    """The end-of-text id that the folder's settings name, or else that of a common end-of-text token."""
    named = settings.get("eos_token")
    if isinstance(named, dict):  # older folders describe the token in full
        named = named.get("content", named)
    for token in (named,) if named else COMMON_END_TOKENS:
        end_id = backend.token_to_id(token) if isinstance(token, str) else None
        if end_id is not None:
            return end_id
    raise ValueError(
        f"{origin}: no end-of-text token; name one that its vocabulary holds as `eos_token` in {SETTINGS_FILE}"
        + (f" ({named!r} is not in it)" if named else "")
    )
