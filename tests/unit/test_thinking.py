"""A response has an answer outside its thinking, and none if it is unfinished: written cases and a slow oracle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import tiny_tokenizer
from tests.unit.test_packing import make_rollout
from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.thinking import answer_part, outside_of_blocks, read_answer
from tropd_mcore.data.verify import is_correct

STRICT = VerifierConfig(kind="exact_match")
LENIENT = VerifierConfig(kind="exact_match", unfinished="judge")


@pytest.mark.parametrize(
    ("response", "opened", "said", "is_open"),
    [
        ("#### 5", False, "#### 5", False),
        ("<think>#### 4</think>#### 5", False, "#### 5", False),
        ("a<think>b</think>c<think>d</think>e", False, "ace", False),
        ("#### 4", True, "#### 4", True),
        ("#### 4</think>#### 5", True, "#### 5", False),
        ("#### 4</think>#### 5", False, "#### 5", False),
        ("a</think>b</think>c", False, "c", False),
        ("#### 5<think>#### 6", False, "#### 5#### 6", True),
        ("<think>a<think>b</think>c", False, "c", False),
        ("a<think>b</think>c<think>d", True, "cd", True),
        ("", True, "", True),
        ("<think></think>", False, "", False),
    ],
)
def test_the_answer_part_is_the_text_outside_closed_thinking_blocks(response, opened, said, is_open):
    assert outside_of_blocks(response, "<think>", "</think>", opened=opened) == (said, is_open)


@given(st.lists(st.sampled_from(["a", "b", "<think>", "</think>"]), max_size=12), st.booleans())
def test_the_text_outside_thinking_blocks_equals_a_walk_over_the_pieces(pieces, opened):
    said: list[str] = []
    block: list[str] | None = [] if opened else None
    for piece in pieces:
        if block is None and piece == "<think>":
            block = []
        elif piece == "</think>":
            said, block = ([], None) if block is None else (said, None)
        elif block is not None:
            block.append(piece)
        else:
            said.append(piece)
    expected = "".join([*said, *(block or [])]), block is not None
    assert outside_of_blocks("".join(pieces), "<think>", "</think>", opened=opened) == expected


@pytest.mark.parametrize(
    ("response", "finished", "opened", "strict", "lenient"),
    [
        ("#### 5", True, False, True, True),
        ("#### 5", False, False, False, True),
        ("#### 5", True, True, False, True),
        ("#### 4</think>#### 5", True, True, True, True),
        ("#### 4</think>#### 5", False, True, False, True),
        ("<think>#### 5", True, False, False, True),
        ("<think>#### 5</think>so", True, False, False, False),
        ("#### 5<think>#### 6</think>", True, False, True, True),
    ],
)
def test_an_unfinished_response_has_no_answer_unless_configured(response, finished, opened, strict, lenient):
    assert is_correct(STRICT, response, "5", finished=finished, opened=opened) is strict
    assert is_correct(LENIENT, response, "5", finished=finished, opened=opened) is lenient


def test_without_thinking_blocks_only_a_finished_response_has_an_answer():
    verifier = VerifierConfig(kind="exact_match", thinking=None)
    assert answer_part(verifier, "<think>#### 5", finished=True, opened=True) == "<think>#### 5"
    assert answer_part(verifier, "#### 5", finished=False, opened=False) is None


def test_the_markers_of_a_thinking_block_are_configurable():
    verifier = VerifierConfig(kind="exact_match", thinking=("[THINK]", "[/THINK]"))
    assert answer_part(verifier, "[THINK]a[/THINK]b<think>c", finished=True, opened=False) == "b<think>c"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("prompt", "prefix", "response", "reason", "said"),
    [
        ("two?", "", "three", "stop", "three"),
        ("two?", "", "three", "length", None),
        ("two?<think>\n", "", "three", "stop", None),
        ("two?<think>\n", "", "one</think>three", "stop", "three"),
        ("two?<think>\n\n</think>\n\n", "", "three", "stop", "three"),
        ("Think between <think> and </think>.", "", "three", "stop", "three"),
        ("two?", "<think>one", "</think>three", "stop", "three"),
        ("two?", "<think>one", "two", "stop", None),
        ("two?<think>", "one</think>", "three", "stop", "three"),
        ("two?", "one ", "three", "stop", "one three"),
    ],
)
def test_prompt_prefix_and_finish_reason_decide_which_text_is_the_answer(
    tmp_path: Path, special, prompt, prefix, response, reason, said
):
    """Whether the texts of a block are special tokens, which a response is decoded without, or not."""
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer(tmp_path)
    assert ("<think>" in renderer.decode(renderer.prompt_ids("<think>x"))) is not special
    end = [tokenizer.eos_token_id] if reason == "stop" else []

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    rollout = replace(
        make_rollout(0, 3, 0, 4, False),
        prompt_ids=ids(prompt),
        prefix_ids=ids(prefix),
        response_ids=np.array([*ids(response), *end], dtype=np.int32),
        finish_reason=reason,
    )
    assert read_answer(STRICT, renderer, rollout) == said
