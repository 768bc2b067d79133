"""Conversations in one form, and what is wrong with them.

Our form is a list of {"role", "content"}. Three other forms become it: content in parts of text, ShareGPT's messages
({"from", "value"}), and the nulls that a table writes where a message lacks a key.
"""

from typing import Any

from rlhf_fast.data.readers import Row

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def read_messages(messages: Any, where: str) -> list[Row]:
    """The messages in our form. Raises ValueError, which `where` opens, for any other value.

    `content` may be null beside `tool_calls`. `weight` is 0 (context only) or 1 (trained on), as in OpenAI's files.
    """
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if isinstance(messages, list) else type_name(messages)
        raise ValueError(f"{where}: expected a string or a list of messages, got {got}")
    return [_read_message(message, f"{where}[{n}]") for n, message in enumerate(messages)]


def is_trained(message: Row) -> bool:
    """Whether SFT trains on the message: an assistant turn that has no weight 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def type_name(value: Any) -> str:
    """The type of a value, for messages."""
    return "nothing" if value is None else type(value).__name__


def _read_message(message: Any, where: str) -> Row:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with role and content, got {type_name(message)}")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    if isinstance(message.get("content"), list):
        message["content"] = _text_of(message["content"], f"{where}: content")
    for key in ("role", "content"):
        if key == "content" and message.get(key) is None and message.get("tool_calls"):
            continue
        if not isinstance(message.get(key), str):
            raise ValueError(f"{where}: {key}: expected a string, got {type_name(message.get(key))}")
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"{where}: weight: expected 0 or 1, got {message['weight']!r}")
    return message


def _from_sharegpt(message: Row, where: str) -> Row:
    role = message["from"]
    if role not in _SHAREGPT_ROLES:
        raise ValueError(f"{where}: from: expected one of {', '.join(_SHAREGPT_ROLES)}, got {role!r}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "content")}
    return {"role": _SHAREGPT_ROLES[role], "content": message.get("value"), **rest}


def _text_of(parts: list[Any], where: str) -> str:
    texts = []
    for n, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text":
            raise ValueError(f"{where}[{n}]: expected a part of type text, got {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{n}]: text: expected a string, got {type_name(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)
