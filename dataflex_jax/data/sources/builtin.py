"""The source that every machine has: documents, or examples in the alpaca format, about its Python installation."""

from ml_collections import ConfigDict

from dataflex_jax.data.sources import builtin_chat, builtin_text
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import RecordsPart
from dataflex_jax.data.sources.streams import Stream, TextReader, wanted_domains
from dataflex_jax.errors import InputError

_KINDS = {None: (builtin_text, TextReader("text")), "alpaca": (builtin_chat, ConversationReader.usual("alpaca"))}


def builtin_streams(data: ConfigDict) -> tuple[Stream, ...]:
    """A stream for each domain.

    Raises:
        InputError: an unknown domain, another formatting than None and alpaca, or an installation without the files.
    """
    if data.formatting not in _KINDS:
        raise InputError(
            "with source 'builtin' accepted are None and 'alpaca'", option="data.formatting", value=data.formatting
        )
    corpus, reader = _KINDS[data.formatting]
    return tuple(
        Stream((RecordsPart(f"builtin {name}", corpus.records(name)),), (), {None: name}, reader)
        for name in wanted_domains(data, tuple(corpus.DOMAINS), "the builtin corpus")
    )
