"""Conversations to tokens through a chat template, with a mask of what the model is trained to say.

A template is Jinja text in Hugging Face's form: the tokenizer's own, or one of `BUILT_IN`. The whole rendered text is
encoded at once, so that tokens come out as `apply_chat_template` of `transformers` gives them. But only the template's
own control tokens become control tokens: before rendering, what looks like one in a message or a function's description
is replaced by a placeholder, and the template's own are replaced by private names afterwards, which a copy of the
tokenizer knows.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import re
import secrets
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from dataflex_jax.data.sources.instruct import Conversation, Message
from dataflex_jax.data.text import rendering
from dataflex_jax.data.text.tokenizer import Tokenizer, is_made
from dataflex_jax.errors import InputError

BUILT_IN = {  # name: the control tokens that it needs
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "alpaca": (),
}


class EncodedChat(NamedTuple):
    """A conversation as tokens.

    Attributes:
        tokens: ids.
        targets: which of them the model is trained to predict; never the first one.
        target_bytes: of the text that the targets stand for, in UTF-8, without control tokens.
    """

    tokens: Int32[np.ndarray, " n"]
    targets: Bool[np.ndarray, " n"]
    target_bytes: int


class _Turn(NamedTuple):
    """Where a response lies in the rendered text: its content, and its end-of-turn token up to `end`."""

    start: int
    content_end: int
    end: int


class _BadConversation(ValueError):
    """Why a conversation has no tokens, in words."""


def special_tokens(template: str | None) -> tuple[str, ...]:
    """The control tokens that a built-in template needs; none for the tokenizer's own (None)."""
    return () if template is None else BUILT_IN[template]


def chosen_template(template: str | None, tokenizer_spec: str) -> str | None:
    """`data.template`, or where it is not set the built-in one of a tokenizer that is made here; None: its own."""
    return "qwen" if template is None and is_made(tokenizer_spec) else template


def template_text(template: str | None, tokenizer: Tokenizer) -> str:
    """The Jinja text of a built-in template, or the tokenizer's own for None.

    Raises:
        InputError: an unknown template, a tokenizer without one, or without the template's control tokens.
    """
    accepted = ", ".join(BUILT_IN)
    if template is None:
        if tokenizer.chat_template is None:
            raise InputError(
                f"not set, and config.data.tokenizer has no chat template of its own; accepted: {accepted}",
                option="data.template",
            )
        return tokenizer.chat_template
    if template not in BUILT_IN:
        reason = f"accepted are {accepted}, or None for the tokenizer's own"
        raise InputError(reason, option="data.template", value=template)
    known = {token.content for token in tokenizer.special_tokens.values()}
    if missing := [token for token in BUILT_IN[template] if token not in known]:
        raise InputError(
            f"needs the control tokens {', '.join(missing)}, which config.data.tokenizer lacks; 'alpaca' needs none",
            option="data.template",
            value=template,
        )
    return _built_in_text(template)


@functools.cache
def _built_in_text(name: str) -> str:
    path = importlib.resources.files("dataflex_jax.data.text") / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def compiled(template: str, tokenizer: Tokenizer) -> rendering.ChatTemplate:
    """A template to render with; others' are tried first, where they can do no harm.

    Raises:
        InputError: it is not valid, or takes too much.
    """
    variables = {**tokenizer.template_variables, "eos_token": tokenizer.eos_token}
    if template not in map(_built_in_text, BUILT_IN):
        fault = rendering.tried(template, tuple(variables.items()))
        if fault is not None:
            raise InputError(f"{tokenizer.template_source}: the chat template {fault}")
    return rendering.ChatTemplate(template, variables, rendering.MAX_STEPS)


def tuned_with(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer of a model that is tuned with a template: it has it as its own, and stops at its end of turn.

    Args:
        tokenizer: whose ids are used.
        template: Jinja text, from `template_text`.
    """
    end = ChatEncoder(tokenizer, template).turn_end_id
    ends = (*tokenizer.turn_end_ids, *(() if end in (None, tokenizer.eos_id) else (end,)))
    return dataclasses.replace(tokenizer, chat_template=template, turn_end_ids=tuple(dict.fromkeys(ends)))


class ChatEncoder:
    """Encodes conversations with one template.

    The targets are the contents of the assistant's turns, but for those marked as context only, and the control token
    that ends each (what follows it, such as a line end, is not): all that the model must say after the generation
    prompt. A token that spans the beginning of a response, as " Paris" does where the template puts a space there, is a
    target. A turn that says nothing, or nothing that the template shows, has none.

    Args:
        tokenizer: whose ids to use.
        template: Jinja text, from `template_text`.
        train_on_prompt: all tokens are targets.
        mask_history: only the last turn is a target.
        cutoff_len: further tokens of a conversation are cut off, which may leave no target; None: none are.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        cutoff_len: int | None = None,
    ):
        self._cutoff_len = cutoff_len
        self._train_on_prompt, self._mask_history = train_on_prompt, mask_history
        self._template, self._source = compiled(template, tokenizer), tokenizer.template_source
        self.identity = {  # changes when the tokens or targets do
            "version": 1,
            "template": hashlib.blake2b(template.encode(), digest_size=16).hexdigest(),
            "train_on_prompt": train_on_prompt,
            "mask_history": mask_history,
            "cutoff_len": cutoff_len,
        }

        # Private names that no text can hold, because nobody can know them.
        secret = secrets.token_hex(8)
        special = tokenizer.special_tokens
        self._private = {token.content: f"\ufdd0{secret}{i}\ufdd0" for i, token in special.items()}
        self._hidden = {token.content: f"\ufdd1{secret}{i}\ufdd1" for i, token in special.items()}
        self._shown = {hidden: content for content, hidden in self._hidden.items()}
        self._any_special, self._any_private, self._any_hidden = map(
            _one_of, (self._private, self._private.values(), self._hidden.values())
        )
        self._probe = f"\ufdd2{secret}\ufdd2"

        self._backend = tokenizer.copy_of_backend(room_for=tuple(self._private.values()))
        self._backend.add_tokens(
            [
                tokenizers.AddedToken(
                    self._private[token.content],
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=False,
                )
                for token in special.values()
            ]
        )
        self._ids = np.arange(max(self._backend.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.int32)
        for i, token in special.items():
            self._ids[self._backend.token_to_id(self._private[token.content])] = i

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedChat | str]:
        """Tokens and targets of each conversation, or why it has none (the template refuses it)."""
        rendered = [self._rendered_or_problem(conversation) for conversation in conversations]
        texts = [r[0] for r in rendered if not isinstance(r, str)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [r if isinstance(r, str) else self._encoded(*r, next(encodings)) for r in rendered]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the assistant's next turn begins.

        Raises:
            InputError: the template refuses it.
        """
        try:
            text = self._render(self._hide(messages), None, generation_prompt=True)
        except _BadConversation as problem:
            raise InputError(str(problem)) from problem
        return self._ids[self._backend.encode(text, add_special_tokens=False).ids].tolist()

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """The control token with which a response ends.

        None where it ends without one, or where the template has no form for a mere question and its answer.
        """
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
        rendered = self._rendered_or_problem(Conversation(messages))
        if isinstance(rendered, str) or not rendered[1]:
            return None
        text, (turn,) = rendered
        end = text[turn.content_end : turn.end]
        return int(self._ids[self._backend.token_to_id(end)]) if end else None

    def _encoded(self, text: str, turns: Sequence[_Turn], encoding: tokenizers.Encoding) -> EncodedChat:
        tokens = self._ids[np.array(encoding.ids[: self._cutoff_len], np.int64)]
        starts, ends = np.array(encoding.offsets[: self._cutoff_len], np.int64).reshape(-1, 2).T
        targets = np.zeros(len(tokens), bool)
        for turn in turns:
            targets |= (ends > turn.start) & (starts < turn.end) & (starts < ends)
        targets[:1] = False
        kept = int(ends.max(initial=0))
        spoken = (self._any_private.sub("", text[turn.start : min(turn.content_end, kept)]) for turn in turns)
        return EncodedChat(tokens, targets, sum(len(part.encode()) for part in spoken))

    def _rendered_or_problem(self, conversation: Conversation) -> tuple[str, list[_Turn]] | str:
        messages, tools = self._hide(conversation.messages), self._hide(conversation.tools)
        context_only = {i for i, message in enumerate(messages) if not message.pop("target", True)}
        try:
            text = self._render(messages, tools)
            if self._train_on_prompt:
                if context_only:
                    raise _BadConversation(
                        "a message is marked as context only, which data.train_on_prompt contradicts"
                    )
                return text, [_Turn(0, len(text), len(text))]
            spoken = spoken_messages(messages, context_only, mask_history=self._mask_history)
            turns = (self._turn(i, messages, tools, text) for i in spoken)
            # A template may have no form for all that a message has, its thoughts for one.
            return text, [turn for turn in turns if text[turn.start : turn.content_end].strip()]
        except _BadConversation as problem:
            return str(problem)

    def _hide(self, value: Any) -> Any:
        """`value`, JSON, with placeholders for what looks like a control token in its strings."""
        if isinstance(value, str):
            return self._any_special.sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, dict):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

    def _render(self, messages: Sequence[Message], tools: Any, *, generation_prompt: bool = False) -> str:
        """The template's text, with private names for its own control tokens and the messages' as they were."""
        try:
            text = self._template.render(messages, tools, generation_prompt=generation_prompt)
        except (rendering.TooMuch, MemoryError) as error:
            reason = error if isinstance(error, rendering.TooMuch) else "takes too much memory"
            raise InputError(f"{self._source}: the chat template {reason}") from error
        except jinja2.TemplateError as error:
            raise _BadConversation(f"the chat template refuses it: {rendering.described(error)}") from error
        except Exception as error:  # a template is a program, in which anything may happen
            reason = f"the chat template of {self._source} fails on it: {rendering.described(error)}"
            raise _BadConversation(reason) from error
        text = self._any_special.sub(lambda match: self._private[match[0]], text)
        return self._any_hidden.sub(lambda match: self._shown[match[0]], text)

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """The words that ask for the assistant's turn, where the template has them apart."""
        question = [{"role": "user", "content": "?"}]
        asked, prompted = self._render(question, None), self._render(question, None, generation_prompt=True)
        return prompted.removeprefix(asked)

    def _turn(self, i: int, messages: Sequence[Message], tools: Any, text: str) -> _Turn:
        """Where the response of message `i` lies in `text`."""
        message = messages[i]
        start = content_end = self._turn_start(i, messages, tools, text)
        if calls := message.get("tool_calls"):
            # Control tokens may begin or separate the calls, so the end is looked for after the last call's name.
            function = {**calls[-1]["function"], "name": self._probe}
            probe = {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
            content_end = self._end_of_probe(i, probe, messages, tools, text)
        end_of_turn = self._any_private.search(text, content_end)
        content_end, end = end_of_turn.span() if end_of_turn else (len(text), len(text))
        shown, said = self._compared(text[start:content_end]), self._compared(message["content"])
        if calls or shown != said:
            self._check_end(i, messages, tools, text, content_end)
        # Templates may strip, drop earlier thoughts or add empty ones, but not say something else.
        if not calls and not shown.endswith(said) and not said.endswith(shown):
            raise _BadConversation(f"the chat template changes the content of message {i}")
        return _Turn(start, content_end, end)

    def _compared(self, text: str) -> str:
        """What of a text, hidden or not, is compared: all but space."""
        return "".join(self._any_hidden.sub(lambda match: self._shown[match[0]], text).split())

    def _check_end(self, i: int, messages: Sequence[Message], tools: Any, text: str, end: int) -> None:
        """Refuses a template that ends message `i` without a control token, so that the next one seems a part of it."""
        if i + 1 < len(messages):
            following = {**messages[i + 1], "content": self._probe}
            probed = self._render([*messages[: i + 1], following, *messages[i + 2 :]], tools)
            at = probed.find(self._probe)
            if 0 <= at < end and probed[:at] == text[:at]:
                raise _BadConversation(f"the chat template does not end message {i} with a control token")

    def _turn_start(self, i: int, messages: Sequence[Message], tools: Any, text: str) -> int:
        message, calls = messages[i], messages[i].get("tool_calls")
        if i and (self._generation_prompt or calls):
            prompt = self._render(messages[:i], tools, generation_prompt=True)
            if text.startswith(prompt):
                return len(prompt)
        # The template renders the beginning of a conversation in another way, or has no generation prompt.
        if not calls:
            probed = self._render([*messages[:i], {**message, "content": self._probe}, *messages[i + 1 :]], tools)
            at = probed.find(self._probe)
            if at >= 0 and probed[:at] == text[:at]:
                return at
        elif i:
            before = self._end_of_probe(i - 1, {**messages[i - 1], "content": self._probe}, messages, tools, text)
            follows = re.escape(self._generation_prompt) if self._generation_prompt else self._any_private
            if match := re.compile(follows).search(text, before):
                return match.end()
        raise _BadConversation(f"the chat template does not say where message {i} begins")

    def _end_of_probe(self, i: int, probe: Message, messages: Sequence[Message], tools: Any, text: str) -> int:
        """Where in `text` the part of message `i` ends that `probe` has the probe for."""
        probed = self._render([*messages[:i], probe, *messages[i + 1 :]], tools)
        _, found, tail = probed.rpartition(self._probe)
        if not found or not text.endswith(tail):
            raise _BadConversation(f"the chat template does not say where message {i} ends")
        return len(text) - len(tail)


def spoken_messages(messages: Sequence[Message], context_only: Container[int], *, mask_history: bool) -> list[int]:
    """The numbers of the messages that are trained on, if the template shows them.

    Args:
        messages: of a conversation.
        context_only: numbers of those that are marked so.
        mask_history: only the last turn is trained on.
    """
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spoken = spoken[-1:] if mask_history else spoken
    return [i for i in spoken if i not in context_only and _says_something(messages[i])]


def _says_something(message: Message) -> bool:
    """Whether there is more to learn from it than to end a turn at once."""
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _one_of(texts: Sequence[str]) -> re.Pattern:
    """Matches any of `texts`, the longest first; never, if there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
