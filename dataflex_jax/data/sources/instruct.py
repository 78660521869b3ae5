"""Instruction data: records in the formats that people have, each made into one canonical conversation.

    alpaca    instruction, input, output; and, if there, system, tools, history (a list of [prompt, response])
    pairs     prompt, response; the same
    sharegpt  conversations: a list of {"from": human|gpt|system|observation|function_call, "value": ...}; system, tools
    openai    messages: a list of {"role": user|assistant|system|tool, "content": ..., "tool_calls": ...}; system, tools

A canonical conversation has the form that Hugging Face's chat templates take: roles system, user, assistant and tool;
function calls are an assistant's `tool_calls`. The names of columns and tags, and their defaults, are LLaMA-Factory's.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dataflex_jax.errors import InputError

Message = dict[str, Any]

_PAIRED = ("prompt", "query", "response", "history", "system", "tools")
_LISTED = ("messages", "system", "tools")
COLUMNS = {"alpaca": _PAIRED, "pairs": _PAIRED, "sharegpt": _LISTED, "openai": _LISTED}
FORMATTINGS = tuple(COLUMNS)
_DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "pairs": {"prompt": "prompt", "response": "response"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
_REQUIRED = ("prompt", "response", "messages")
_DEFAULT_TAGS = {
    "alpaca": {},
    "pairs": {},
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}
_KEPT_KEYS = ("name", "tool_call_id", "reasoning_content")


class Conversation(NamedTuple):
    """A conversation in canonical form.

    Attributes:
        messages: {"role": "system" | "user" | "assistant" | "tool", "content": str, ...}; an assistant's may have
            "tool_calls": [{"id", "type": "function", "function": {"name", "arguments"}}]; the last is an assistant's.
        tools: the functions on offer, {"type": "function", "function": {...}} each, or None.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def to_json(self) -> str:
        """One line; `from_json` reads it."""
        return json.dumps(self._asdict(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """The conversation that `to_json` wrote."""
        return cls(**json.loads(text))

    def plain_text(self) -> str:
        """The contents of all messages, a line between them."""
        return "\n".join(message["content"] for message in self.messages)


class _BadRecord(ValueError):
    """What is wrong with a record, in words."""


@dataclasses.dataclass(frozen=True)
class ConversationReader:
    """Makes conversations of records; a `streams.Reader`, whose texts are `Conversation.to_json()`.

    Attributes:
        formatting: one of `FORMATTINGS`.
        fields: {column ("prompt", "messages", ...): the record's field}.
        tags: {"role_tag": ..., ...}: the keys and roles of a message; empty for alpaca and pairs.
        columns: fields that the records of a table must have.
        optional_columns: further fields, read where they are.
    """

    formatting: str
    fields: Mapping[str, str]
    tags: Mapping[str, str]
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]

    @classmethod
    def usual(cls, formatting: str) -> "ConversationReader":
        """A reader of `formatting` with the usual names of all columns, read where the records have them.

        Raises:
            InputError: an unknown formatting.
        """
        reader = cls.of(formatting)
        names = {name: name for name in COLUMNS[formatting] if name in ("history", "system", "tools")}
        optional = dict.fromkeys([*reader.optional_columns, *names])
        return dataclasses.replace(reader, fields={**names, **reader.fields}, optional_columns=tuple(optional))

    @classmethod
    def of(
        cls, formatting: str, columns: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> "ConversationReader":
        """A reader of `formatting` as LLaMA-Factory would read it with these `columns` and `tags`.

        Columns that are given replace the default ones that are optional; tags that are not given have their defaults.

        Raises:
            InputError: an unknown formatting, column or tag.
        """
        if formatting not in FORMATTINGS:
            raise InputError(f"formatting {formatting!r} is not supported; accepted: {', '.join(FORMATTINGS)}")
        defaults, default_tags = _DEFAULT_COLUMNS[formatting], _DEFAULT_TAGS[formatting]
        for what, given, accepted in (("column", columns, COLUMNS[formatting]), ("tag", tags, tuple(default_tags))):
            for name, value in (given or {}).items():
                if name not in accepted or not isinstance(value, str | None):
                    raise InputError(
                        f"{what} {name!r}: {value!r} is not supported with formatting {formatting!r}; accepted are "
                        f"names for {', '.join(accepted) or 'none'}"
                    )
        given = {name: field for name, field in (columns or {}).items() if field}
        if columns is not None:
            defaults = {name: field for name, field in defaults.items() if name in ("prompt", "messages")}
        fields = {**defaults, **given}
        if "prompt" in fields and "response" not in fields:
            raise InputError("column 'response' is missing: instruction data needs the field that holds the responses")
        required = tuple(field for name, field in fields.items() if name in _REQUIRED or name in given)
        optional = tuple(field for field in fields.values() if field not in required)
        tags = {**default_tags, **{name: tag for name, tag in (tags or {}).items() if tag}}
        return cls(formatting, fields, tags, required, optional)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes when the conversations do."""
        return {"formatting": self.formatting, "columns": dict(self.fields), "tags": dict(self.tags), "version": 1}

    def text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(canonical JSON, None), or (None, what is wrong with the record)."""
        try:
            return self.conversation(fields).to_json(), None
        except _BadRecord as problem:
            return None, str(problem)

    def conversation(self, fields: Mapping[str, Any]) -> Conversation:
        """The conversation of one record.

        Raises:
            ValueError: what is wrong with the record, in words.
        """
        turns = self._listed_turns(fields) if "messages" in self.fields else self._paired_turns(fields)
        system = self._optional_text(fields, "system")
        if system and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": system})
        if not any(turn["role"] != "system" for turn in turns):
            raise _BadRecord("the conversation is empty")
        if turns[-1]["role"] != "assistant":
            raise _BadRecord(f"the last turn is the {turns[-1]['role']}'s; it must be the assistant's")
        _number_tool_calls(turns)
        return Conversation(turns, _tools(fields.get(self.fields.get("tools"))))

    def _paired_turns(self, fields: Mapping[str, Any]) -> list[Message]:
        history = fields.get(self.fields.get("history")) or []
        turns = []
        for number, pair in enumerate(history):
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise _BadRecord(f"field {self.fields['history']!r}: entry {number} is not a [prompt, response] pair")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        prompt = self._required(fields, "prompt", str)
        query = self._optional_text(fields, "query")
        if not prompt and not query:
            raise _BadRecord(f"the conversation is empty: field {self.fields['prompt']!r} has no text")
        response = self._required(fields, "response", str)
        turns.append({"role": "user", "content": "\n".join(filter(None, [prompt, query]))})
        return [*turns, {"role": "assistant", "content": response}]

    def _listed_turns(self, fields: Mapping[str, Any]) -> list[Message]:
        messages = self._required(fields, "messages", list)
        return [self._turn(number, message) for number, message in enumerate(messages)]

    def _turn(self, number: int, message: Any) -> Message:
        tags, place = self.tags, f"message {number} of {self.fields['messages']!r}"
        role_tag, content_tag = tags["role_tag"], tags["content_tag"]
        if not isinstance(message, Mapping) or role_tag not in message:
            what = f"has {', '.join(message)}" if isinstance(message, Mapping) else f"is {type(message).__name__}"
            raise _BadRecord(f"{place}: no {role_tag!r}; it {what}")
        roles = {
            tags["user_tag"]: "user",
            tags["assistant_tag"]: "assistant",
            tags["observation_tag"]: "tool",
            tags["function_tag"]: "assistant",
            tags["system_tag"]: "system",
        }
        role = message[role_tag]
        if not isinstance(role, str) or role not in roles:
            raise _BadRecord(f"{place}: unknown role {role!r}; accepted: {', '.join(roles)}")
        calls = message.get("tool_calls") if roles[role] == "assistant" else None
        content = _text_of(message.get(content_tag), f"{place}: {content_tag!r}", may_be_none=bool(calls))
        turn = {"role": roles[role], "content": content}
        turn |= {key: message[key] for key in _KEPT_KEYS if isinstance(message.get(key), str)}
        if role == tags["function_tag"] and role != tags["assistant_tag"]:
            turn |= {"content": "", "tool_calls": _calls(_parsed(content, place), place)}
        elif calls:
            turn["tool_calls"] = _calls(calls, place)
        return turn

    def _required(self, fields: Mapping[str, Any], name: str, kind: type) -> Any:
        field = self.fields[name]
        if field not in fields:
            raise _BadRecord(f"no field {field!r} (column {name!r}); the record has {', '.join(fields) or 'none'}")
        if not isinstance(fields[field], kind):
            wanted = {str: "a string", list: "a list"}[kind]
            raise _BadRecord(f"field {field!r} must be {wanted} but is {type(fields[field]).__name__}")
        return fields[field]

    def _optional_text(self, fields: Mapping[str, Any], name: str) -> str:
        value = fields.get(self.fields.get(name))
        if value is not None and not isinstance(value, str):
            raise _BadRecord(f"field {self.fields[name]!r} must be a string but is {type(value).__name__}")
        return value or ""


def _text_of(content: Any, place: str, *, may_be_none: bool) -> str:
    """A message's content as one string: OpenAI's may be a list of text parts, or nothing beside tool calls."""
    if isinstance(content, str):
        return content
    if content is None and may_be_none:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise _BadRecord(f"{place} must be text but is {type(content).__name__}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _BadRecord(f"{place}: not valid JSON: {error}") from error


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Function calls, in OpenAI's form or bare, in the form that chat templates take: arguments as an object."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _BadRecord(f"{place}: a function call must look like {{'name': ..., 'arguments': ...}}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{place}: arguments of {function['name']!r}")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": arguments}
        found.append({**identity, "type": "function", "function": function})
    return found


def _number_tool_calls(turns: Sequence[Message]) -> None:
    """Gives calls ids where they have none, and results the ids of the calls in order, which some templates ask for."""
    number, open_calls = 0, []
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call.setdefault("id", f"{number:09d}")  # Mistral's templates want nine characters
            number += 1
            open_calls.append(call["id"])
        if turn["role"] == "tool" and open_calls:
            turn.setdefault("tool_call_id", open_calls.pop(0))


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions on offer, from a list or its JSON, bare or in OpenAI's form."""
    tools = _parsed(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _BadRecord("tools must be a list of function descriptions")
    return [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools]
