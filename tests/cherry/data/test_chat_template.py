"""Chat templates: the tokens that transformers gives, which of them bear loss, and no forged control token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from base.errors import DataError
from cherry.data.chat import Chat, read_chat
from cherry.data.chat_template import ChatTemplate
from cherry.data.corpus import Document
from cherry.data.encode import Encoded, Encoder
from tests.cherry.data import templates

transformers = pytest.importorskip("transformers")

TOKENIZER = templates.tokenizer()
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
TALK = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "a fox?"},
    {"role": "assistant", "content": "the quick one"},
]


def encoder(source: str) -> Encoder:
    return Encoder(TOKENIZER, bos_id=0, eos_id=1, template=ChatTemplate(source, "t.jinja", NAMES))


def encoded(source: str, messages: list[dict[str, Any]], **context: Any) -> Encoded:
    chat = read_chat({"messages": messages, **context}, "here")
    (found,) = encoder(source).encode([Document("chats.jsonl:7", chat.text, chat)], with_ends=True)
    return found


def by_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(TOKENIZER.to_str()), chat_template=source, **NAMES
    )
    return fast.apply_chat_template(messages, return_dict=True, **options)


def without_bos(tokens: list[int]) -> list[int]:
    return tokens[1:] if tokens[0] == 0 else tokens


def said(found: Encoded) -> str:
    """Text of the tokens that bear loss, control tokens included."""
    tokens = [token for token, bears in zip(found.tokens, found.bears, strict=True) if bears]
    return str(TOKENIZER.decode(tokens, skip_special_tokens=False))


@pytest.mark.parametrize("name", templates.ALL)
@pytest.mark.parametrize("system", [[], ["be brief"], ["be brief", "be kind"]])
def test_the_tokens_are_those_of_transformers(name: str, system: list[str]) -> None:
    messages = [{"role": "system", "content": text} for text in system] + TALK
    source = templates.ALL[name]
    assert without_bos(encoded(source, messages).tokens) == without_bos(by_transformers(source, messages)["input_ids"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v3", "good day<eos>the quick one<eos>"),
        ("v31", "good day<eos>the quick one<eos>"),
        ("r1", "good day<eos>the quick one<eos>"),
        ("chatml", "good day<|im_end|>the quick one<|im_end|>"),
        ("kimi", "good day<|im_end|>the quick one<|im_end|>"),
        ("marked", "good day<|im_end|>the quick one<|im_end|>"),
        ("reasoning", "good day<|im_end|>the quick one<|im_end|>"),
    ],
)
def test_what_follows_the_generation_prompt_bears_loss(name: str, expected: str) -> None:
    found = encoded(templates.ALL[name], TALK)
    assert said(found) == expected
    assert found.text == "good daythe quick one"
    assert found.ends[-1] == len(found.text)


def test_generation_blocks_mark_what_transformers_marks() -> None:
    mask = by_transformers(templates.MARKED, TALK, return_assistant_tokens_mask=True)["assistant_masks"]
    assert encoded(templates.MARKED, TALK).bears == [bool(value) for value in mask]


def test_calls_of_tools_and_the_tools_themselves_are_rendered() -> None:
    messages = [
        {"role": "user", "content": "1 + é?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "it is 2", "tool_calls": None},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    found = encoded(templates.CHATML, messages, tools=tools)
    assert without_bos(found.tokens) == by_transformers(templates.CHATML, messages, tools=tools)["input_ids"]
    assert said(found).startswith('<tool_call>{"type": "function"')
    assert said(found).endswith("</tool_call><|im_end|>it is 2<|im_end|>")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_rendered_under_each_of_its_names(key: str) -> None:
    messages = [TALK[0], {"role": "assistant", "content": "yes", key: "hm"}]
    found = encoded(templates.REASONING, messages)
    assert without_bos(found.tokens) == by_transformers(templates.REASONING, messages)["input_ids"]
    assert said(found) == "<think>\nhm\n</think>\n\nyes<|im_end|>"


@pytest.mark.parametrize("name", ["r1", "v31", "reasoning"])
def test_reasoning_inside_a_content_is_treated_as_the_template_does(name: str) -> None:
    messages = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]
    source = templates.ALL[name]
    assert without_bos(encoded(source, messages).tokens) == without_bos(by_transformers(source, messages)["input_ids"])


def test_a_turn_whose_reasoning_is_dropped_later_is_refused_unless_it_bears_no_loss() -> None:
    messages = [TALK[0], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, *TALK[2:]]
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* writes message 2 otherwise when others follow it"):
        encoded(templates.REASONING, messages)
    messages[1]["weight"] = 0
    assert said(encoded(templates.REASONING, messages)) == "the quick one<|im_end|>"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}])
@pytest.mark.parametrize("name", ["v3", "chatml", "marked"])
def test_a_turn_of_no_weight_bears_no_loss(name: str, flag: dict[str, Any]) -> None:
    messages = [TALK[0], {**TALK[1], **flag}, *TALK[2:]]
    found = encoded(templates.ALL[name], messages)
    assert found.text == "the quick one"
    assert found.tokens == encoded(templates.ALL[name], TALK).tokens


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"tool_calls": [CALL]}, "tool_calls"),
        ({"reasoning_content": "hm"}, "reasoning_content"),
        ({"name": "Ann"}, "name"),
        ({"images": ["a.png"]}, "images"),
        ({"mask": True}, "mask"),
    ],
)
def test_a_key_that_the_template_does_not_read_is_refused_by_name(message: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=rf"chats.jsonl:7: message 2 has the key '{key}', which the chat template"):
        encoded(templates.V3, [TALK[0], {**TALK[1], **message}])


def test_a_record_s_tools_that_the_template_does_not_read_are_refused() -> None:
    with pytest.raises(DataError, match="the record has the key 'tools'"):
        encoded(templates.V3, TALK, tools=[{"type": "function"}])
    assert encoded(templates.V3, TALK, id=7, origin="web").tokens == encoded(templates.V3, TALK).tokens


def test_a_role_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out messages of the role 'tool'"):
        encoded(templates.V3, [TALK[0], {"role": "tool", "content": "2"}, TALK[1]])


def test_a_template_that_refuses_or_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"chats.jsonl:7: the chat template \(t.jinja\) does not take .* only one turn"):
        encoded("{{ raise_exception('only one turn') }}", TALK)
    with pytest.raises(DataError, match=r"t.jinja: not a chat template that Jinja reads"):
        ChatTemplate("{% for %}", "t.jinja", NAMES)
    with pytest.raises(DataError, match="bos inside the conversation"):
        encoded("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}", TALK)


def test_a_text_that_the_template_would_complete_to_a_control_token_is_refused() -> None:
    source = "{% for m in messages %}{{ '<|im_' + m.content + '|>' if m.role == 'user' else m.content }}{% endfor %}"
    with pytest.raises(DataError, match="joins a message's text with its own to a control token"):
        encoded(source, [{"role": "user", "content": "start"}, TALK[1]])
    assert said(encoded(source, [TALK[0], TALK[1]])) == "good day"


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(DataError, match="does not take this conversation"):
        encoded("{{ messages.__class__.__mro__[1].__subclasses__() }}", TALK)


PIECES = [*templates.SPECIAL, *templates.NOT_SPECIAL, "a", " ", "\n", "<", "|im_start|>", "<|im_", "é", "\U000f0000"]
text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["v3", "chatml", "kimi", "marked"]), question=text, answer=text)
def test_no_text_of_a_message_becomes_a_control_token(name: str, question: str, answer: str) -> None:
    source = templates.ALL[name]
    messages = [{"role": "user", "content": f"x{question}x"}, {"role": "assistant", "content": f"x{answer}x"}]
    found = encoded(source, messages)
    plain = encoded(source, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
    control = encoder(source).control_ids
    assert [t for t in found.tokens if t in control] == [t for t in plain.tokens if t in control]
    assert found.text == f"x{answer}x"
    assert by_transformers(source, messages, tokenize=False) == TOKENIZER.decode(
        found.tokens if source.startswith("{{ bos") or name == "v3" else found.tokens[1:], skip_special_tokens=False
    )


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["v31", "r1", "reasoning"]), question=text, answer=text)
def test_only_what_a_template_looks_for_in_an_answer_is_its_own(name: str, question: str, answer: str) -> None:
    """A template that parts reasoning from an answer reads `<think>` and `</think>` there, and no other name."""
    source = templates.ALL[name]
    plain = encoded(source, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
    found = encoded(
        source, [{"role": "user", "content": f"x{question}x"}, {"role": "assistant", "content": f"{answer}x"}]
    )
    thinking = {TOKENIZER.token_to_id(token) for token in ("<think>", "</think>")}
    control = encoder(source).control_ids - (thinking if "think>" in answer else set())
    assert [t for t in found.tokens if t in control] == [t for t in plain.tokens if t in control]


@settings(max_examples=200, deadline=None)
@given(content=text)
def test_no_text_of_a_document_becomes_a_control_token(content: str) -> None:
    made = encoder(templates.V3)
    (found,) = made.encode([Document("d", content)])
    assert not made.control_ids & set(found.tokens[1:-1])
    assert TOKENIZER.decode(found.tokens[1:-1], skip_special_tokens=False) == content


@settings(max_examples=100, deadline=None)
@given(content=text)
def test_a_tool_s_words_become_no_control_token_either(content: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {f"k{content}": content}}}
    messages = [TALK[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]
    control = encoder(templates.CHATML).control_ids
    names = [TOKENIZER.id_to_token(t) for t in encoded(templates.CHATML, messages).tokens[1:] if t in control]
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|im_end|>"]


def test_a_chat_keeps_its_other_keys() -> None:
    assert read_chat({"messages": TALK, "tools": [], "id": 3}, "here") == Chat(tuple(TALK), {"tools": [], "id": 3})
