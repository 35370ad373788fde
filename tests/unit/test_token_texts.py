"""Texts of single tokens: characters of several tokens are decoded, and the pieces add up to the whole."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tropd_mcore.data.token_texts import token_texts

TEXTS = ("a\U0001f389b", "\U0001d6fc = 1", "\u0928\u092e\u0938\u094d\u0924\u0947 x", "caf\u00e9", "\u4e16\u754c", "a")


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """One token per byte, as in a byte-level vocabulary for rare text."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_of_several_tokens_is_the_text_of_its_last_token(by_bytes, text):
    texts = token_texts(by_bytes, ids_of(by_bytes, text))
    expected = [piece for character in text for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert texts == expected and "\ufffd" not in "".join(texts)


def test_invalid_bytes_do_not_delay_the_text_of_later_tokens(by_bytes):
    emoji, letters = ids_of(by_bytes, "\U0001f389"), ids_of(by_bytes, "ab")
    texts = token_texts(by_bytes, emoji[:2] + letters + emoji)
    assert texts[2:] == ["a", "b", "", "", "", "\U0001f389"] and texts[1].strip("\ufffd") == ""
    stuck = token_texts(by_bytes, emoji[1:2] * 11 + letters)
    assert stuck[-2:] == ["a", "b"] and set("".join(stuck[:-2])) == {"\ufffd"}
    assert any(stuck[:4]), "what can never become a character is shown after four tokens"


def test_the_token_texts_concatenate_to_the_text_of_any_sequence(by_bytes):
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = generator.integers(0, 256, size=23).tolist()
        found, expected = "".join(token_texts(by_bytes, ids)), by_bytes.decode(ids, clean_up_tokenization_spaces=False)
        assert re.sub("\ufffd+", "\ufffd", found) == re.sub("\ufffd+", "\ufffd", expected)


def test_spaces_of_a_sentencepiece_vocabulary_are_kept_and_its_bytes_are_joined():
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {"\u2581two": 257, "\u2581pears": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    emoji = [byte + 1 for byte in "\U0001f389".encode()]
    assert token_texts(fast, [257, 258, *emoji, 258]) == ["two", " pears", "", "", "", "\U0001f389", " pears"]


def test_an_empty_sequence_has_no_token_texts(by_bytes):
    assert token_texts(by_bytes, []) == []
