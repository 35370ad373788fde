"""Text to ids: the template is applied once, by the tokenizer's own rules, and ids decode to the same text."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.data.chat import Renderer
from tropd_mcore.errors import DataError

CHAT = [{"role": "system", "content": "add"}, {"role": "user", "content": "two apples\nand one"}]
FOLDER_TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tokenizer")
    FOLDER_TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def renderer(folder) -> Renderer:
    return Renderer(folder)


def test_a_chat_is_rendered_by_its_template_up_to_the_start_of_the_answer(renderer):
    text = "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\ntwo apples\nand one<|im_end|>\n<|im_start|>assistant\n"
    ids = renderer.prompt_ids(CHAT)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.tolist() == FOLDER_TOKENIZER.encode(text, add_special_tokens=False)
    assert (
        ids.tolist()
        == FOLDER_TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    assert (ids == FOLDER_TOKENIZER.convert_tokens_to_ids("<|im_start|>")).sum() == 3


@given(st.text(min_size=1, max_size=40))
def test_encoding_and_decoding_a_text_gives_it_back_unchanged(renderer, text):
    assert renderer.decode(renderer.prompt_ids(text)) == text


def test_a_plain_prompt_gets_no_special_tokens(renderer):
    ids = renderer.prompt_ids("seven pears")
    assert not set(ids.tolist()) & renderer.special_ids
    assert renderer.decode(ids) == "seven pears"


def test_decoding_drops_special_tokens_and_token_texts_keep_them(renderer):
    ids = renderer.prompt_ids(CHAT)
    assert "<|" not in renderer.decode(ids) and "two apples\nand one" in renderer.decode(ids)
    texts = renderer.token_texts(ids)
    assert len(texts) == len(ids) and texts[0] == "<|im_start|>" and "".join(texts).endswith("assistant\n")


def test_the_end_of_a_response_comes_from_tokenizer_and_generation_config(folder, tmp_path):
    FOLDER_TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert Renderer(folder).eos_ids == (2,)
    assert Renderer(tmp_path).eos_ids == (0, 2)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_generation_config_is_read_or_refused(tmp_path, content):
    FOLDER_TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    if content == "{":
        with pytest.raises(DataError, match=r"generation_config\.json: cannot be read as JSON"):
            Renderer(tmp_path)
    else:
        assert Renderer(tmp_path).eos_ids == (2,)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a tokenizer there"):
        Renderer(tmp_path)


def test_a_tokenizer_without_a_chat_template_accepts_only_texts(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer(tmp_path)
    assert len(renderer.prompt_ids("one")) > 0
    with pytest.raises(DataError, match="no chat template; give `prompt`"):
        renderer.prompt_ids(CHAT)


def test_a_chat_that_the_template_rejects_is_an_error_with_the_templates_message(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the chat template refuses the messages: roles must alternate"):
        Renderer(tmp_path).prompt_ids(CHAT)


def test_an_empty_prompt_is_refused(renderer):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        renderer.prompt_ids("")


def test_a_token_can_be_named_by_its_vocabulary_entry_or_by_a_text_that_is_one_token(renderer):
    vocabulary = FOLDER_TOKENIZER.get_vocab()
    assert renderer.token_id("<|im_end|>") == vocabulary["<|im_end|>"]
    assert all(renderer.token_id(entry) == index for entry, index in vocabulary.items())
    ids = FOLDER_TOKENIZER.encode(" a", add_special_tokens=False)
    assert renderer.token_id(" a") == (ids[0] if len(ids) == 1 else None)
    assert renderer.token_id("no token at all") is None
