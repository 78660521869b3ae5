"""Instruction data: records in the formats that people have, each made into one canonical conversation.

    alpaca    instruction, input, output; and, if there, system, tools, history (a list of [prompt, response])
    pairs     prompt, response; the same
    sharegpt  conversations: a list of {"from": human|gpt|system|observation|function_call, "value": ...}; system, tools
    openai    messages: a list of {"role": user|assistant|system|tool, "content": ..., "tool_calls": ...}; system, tools

A canonical conversation has the form that Hugging Face's chat templates take: roles system, user, assistant and tool;
function calls are an assistant's `tool_calls`. The names of columns and tags, and their defaults, are LLaMA-Factory's.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dataflex_jax.data.sources.files import Record
from dataflex_jax.data.sources.messages import BadRecord, Message, is_marked, number_tool_calls, tools, turn
from dataflex_jax.data.sources.parts import Part
from dataflex_jax.data.sources.streams import names_in, type_name, without_nulls
from dataflex_jax.errors import InputError, one_line

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
_OLDER_TOOLS = "functions"  # OpenAI's name of a record's tools before there were others than functions
_LOOKED_AT = 1000  # records, about as many of each file or dataset
MAX_CONVERSATION_BYTES = 1 << 24  # templates are rendered, and their text encoded, as a whole


class Conversation(NamedTuple):
    """A conversation in canonical form.

    Attributes:
        messages: {"role": "system" | "user" | "assistant" | "tool", "content": str, ...}; an assistant's may have
            "tool_calls": [{"id", "type": "function", "function": {"name", "arguments"}}], and has "target": False
            where it is context only; the last is an assistant's.
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


@dataclasses.dataclass(frozen=True)
class ConversationReader:
    """Makes conversations of records; a `streams.Reader`, whose texts are `Conversation.to_json()`.

    Attributes:
        formatting: one of `FORMATTINGS`.
        fields: {column ("prompt", "messages", ...): the record's field}.
        tags: {"role_tag": ..., ...}: the keys and roles of a message; empty for alpaca and pairs.
        columns: fields that the records of a table must have.
        optional_columns: further fields, read where they are.
        weight_key: the key of a message's weight; None: messages have none but the marks of the loss.
    """

    formatting: str
    fields: Mapping[str, str]
    tags: Mapping[str, str]
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    weight_key: str | None = None

    @classmethod
    def usual(cls, formatting: str) -> "ConversationReader":
        """A reader of `formatting` with the usual names of all columns, read where the records have them.

        Raises:
            InputError: an unknown formatting.
        """
        reader = cls.of(formatting)
        names = {name: name for name in COLUMNS[formatting] if name in ("history", "system", "tools")}
        optional = dict.fromkeys(
            [*reader.optional_columns, *names, *([_OLDER_TOOLS] if formatting == "openai" else ())]
        )
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
        weights = {} if self.weight_key is None else {"weight_key": self.weight_key}
        fields, tags = dict(self.fields), dict(self.tags)
        return {"formatting": self.formatting, "columns": fields, "tags": tags, "version": 1, **weights}

    def text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(canonical JSON, None), or (None, what is wrong with the record)."""
        try:
            conversation = self.conversation(fields)
        except BadRecord as problem:
            return None, str(problem)
        try:
            text = conversation.to_json()
        except TypeError as error:  # a table's dates or bytes
            return None, f"calls or tools have no JSON form: {one_line(error)}"
        if len(text) > MAX_CONVERSATION_BYTES:
            return None, f"a conversation of over {MAX_CONVERSATION_BYTES >> 20} MiB; split it into several"
        return text, None

    def conversation(self, fields: Mapping[str, Any]) -> Conversation:
        """The conversation of one record.

        Raises:
            ValueError: what is wrong with the record, in words.
        """
        turns = self._listed_turns(fields) if "messages" in self.fields else self._paired_turns(fields)
        system = self._optional_text(fields, "system")
        if system and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": system})
        if not any(made["role"] != "system" for made in turns):
            raise BadRecord("the conversation is empty")
        if turns[-1]["role"] != "assistant":
            raise BadRecord(f"the last turn is the {turns[-1]['role']}'s; it must be the assistant's")
        number_tool_calls(turns)
        return Conversation(turns, tools(self._given_tools(fields)))

    def is_marked(self, parts: Sequence[Part]) -> bool:
        """Whether the first records of `parts` have what readers once passed over: stores of them have another key."""
        if "messages" not in self.fields:
            return False
        of_each = max(1, _LOOKED_AT // len(parts))
        return any(
            record.fields is not None and self._is_marked(record)
            for part in parts[:_LOOKED_AT]
            for record in itertools.islice(part.records(self.columns, 0, self.optional_columns), of_each)
        )

    def _is_marked(self, record: Record) -> bool:
        messages, given = record.fields.get(self.fields["messages"]), {"tools": self._given_tools(record.fields)}
        return (
            any(is_marked(message, filled=record.filled) for message in messages or () if isinstance(messages, list))
            or bool(self._older_tools(record.fields))
            or (record.filled and without_nulls(given) != given)
        )

    def _given_tools(self, fields: Mapping[str, Any]) -> Any:
        return fields.get(self.fields.get("tools")) or self._older_tools(fields)

    def _older_tools(self, fields: Mapping[str, Any]) -> Any:
        return fields.get(_OLDER_TOOLS) if _OLDER_TOOLS in self.optional_columns else None

    def _paired_turns(self, fields: Mapping[str, Any]) -> list[Message]:
        history = fields.get(self.fields.get("history")) or []
        if not isinstance(history, list | tuple):
            raise BadRecord(f"field {self.fields['history']!r} must be a list but is {type_name(history)}")
        turns = []
        for number, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadRecord(f"field {self.fields['history']!r}: entry {number} is not a [prompt, response] pair")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        prompt = self._required(fields, "prompt", str)
        query = self._optional_text(fields, "query")
        if not prompt and not query:
            raise BadRecord(f"the conversation is empty: field {self.fields['prompt']!r} has no text")
        response = self._required(fields, "response", str)
        turns.append({"role": "user", "content": "\n".join(filter(None, [prompt, query]))})
        return [*turns, {"role": "assistant", "content": response}]

    def _listed_turns(self, fields: Mapping[str, Any]) -> list[Message]:
        field = self.fields["messages"]
        messages = self._required(fields, "messages", list)
        return [
            turn(message, self.tags, f"message {number} of {field!r}", self.weight_key)
            for number, message in enumerate(messages)
        ]

    def _required(self, fields: Mapping[str, Any], name: str, kind: type) -> Any:
        field = self.fields[name]
        if field not in fields:
            raise BadRecord(f"no field {field!r} (column {name!r}); the record has {names_in(fields)}")
        if not isinstance(fields[field], kind):
            wanted = {str: "a string", list: "a list"}[kind]
            raise BadRecord(f"field {field!r} must be {wanted} but is {type_name(fields[field])}")
        return fields[field]

    def _optional_text(self, fields: Mapping[str, Any], name: str) -> str:
        value = fields.get(self.fields.get(name))
        if value is not None and not isinstance(value, str):
            raise BadRecord(f"field {self.fields[name]!r} must be a string but is {type_name(value)}")
        return value or ""
