"""What one token adds to a text, as bytes: of a character that is spread over several tokens, each has a part."""

from functools import lru_cache

from raygrow.text.tokenizer import Tokenizer

WORD_MARK = "\u2581"
"""SentencePiece's mark for a space."""


class TokenBytes:
    """The bytes of a tokenizer's tokens, one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.layout.get("added_tokens") or []
        self._added = {token["id"]: token["content"].encode() for token in added}
        decoder = tokenizer.layout.get("decoder") or {}
        kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
        self._byte_level = "ByteLevel" in kinds
        self._marks_words = bool(kinds & {"Metaspace", "Replace"})

    def __call__(self, id: int) -> bytes:
        """A token's bytes; a special token's are those of its name."""
        piece = self._tokenizer.token(id)
        if piece is None:
            return b""
        if id in self._added:
            return self._added[id]
        if self._byte_level:
            alphabet = byte_alphabet()
            return b"".join(alphabet[c] if c in alphabet else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace(WORD_MARK, " ") if self._marks_words else piece).encode()

    def text(self, id: int) -> str:
        r"""A token as text; one that is no whole character is spelled like OpenAI's, `bytes:\xe4`."""
        content = self(id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@lru_cache
def byte_alphabet() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
