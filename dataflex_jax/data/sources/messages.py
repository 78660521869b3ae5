"""One message of a conversation, in the forms that records have, made canonical: its role, text and function calls.

What records say of the loss is honoured or refused, never passed over: `weight` (OpenAI, Mistral), `loss_weight`
(LLaMA-Factory), `train` (axolotl) and `loss` (ms-swift) make an assistant's message context only (0 or false).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dataflex_jax.data.sources.streams import names_in, type_name, without_nulls
from dataflex_jax.errors import one_line
from dataflex_jax.foreign import parse_json

Message = dict[str, Any]

MARKS = ("weight", "loss_weight", "train", "loss")
_ABOUT_TRAINING = re.compile(
    r"(^|_)(weights?|loss(es)?|train(ed|ing|able)?|mask(s|ed)?|labels?|targets?|learn(ed|able)?|supervised?)(_|$)"
)
_LARGEST = 3.4e38  # of float32, about
_KEPT_KEYS = ("name", "tool_call_id", "reasoning_content")
_THOUGHTS = ("reasoning", "thinking")  # other names of "reasoning_content"
_CALL_KEYS = {"name", "arguments", "id", "type", "index"}


class BadRecord(ValueError):
    """What is wrong with a record, in words."""


def turn(message: Any, tags: Mapping[str, str], place: str, weight_key: str | None = None) -> Message:
    """The canonical form of a record's message.

    Args:
        message: as the record has it.
        tags: {"role_tag": ..., ...}: its keys and the names of its roles.
        place: where it stands, for messages.
        weight_key: the key of an assistant's message's weight, any number >= 0; with 0 it is context only.

    Raises:
        BadRecord: it is no message, has an unknown role or no text, or asks for a loss that there is not.
    """
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, Mapping) or role_tag not in message:
        what = f"has {names_in(message)}" if isinstance(message, Mapping) else f"is {type_name(message)}"
        raise BadRecord(f"{place}: no {role_tag!r}; it {what}")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "assistant",
        tags["system_tag"]: "system",
    }
    if tags["observation_tag"] == "tool":
        roles.setdefault("function", "tool")  # OpenAI's older name
    role = message[role_tag]
    if not isinstance(role, str) or role not in roles:
        raise BadRecord(f"{place}: unknown role {one_line(repr(role), 80)}; accepted: {', '.join(roles)}")
    made = {"role": roles[role]}
    calls = (message.get("tool_calls") or message.get("function_call")) if made["role"] == "assistant" else None
    made["content"] = content = _text_of(message.get(content_tag), f"{place}: {content_tag!r}", may_be_none=bool(calls))
    made |= {key: message[key] for key in _KEPT_KEYS if isinstance(message.get(key), str)}
    if made["role"] == "assistant" and (thoughts := _other_thoughts(message)):
        made.setdefault("reasoning_content", thoughts)
    if role == tags["function_tag"] and role != tags["assistant_tag"]:
        made |= {"content": "", "tool_calls": _calls(parsed(content, place), place)}
    elif calls:
        made["tool_calls"] = _calls(calls, place)
    keys = {key: value for key, value in message.items() if key not in (role_tag, content_tag)}
    weight = keys.pop(weight_key, None) if made["role"] == "assistant" else None
    if weight is not None and not is_weight(weight):
        value = one_line(repr(weight), 80)
        raise BadRecord(f"{place}: {weight_key!r} is {value}; a finite number >= 0 is expected")
    if not _is_target(keys, made["role"], place) or weight == 0:
        made["target"] = False
    return made


def is_weight(value: Any) -> bool:
    """Whether it can be a weight: a number >= 0 that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _other_thoughts(message: Mapping[str, Any]) -> str | None:
    return next((message[key] for key in _THOUGHTS if isinstance(message.get(key), str)), None)


def _is_target(keys: Mapping[str, Any], role: str, place: str) -> bool:
    """Whether an assistant's message is learnt, by its further keys; others never are, and must not ask to be."""
    said = set()
    for key, value in keys.items():
        if value is None:
            continue
        if key in MARKS:
            if not isinstance(value, int | float) or value not in (0, 1):
                value = one_line(repr(value), 80)
                accepted = "must be 0 or false (context only) or 1 or true (learnt)"
                raise BadRecord(f"{place}: {key!r} is {value}; {accepted}, unless the weighter 'field' goes by turns")
            if value and role != "assistant":
                raise BadRecord(
                    f"{place}: {key!r} is {value}; only the assistant's messages are learnt, not a {role}'s"
                )
            said.add(bool(value))
        elif _ABOUT_TRAINING.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()):
            raise BadRecord(f"{place}: the key {key!r} is not supported; what is learnt is said by {', '.join(MARKS)}")
    if len(said) > 1:
        raise BadRecord(f"{place}: {' and '.join(key for key in MARKS if key in keys)} contradict each other")
    return role != "assistant" or said != {False}


def _text_of(content: Any, place: str, *, may_be_none: bool) -> str:
    """A message's content as one string: OpenAI's may be a list of text parts, or nothing beside tool calls."""
    if isinstance(content, str):
        return content
    if content is None and may_be_none:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise BadRecord(f"{place} must be text but is {type_name(content)}")


def parsed(text: str, place: str) -> Any:
    """The value of JSON in a string. Raises `BadRecord`."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadRecord(f"{place}: not valid JSON: {one_line(error)}") from error


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Function calls, in OpenAI's form or bare, in the form that chat templates take: arguments as an object."""
    found = []
    for call in _listed(calls):
        function = _function(call)
        if function is None or not isinstance(function.get("name"), str):
            raise BadRecord(f"{place}: a function call must look like {{'name': ..., 'arguments': ...}}")
        whose = f"{place}: arguments of {one_line(repr(function['name']), 80)}"
        if _has_other_arguments(function):
            raise BadRecord(f"{whose}: must be called 'arguments'; the call has {names_in(function)}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parsed(arguments, whose) or {}
        if not isinstance(arguments, Mapping):
            raise BadRecord(f"{whose}: must be an object, or its JSON, but is {type_name(arguments)}")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": arguments}
        found.append({**identity, "type": "function", "function": function})
    return found


def _listed(calls: Any) -> list[Any]:
    return calls if isinstance(calls, list) else [calls]


def _function(call: Any) -> Mapping[str, Any] | None:
    """The function of a call in OpenAI's form, or of a bare one; None: it is no call."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else None


def _has_other_arguments(function: Mapping[str, Any]) -> bool:
    """Whether what may be a call's arguments has another name, such as "parameters" or "input"."""
    return "arguments" not in function and not _CALL_KEYS.issuperset(function)


def number_tool_calls(turns: Sequence[Message]) -> None:
    """Gives calls ids where they have none, and results the ids of the calls in order, which some templates ask for."""
    number, open_calls = 0, []
    for made in turns:
        for call in made.get("tool_calls", ()):
            call.setdefault("id", f"{number:09d}")  # Mistral's templates want nine characters
            number += 1
            open_calls.append(call["id"])
        if made["role"] == "tool" and open_calls:
            made.setdefault("tool_call_id", open_calls.pop(0))


def tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions on offer, from a list or its JSON, bare or in OpenAI's form. Raises `BadRecord`."""
    given = parsed(value, "tools") if isinstance(value, str) and value.strip() else value
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise BadRecord("tools must be a list of function descriptions")
    return [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in given]


def is_marked(message: Any, *, filled: bool) -> bool:
    """Whether a message has what readers once passed over.

    These are marks of the loss, a call in the older form or with arguments under another name, thoughts under another
    name, and (in a table) nulls in its calls.
    """
    if not isinstance(message, Mapping):
        return False
    calls = message.get("tool_calls")
    return (
        any(message.get(key) is not None for key in (*MARKS, "function_call"))
        or _other_thoughts(message) is not None
        or any(_has_other_arguments(function) for call in _listed(calls) if (function := _function(call)) is not None)
        or (filled and without_nulls({"calls": calls}) != {"calls": calls})
    )
