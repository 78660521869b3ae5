"""The sources of training data, one entry each: what `data.source` and `targets.source` may be.

A plugin (`config.plugins`) adds its own:

    from dataflex_jax.data.sources.parts import RecordsPart
    from dataflex_jax.data.sources.streams import Stream, TextReader
    from dataflex_jax.data.sources.table import Source, register_source

    def streams(data):
        return (Stream((RecordsPart("verses", ({"text": "..."}, ...)),), (), {None: "verses"}, TextReader("text")),)

    register_source(Source("verses", streams))
"""

import dataclasses
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from dataflex_jax.data.sources.builtin import builtin_streams
from dataflex_jax.data.sources.dataset_info import dataset_info_streams
from dataflex_jax.data.sources.formattings import formatting
from dataflex_jax.data.sources.hub import hub_streams
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.local import local_streams
from dataflex_jax.data.sources.parts import first
from dataflex_jax.data.sources.streams import Stream
from dataflex_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of training data.

    Attributes:
        name: the value of `data.source`.
        open: `config.data` -> the streams, in order of `data.domains` where each holds one domain; it finds the input
            and reads nothing yet. Faults raise `InputError`, with `option="data.NAME"` where an option is at fault.
        needs: {field that must be set: what it is then}.
        refuses: {field that must be None: why}; other fields without a meaning for the source are ignored.
        instruction: whether it always holds conversations; otherwise `data.formatting` says so.
    """

    name: str
    open: Callable[[ConfigDict], tuple[Stream, ...]]
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    instruction: bool = False


_NAMED = {"domain_field": "its domains have names already"}
_SOURCES: dict[str, Source] = {}


def register_source(added: Source) -> None:
    """Adds a source; the module that added it may do so again.

    Raises:
        InputError: another module's source has that name.
    """
    known = _SOURCES.get(added.name)
    if known is not None and known.open.__module__ != added.open.__module__:
        raise InputError(
            f"source {added.name!r} of {added.open.__module__} is already registered by {known.open.__module__}"
        )
    _SOURCES[added.name] = added


register_source(Source("builtin", builtin_streams, refuses=_NAMED))
register_source(Source("local", local_streams, needs={"root": "the folder with the data files"}))
register_source(Source("hub", hub_streams, needs={"root": "a dataset id or a save_to_disk folder"}))
register_source(
    Source(
        "dataset_info",
        dataset_info_streams,
        needs={"root": "the folder with dataset_info.json, or such a file"},
        refuses={**_NAMED, "formatting": "each entry of dataset_info.json has its own"},
        instruction=True,
    )
)


def names() -> tuple[str, ...]:
    """The registered sources."""
    return tuple(_SOURCES)


def source(name: str, option: str = "data.source") -> Source:
    """The source that `data.source` names.

    Raises:
        InputError: an unknown name, with the known ones; `option` is at fault.
    """
    if name not in _SOURCES:
        raise InputError(f"must be one of {', '.join(map(repr, names()))}", option=option, value=name)
    return _SOURCES[name]


def is_instruction(data: ConfigDict) -> bool:
    """Whether `config.data` names conversations (one example a row), not documents."""
    return source(data.source).instruction or data.formatting is not None


def check(data: ConfigDict, section: str = "data") -> None:
    """Refuses what a section says of its source that does not fit; nothing is opened.

    Args:
        data: `config.data` or `config.targets`.
        section: which of them, for messages.

    Raises:
        InputError: names the option.
    """
    record = source(data.source, f"{section}.source")
    formatting(data.formatting, f"{section}.formatting")
    for field, what in record.needs.items():
        if not data[field]:
            raise InputError(f"needed for source {record.name!r} ({what})", option=f"{section}.{field}")
    for field, why in record.refuses.items():
        if data[field] is not None:
            raise InputError(f"not with source {record.name!r}: {why}; set it to None", option=f"{section}.{field}")
    if section == "data" and data.max_samples is not None and data.domain_field is not None:
        reason = "not with config.data.domain_field, which puts several domains into the same files"
        raise InputError(reason, option="data.max_samples", value=data.max_samples)
    domains, values = data.domains, data.domain_values
    if domains is not None and (not domains or len(set(domains)) < len(domains)):
        reason = "name each domain once, at least one (or None: all found)"
        raise InputError(reason, option=f"{section}.domains", value=tuple(domains))
    if values is not None:
        option = f"{section}.domain_values"
        if domains is None or not len(set(values)) == len(values) == len(domains):
            reason = f"must have one value for each of config.{section}.domains, all distinct"
            raise InputError(reason, option=option, value=tuple(values))
        if data.domain_field is None:
            raise InputError(f"needs config.{section}.domain_field, the record field that holds them", option=option)


def open_source(data: ConfigDict) -> tuple[Stream, ...]:
    """Finds the input that `config.data` names; nothing is read yet.

    Returns:
        The streams, in order of `data.domains` where each holds one domain.

    Raises:
        InputError: nothing there, an unknown domain (the available ones are listed), or options that do not fit.
    """
    check(data)
    return tuple(_as_asked(stream, data) for stream in source(data.source).open(data))


def _as_asked(stream: Stream, data: ConfigDict) -> Stream:
    """A stream with what `config.data` says of any source's."""
    if data.max_samples is not None:
        stream = dataclasses.replace(stream, train=first(stream.train, stream.reader.columns, data.max_samples))
    if data.weight_key is not None and isinstance(stream.reader, ConversationReader):
        stream = dataclasses.replace(stream, reader=dataclasses.replace(stream.reader, weight_key=data.weight_key))
    return stream
