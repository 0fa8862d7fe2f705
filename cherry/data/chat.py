"""Conversations: the records of a chat data set, as they are written and as a chat template takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from base.errors import DataError

ROLES = ("system", "user", "assistant")
_KNOWN_ROLES = (*ROLES, "tool", "developer", "function", "ipython", "observation", "critic")
_FLAGS = ("weight", "train", "training")


@dataclass(frozen=True)
class Chat:
    """A conversation: its messages, and the record's other keys (`tools` and the like)."""

    messages: tuple[dict[str, Any], ...]
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Contents of the messages, one a line."""
        return "\n".join(message["content"] for message in self.messages if message.get("content") is not None)


def read_chat(record: Mapping[str, Any], where: str) -> Chat:
    """Conversation of a record with `messages`.

    Raises:
        DataError: names the message and its fault.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: must have a list of messages under 'messages'. Fix or remove the line.")
    chat = Chat(
        tuple(_message(message, where) for message in messages),
        {key: value for key, value in record.items() if key != "messages" and value is not None},
    )
    if not any(trained_turns(chat)):
        raise DataError(
            f"{where}: no message has the role assistant and a weight other than 0, so no token would bear loss. "
            "Remove the line."
        )
    return chat


def _message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in _KNOWN_ROLES:
        raise DataError(
            f"{where}: a message must have a role of {', '.join(_KNOWN_ROLES)}, got {message!r:.80}. Fix or remove the "
            "line."
        )
    # As transformers does: a null is a key that is left out, whatever a table of all keys has in its place.
    given = {key: value for key, value in message.items() if value is not None}
    content = given.get("content")
    if isinstance(content, list):
        given["content"] = content = _joined(content, where)
    if not isinstance(content, str) and not (content is None and (given.keys() - {"role", *_FLAGS})):
        raise DataError(f"{where}: a message must have a string content, got {message!r:.80}. Fix or remove the line.")
    for key in _FLAGS:
        flag = given.get(key)
        if flag is not None and (not isinstance(flag, bool | int | float) or flag not in (0, 1)):
            raise DataError(f"{where}: {key} of a message must be 0 or 1 (got {flag!r:.40}). Fix or remove the line.")
        if flag and role != "assistant":
            raise DataError(f"{where}: {key} is set on a message of the role {role}; only the assistant's bear loss.")
    return given


def _joined(parts: list[Any], where: str) -> str:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise DataError(
            f"{where}: a content must be a string, or a list of one part of the type text, got {parts!r:.80}. "
            "Images and the like cannot be trained on; join several texts as you want them."
        )
    return texts[0]


def trained_turns(chat: Chat) -> list[bool]:
    """Which messages bear loss: the assistant's, but for those with a weight (or `train`) of 0."""
    return [message["role"] == "assistant" and all(message.get(key, 1) for key in _FLAGS) for message in chat.messages]


def messages_for_template(chat: Chat) -> list[dict[str, Any]]:
    """Messages without their weights; reasoning also under the names that transformers gives it."""
    found = []
    for message in chat.messages:
        given = {key: value for key, value in message.items() if key not in _FLAGS}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((given[name] for name in names if given.get(name) is not None), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        found.append(given)
    return found
