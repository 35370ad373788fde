"""Chats become text without loss: content that a template hides is refused. Date and BOS are as specified."""

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.config.schema import DataConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.chat_template import Chat
from tropd_mcore.data.prompts import load_prompts
from tropd_mcore.errors import DataError

# Templates like those of the families, reduced to their differences.
QWEN = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'system' or message.role == 'tool' %}"
    "<{{ message.role }}>{{ message.content }}"
    "{%- elif message.role == 'assistant' %}<assistant>{{ message.content.split('</think>')[-1] }}"
    "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<assistant>"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA_3_1 = (
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{% endif %}"
    "Today: {{ date_string }}{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{% endfor %}"
)
LLAMA_3_2 = LLAMA_3_1.replace("'26 Jul 2024'", 'strftime_now("%d %b %Y")')
DEEPSEEK = (
    "{%- set ns = namespace(system='') %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.system = message.content %}{% endif %}{% endfor %}{{ ns.system }}"
    "{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}{% endif %}{% endfor %}"
    "<assistant><think>\n"
)
USER = {"role": "user", "content": "How many pears are two and one?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def renderer_of(folder: Path, template: Any, *, before: str | None = None, after: str | None = None) -> Renderer:
    """A tokenizer that adds `before` and `after` around a text by itself."""
    tokenizer = tiny_tokenizer()
    if before or after:
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after) if token]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([before] if before else []), "$A", *([after] if after else [])], special_tokens=ids
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Renderer(folder)


def text_of(renderer: Renderer, chat: Chat) -> str:
    return "".join(renderer.token_texts(renderer.prompt_ids(chat)))


# ---- texts ----


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, None), ("<|endoftext|>", None), ("<|endoftext|>", "<|im_end|>"), (None, "<|im_end|>")],
)
def test_a_text_prompt_starts_with_the_tokenizers_prefix_once_and_gets_no_suffix(tmp_path, before, after):
    renderer = renderer_of(tmp_path, None, before=before, after=after)
    plain = tiny_tokenizer().encode("two pears", add_special_tokens=False)
    first = [tiny_tokenizer().convert_tokens_to_ids(before)] if before else []
    assert renderer.prompt_ids("two pears").tolist() == [*first, *plain]
    # A text that already starts with it gets it only once.
    assert renderer.prompt_ids(f"{before or ''}two pears").tolist() == [*first, *plain]


def test_an_empty_text_is_refused_even_if_the_tokenizer_adds_a_prefix(tmp_path):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        renderer_of(tmp_path, None, before="<|endoftext|>").prompt_ids("")


@pytest.mark.parametrize("template", [QWEN, "<|endoftext|>" + QWEN])
def test_a_chat_has_only_the_special_tokens_of_its_template(tmp_path, template):
    renderer = renderer_of(tmp_path, template, before="<|endoftext|>", after="<|im_end|>")
    ids = renderer.prompt_ids([USER])
    expected = renderer.tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.tolist() == expected
    assert np.isin(ids, sorted(renderer.special_ids)).sum() == template.count("<|endoftext|>")


# ---- tools and variables ----


def test_tools_and_variables_reach_the_template(tmp_path):
    renderer = renderer_of(tmp_path, QWEN)
    start = f"<user>{USER['content']}<assistant>"
    assert text_of(renderer, Chat([USER])) == start
    assert text_of(renderer, Chat([USER], variables={"enable_thinking": True})) == start
    assert text_of(renderer, Chat([USER], variables={"enable_thinking": False})) == start + "<think>\n\n</think>\n\n"
    assert text_of(renderer, Chat([USER], TOOLS)) == f"<tools>{json.dumps(TOOLS[0])}</tools>{start}"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"enable_thnking": False}, "never reads 'enable_thnking'; did you mean 'enable_thinking'?"),
        ({"reasoning": 1}, "never reads 'reasoning'; it reads enable_thinking"),
        ({"tools": TOOLS}, "'tools' cannot be set there; it is a key of the line"),
        ({"messages": []}, "'messages' cannot be set there"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' cannot be set there"),
        ({"continue_final_message": True}, "never reads 'continue_final_message'"),
        ({"tokenize": True}, "never reads 'tokenize'"),
    ],
)
def test_a_variable_that_the_template_never_reads_is_refused(tmp_path, variables, words):
    with pytest.raises(DataError) as caught:
        renderer_of(tmp_path, QWEN).prompt_ids(Chat([USER], variables=variables))
    assert str(caught.value).startswith("`chat_template_kwargs`: ") and words in str(caught.value)


# As Llama 3.1 does: a variable that every branch sets, one that one branch sets, one that the caller may set.
SETS = (
    "{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}"
    "{%- if not tools is defined %}{% set tools = none %}{% endif %}"
    "{%- if messages[0].role == 'system' %}{% set system_message = messages[0].content %}"
    "{% set messages = messages[1:] %}{%- else %}{% set system_message = '' %}{% endif %}"
    "{{ system_message }}{{ tools }}{% set greeting = greeting | default('') %}{{ greeting }}"
    "{%- for message in messages %}{% set content = message.content %}{{ content }}{% endfor %}"
)


@pytest.mark.parametrize("name", ["system_message", "content", "message"])
def test_a_variable_that_the_template_sets_before_it_reads_it_is_refused(tmp_path, name):
    renderer = renderer_of(tmp_path, SETS)
    with pytest.raises(DataError, match=f"never reads '{name}'; it reads custom_tools, greeting$"):
        renderer.prompt_ids(Chat([USER], variables={name: "Be brief."}))
    assert text_of(renderer, Chat([USER], TOOLS, {"greeting": "Hello. "})).endswith(f"Hello. {USER['content']}")
    assert "[1]" in text_of(renderer, Chat([USER], variables={"custom_tools": [1]}))


def test_tools_that_the_template_does_not_show_are_refused(tmp_path):
    with pytest.raises(DataError, match="the chat template shows no tools"):
        renderer_of(tmp_path, LLAMA_3_1).prompt_ids(Chat([USER], TOOLS))


def test_the_template_for_tools_is_used_if_there_are_tools(tmp_path):
    renderer = renderer_of(tmp_path, {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}" + QWEN})
    assert text_of(renderer, Chat([USER])) == USER["content"]
    assert text_of(renderer, Chat([USER], TOOLS, {"enable_thinking": False})).endswith("</think>\n\n")
    with pytest.raises(DataError, match="never reads 'enable_thinking'; it reads no variable"):
        renderer.prompt_ids(Chat([USER], variables={"enable_thinking": False}))


def test_a_template_with_generation_blocks_and_loop_controls_is_accepted(tmp_path):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{{ x }}{% endgeneration %}{% break %}{% endfor %}"
    assert text_of(renderer_of(tmp_path, template), Chat([USER], variables={"x": 5})) == USER["content"] + "5"


# ---- messages ----


@pytest.mark.parametrize(
    ("template", "messages", "number"),
    [
        (QWEN, [USER | {"role": "human"}], 1),
        (QWEN, [{"role": "developer", "content": "add"}, USER], 1),
        (DEEPSEEK, [{"role": "system", "content": "add"}, {"role": "system", "content": "count"}, USER], 1),
        (DEEPSEEK, [USER, {"role": "assistant", "content": "one"}, USER], 2),
    ],
)
def test_a_message_that_the_template_does_not_show_is_refused_by_number(tmp_path, template, messages, number):
    with pytest.raises(DataError, match=rf"^message {number} \(role '\w+'\) is not shown by the chat template"):
        renderer_of(tmp_path, template).prompt_ids(messages)


def test_a_lost_message_is_detected_even_if_its_text_also_occurs_elsewhere(tmp_path):
    lost = {"role": "human", "content": "user"}
    with pytest.raises(DataError, match="message 1 .role 'human'. is not shown"):
        renderer_of(tmp_path, QWEN).prompt_ids([lost, USER])


def test_a_message_that_the_template_shows_in_part_or_in_another_form_is_accepted(tmp_path):
    answer = {"role": "assistant", "content": "<think>two and one</think>three"}
    text = text_of(renderer_of(tmp_path / "qwen", QWEN), Chat([USER, answer, USER]))
    assert "three" in text and "think" not in text
    quoted = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    result = {"role": "tool", "content": 'a "quoted"\nanswer of a tool', "tool_call_id": "1"}
    assert "\\n" in text_of(renderer_of(tmp_path / "quoted", quoted), Chat([USER, result]))


def test_a_key_of_a_message_that_the_template_never_reads_is_refused(tmp_path):
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    chat = [USER, calls, {"role": "tool", "content": "3", "tool_call_id": "1"}]
    assert '"name": "add"' in text_of(renderer_of(tmp_path / "qwen", QWEN), Chat(chat))
    with pytest.raises(DataError, match="^message 2 has `tool_calls`, which the chat template never reads"):
        renderer_of(tmp_path / "llama", LLAMA_3_1).prompt_ids(chat)
    whole = renderer_of(tmp_path / "whole", "{{ messages | tojson }}")
    assert '"add"' in text_of(whole, Chat(chat)), "a template that prints messages as they are reads every key"


# ---- dates ----


@pytest.mark.parametrize(
    ("template", "day", "printed"),
    [
        (LLAMA_3_2, date(2024, 2, 29), "29 Feb 2024"),
        (LLAMA_3_1, date(2024, 2, 29), "26 Jul 2024"),
        ("{{ strftime_now('%Y-%m-%d %H:%M') }}{{ messages[0].content }}", date(2024, 2, 29), "2024-02-29 00:00"),
    ],
)
def test_a_template_gets_the_given_date_and_not_that_of_the_clock(tmp_path, template, day, printed):
    renderer = renderer_of(tmp_path, template)
    assert printed in text_of(renderer, Chat([USER], today=day))
    assert renderer.template.prints_date(Chat([USER])) is ("strftime_now" in template)
    assert not renderer.template.prints_date(Chat([USER], variables={"date_string": "today"})) or "%H" in template


def written(folder: Path, *messages: list[dict[str, Any]], **line: Any) -> Path:
    path = folder / "prompts.jsonl"
    lines = [{"id": f"p{index}", "messages": chat} | line for index, chat in enumerate(messages)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_configured_date_overrides_the_date_of_the_run_and_reaches_date_string(tmp_path, caplog):
    path, day = written(tmp_path, [USER]), date(2024, 2, 29)
    for name, template, printed in (("3.2", LLAMA_3_2, "05 May 2021"), ("3.1", LLAMA_3_1, "05 May 2021")):
        renderer = renderer_of(tmp_path / name, template)
        data = DataConfig(prompts=path, template_date=date(2021, 5, 5))
        found = load_prompts(data, renderer, seed=1, today=day)
        assert printed in "".join(renderer.token_texts(found.prompts[0].token_ids))
        assert found.printed_date == date(2021, 5, 5) and not caplog.records


def test_a_date_that_is_not_configured_is_reported_once_and_one_that_no_template_prints_is_refused(tmp_path, caplog):
    path, day = written(tmp_path, [USER], [USER]), date(2024, 2, 29)
    with caplog.at_level(logging.WARNING):
        found = load_prompts(DataConfig(prompts=path), renderer_of(tmp_path / "llama", LLAMA_3_2), seed=1, today=day)
    assert found.printed_date == day
    assert len(caplog.records) == 1 and "set data.template_date=2024-02-29" in caplog.text
    qwen = renderer_of(tmp_path / "qwen", QWEN)
    assert load_prompts(DataConfig(prompts=path), qwen, seed=1, today=day).printed_date is None
    with pytest.raises(DataError, match=r"^data\.template_date=2024-02-29: no prompt of .* prints it; remove it$"):
        load_prompts(DataConfig(prompts=path, template_date=day), qwen, seed=1)


def test_variables_of_a_prompt_line_override_those_of_the_configuration(tmp_path):
    renderer = renderer_of(tmp_path, QWEN)
    data = {"chat_template_kwargs": {"enable_thinking": False}}
    (off,) = load_prompts(DataConfig(prompts=written(tmp_path, [USER]), **data), renderer, seed=1).prompts
    path = written(tmp_path, [USER], chat_template_kwargs={"enable_thinking": True}, tools=TOOLS)
    found = load_prompts(DataConfig(prompts=path, **data), renderer, seed=1)
    assert "".join(renderer.token_texts(off.token_ids)).endswith("</think>\n\n")
    text = "".join(renderer.token_texts(found.prompts[0].token_ids))
    assert text.endswith("<assistant>") and text.startswith("<tools>")
    assert found.raw_prompts["p0"].variables == {"enable_thinking": True} and found.raw_prompts["p0"].tools == TOOLS


def test_variables_that_no_prompt_can_take_are_refused_by_key_or_by_line(tmp_path):
    renderer = renderer_of(tmp_path, QWEN)
    wrong = {"enable_thnking": False}
    with pytest.raises(DataError, match=r"^data\.chat_template_kwargs: the chat template never reads 'enable_thnking'"):
        load_prompts(DataConfig(prompts=written(tmp_path, [USER]), chat_template_kwargs=wrong), renderer, seed=1)
    path = written(tmp_path, [USER], chat_template_kwargs=wrong)
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: prompt 'p0': `chat_template_kwargs`: the chat template"):
        load_prompts(DataConfig(prompts=path), renderer, seed=1)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "a", "prompt": "x"}\n')
    bare = renderer_of(tmp_path / "bare", None)
    assert len(load_prompts(DataConfig(prompts=texts), bare, seed=1).prompts) == 1
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        load_prompts(DataConfig(prompts=texts, chat_template_kwargs={"a": 1}), bare, seed=1)
