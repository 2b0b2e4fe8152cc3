"""Bytes of single tokens, in the three ways that tokenizers spell them."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from raygrow.text.token_bytes import TokenBytes, byte_alphabet
from raygrow.text.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer, train_tokenizer

TEXT = "a stack, \u00fcber \u4f60\u597d \U0001f33f\n"


def test_bytes_of_tokens_join_to_the_text() -> None:
    tokenizer = train_tokenizer([TEXT], 270)
    bytes_of = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(bytes_of, ids)) == TEXT.encode()
    assert bytes_of(tokenizer.eos_id) == END_OF_TEXT.encode()
    assert bytes_of(10**6) == b""
    backend = Backend.from_str(tokenizer.file(TOKENIZER_FILE) or "")
    backend.add_special_tokens(["<\u00fcber>"])  # not in the alphabet of bytes, though it has a letter of it
    added = Tokenizer({TOKENIZER_FILE: backend.to_str().encode()})
    assert TokenBytes(added)(added.special_tokens["<\u00fcber>"]) == "<\u00fcber>".encode()
    assert sorted(byte_alphabet().values()) == [bytes([byte]) for byte in range(256)]


def test_tokens_with_the_same_text_are_told_apart() -> None:
    tokenizer = train_tokenizer([], 257)
    texts = [TokenBytes(tokenizer).text(id) for id in range(257)]
    assert len(set(texts)) == 257
    assert "bytes:\\xe4" in texts


def test_sentencepiece_spells_spaces_and_bytes() -> None:
    backend = Backend(models.BPE({"</s>": 0, "\u2581ab": 1, "<0xE4>": 2}, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    bytes_of = TokenBytes(Tokenizer({TOKENIZER_FILE: backend.to_str().encode()}))
    assert [bytes_of(id) for id in range(3)] == [b"</s>", b" ab", b"\xe4"]
