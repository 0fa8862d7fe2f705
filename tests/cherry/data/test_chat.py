"""Conversations as they are written: roles, contents, weights, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from base.errors import DataError
from cherry.data.chat import Chat, messages_for_template, read_chat, trained_turns

ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def test_a_record_keeps_its_messages_and_its_other_keys() -> None:
    chat = read_chat({"messages": [ASK, ANSWER], "tools": [{"name": "f"}], "id": None}, "here")
    assert chat == Chat((ASK, ANSWER), {"tools": [{"name": "f"}]})
    assert chat.text == "hi\nyes"


def test_a_null_is_a_key_that_is_left_out_and_one_text_part_is_its_text() -> None:
    parts = [{"type": "text", "text": "yes"}]
    chat = read_chat({"messages": [{**ASK, "name": None}, {"role": "assistant", "content": parts}]}, "here")
    assert chat.messages == (ASK, ANSWER)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 1, "train": False}])
def test_weights_say_which_turns_are_trained_on_and_the_template_does_not_see_them(flag: dict[str, Any]) -> None:
    chat = read_chat({"messages": [ASK, {**ANSWER, **flag}, ASK, {**ANSWER, "weight": 1}]}, "here")
    assert trained_turns(chat) == [False, False, False, True]
    assert messages_for_template(chat) == [ASK, ANSWER, ASK, ANSWER]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({**ANSWER, "weight": 0.5}, "weight of a message must be 0 or 1"),
        ({**ANSWER, "train": "no"}, "train of a message must be 0 or 1"),
        ({**ASK, "train": True}, "only the assistant's bear loss"),
        ({"role": "assistant"}, "a string content"),
        ({"role": "assistant", "content": 3}, "a string content"),
        ({"role": "robot", "content": "x"}, "a role of system, user, assistant, tool"),
        ({**ASK, "content": [{"type": "image_url", "image_url": "x"}]}, "Images and the like cannot be trained on"),
        ({**ASK, "content": [{"type": "text", "text": "a"}] * 2}, "join several texts"),
    ],
)
def test_a_message_that_cannot_be_trained_on_is_refused(message: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{fault}"):
        read_chat({"messages": [ASK, ANSWER, message]}, "here")


def test_a_conversation_without_loss_is_refused() -> None:
    for messages in ([ASK], [ASK, {**ANSWER, "weight": 0}]):
        with pytest.raises(DataError, match="no token would bear loss"):
            read_chat({"messages": messages}, "here")
