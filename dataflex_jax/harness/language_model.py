"""A model as lm-evaluation-harness asks it: its `TemplateLM`, with the answers of its own Hugging Face backend.

Imports `lm_eval`, which is optional; `tasks.py` imports this module when it is needed.
"""

import collections
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dataflex_jax.data.text.chat import compiled, template_text
from dataflex_jax.data.text.rendering import ChatTemplate
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.harness.continuation import Continuations, Ending, Sampling
from dataflex_jax.harness.likelihood import Likelihoods
from dataflex_jax.harness.plan import Tokens
from dataflex_jax.models.model import Model

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 256  # where a task does not say how many, as the harness has it


class LanguageModel(TemplateLM):
    """A model on a mesh. There is one of it over all hosts, which must all ask it the same in the same order.

    Attributes:
        model: to be set before it is asked; may be another one each time.

    Args:
        tokenizer: the model's.
        mesh: the devices.
    """

    def __init__(self, tokenizer: Tokenizer, mesh: Mesh):
        super().__init__()
        self.model: Model | None = None
        self.tokenizer = tokenizer
        self._likelihoods, self._continuations = Likelihoods(mesh), Continuations(mesh)
        # Control tokens that stand in a text are read as such: a rendered chat is a text here.
        self._backend = tokenizer.copy_of_backend()
        self._backend.encode_special_tokens = False
        self._encoded: Mapping[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the token that documents begin with, or else the one that they end with."""
        bos = self.tokenizer.bos_token
        return self.eot_token_id if bos is None else self._backend.token_to_id(bos)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the names of files in the harness's own cache."""
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with those that documents begin with, unless the text has them or they are not wanted."""
        ids = self._encoded.get(string)
        if ids is None:
            ids = self._backend.encode(string, add_special_tokens=False).ids
        begin = list(self.tokenizer.begin_ids)
        if add_special_tokens is None:
            add_special_tokens = ids[: len(begin)] != begin
        return begin + ids if add_special_tokens else ids

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `TemplateLM`; all texts are encoded at once, on all cores, and each only once."""
        texts = {}
        for context, continuation in (request.args for request in requests):
            # As `_encode_pair` and `loglikelihood` ask for them.
            texts |= dict.fromkeys((context.rstrip(), context + continuation) if context else (continuation,))
        self._encoded = self._all_encoded(list(texts))
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs):
            message = (
                "%d of %d requests are longer than the %d tokens that the model reads; their beginnings are left out"
            )
            logger.warning(message, cut, len(pairs), self.max_length)
        return [tuple(answer) for answer in self._likelihoods.of(self.model, pairs, self.max_length)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM`: of whole texts, in windows of the length that the model reads."""
        self._encoded = self._all_encoded([request.args[0] for request in requests])
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        self._encoded = {}
        totals = [0.0] * len(requests)
        for owner, answer in zip(owners, self._likelihoods.of(self.model, windows, self.max_length), strict=True):
            totals[owner] += answer.log_prob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`: requests of one kind together."""
        kinds: dict[tuple[Ending, Sampling], list[int]] = collections.defaultdict(list)
        for number, request in enumerate(requests):
            kinds[_kind(request.args[1], self.tokenizer)].append(number)
        texts = [""] * len(requests)
        for (ending, sampling), numbers in kinds.items():
            room = self.max_length - ending.max_tokens
            if room <= 0:
                raise InputError(
                    f"a task generates {ending.max_tokens} tokens, and the model reads {self.max_length} in all; it "
                    "needs a model with a larger max_position_embeddings"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in numbers]
            made = self._continuations.of(self.model, self.tokenizer, prompts, ending, sampling)
            for i, text in zip(numbers, made, strict=True):
                texts[i] = text
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `LM`: by the tokenizer's own template; without the generation prompt, the last message goes on."""
        try:
            text = self._template.render(chat_history, generation_prompt=add_generation_prompt)
        except jinja2.TemplateError:  # of which the harness takes the system's turn to be the cause
            chat_history = [message for message in chat_history if message["role"] != "system"]
            text = self._template.render(chat_history, generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start, kept = text.rindex(last.strip()), last.lstrip()
        return text[:start] + (kept if text.startswith(kept, start) else last.strip())

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return compiled(template_text(None, self.tokenizer), self.tokenizer)

    def _all_encoded(self, texts: list[str]) -> dict[str, list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}


def _kind(options: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Ending, Sampling]:
    """What a task says about generation, in the harness's words."""
    said = normalize_gen_kwargs(dict(options), _MAX_NEW_TOKENS)
    until = (said["until"],) if isinstance(said["until"], str) else tuple(said["until"])
    ending = Ending(tuple(filter(None, (*until, tokenizer.eos_token))), said["max_gen_toks"])
    if not said["do_sample"]:
        return ending, Sampling()
    return ending, Sampling(said["temperature"], said.get("top_k"), said.get("top_p"))
