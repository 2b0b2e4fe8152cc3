"""Text as tokens come: whole characters, all spaces, nothing beyond a stop string."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from raygrow.text.decoding import IncrementalDecoder, StopFinder
from raygrow.text.tokenizer import TOKENIZER_FILE, Tokenizer, train_tokenizer

TEXTS = [
    "a stack of blocks, \u00fcber alles \u2014 \U0001f33f\U0001f468\u200d\U0001f469\u200d\U0001f467\r\n\t x",
    "\u4f60\u597d  two  spaces ",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Like Llama 2's: words begin with a mark for their space, unknown characters are bytes, `<s>` begins a text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz,",
    ]
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer({TOKENIZER_FILE: backend.to_str().encode()})


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_pieces_join_to_the_whole_text_however_the_tokens_come(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    draw = random.Random(0)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        for _ in range(50):
            prompt = draw.randint(0, len(ids))
            decoder, given, at = IncrementalDecoder(tokenizer, ids[:prompt]), "", prompt
            while at < len(ids):
                step = draw.randint(1, 3)
                piece = decoder.push(ids[at : at + step])
                assert "\ufffd" not in piece
                given, at = given + piece, at + step
            begun = [tokenizer.decode(ids[: max(0, prompt - cut)]).rstrip("\ufffd") for cut in range(4)]
            assert given + decoder.flush() == text[max(len(part) for part in begun if text.startswith(part)) :]


def test_bytes_that_are_no_character_come_out_as_decoded_and_do_not_wait_for_ever(byte_level: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(byte_level.vocab_size) for _ in range(40)]
        decoder = IncrementalDecoder(byte_level)
        assert "".join(decoder.push([token]) for token in ids) + decoder.flush() == byte_level.decode(ids)
    parts = [token for token in range(byte_level.vocab_size) if byte_level.decode([token]) == "\ufffd"]
    for _ in range(20):
        ids = draw.choices(parts, k=300)
        decoder = IncrementalDecoder(byte_level)
        assert "".join(decoder.push([token]) for token in ids) + decoder.flush() == byte_level.decode(ids)
    continuation = byte_level.encode("\u4f60")[1:2]
    decoder = IncrementalDecoder(byte_level)
    assert len("".join(decoder.push(continuation) for _ in range(100))) > 90


def test_space_after_special_tokens_is_kept(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("ab cd")
    space = ids.index(sentencepiece.encode("a b")[2], 1)
    end = [sentencepiece.eos_id]
    decoder = IncrementalDecoder(sentencepiece, [*ids[:space], *end * 20])
    assert decoder.push(ids[space:]) == " cd"
    decoder = IncrementalDecoder(sentencepiece)
    pieces = [decoder.push([token]) for token in [*ids[:space], *end, *ids[space:]]]
    assert "".join(pieces) == "ab cd"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_tokens_that_end_no_text_are_not_decoded_again_and_again(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    longest, decode = [0], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: longest.append(len(ids)) or decode(self, ids))
    byte, space = tokenizer.encode("\u4f60")[-1], tokenizer.encode("a b")[1]
    for token in (tokenizer.eos_id, tokenizer.vocab_size + 5, byte, space):
        decoder = IncrementalDecoder(tokenizer, tokenizer.encode("ab cd"))
        for _ in range(200):
            decoder.push([token])
        assert decoder.push(tokenizer.encode("ab cd")).endswith("ab cd")
    assert max(longest) < 50


def test_a_stop_string_cuts_the_text_however_it_is_split() -> None:
    draw = random.Random(0)
    stops = ("abcd", "c", "bb", "\n\n")
    for _ in range(500):
        text = "".join(draw.choice("aabbd\n") for _ in range(30)) + draw.choice(["c", "abcd", ""])
        ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        expected = text[: min(ends)[1]] if ends else text
        finder, given, at, found = StopFinder(stops), "", 0, False
        while at < len(text) and not found:
            step = draw.randint(1, 5)
            piece, found = finder.push(text[at : at + step])
            given, at = given + piece, at + step
        assert found == bool(ends)
        assert given + ("" if found else finder.flush()) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    finder = StopFinder(("<end>",))
    assert finder.push("text <e") == ("text ", False)
    assert finder.push("ggs> <") == ("<eggs> ", False)
    assert finder.push("end> more") == ("", True)
    assert StopFinder(()).push("all") == ("all", False)
