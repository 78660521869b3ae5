"""The formats of records, one entry each: what makes a text of a record, and which local files hold such records."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dataflex_jax.data.sources import instruct, mmlu
from dataflex_jax.data.sources.names import FORMATS, INSTRUCTION_FORMATS
from dataflex_jax.data.sources.parts import Part, file_parts
from dataflex_jax.data.sources.streams import Reader, TextReader
from dataflex_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Formatting:
    """A format of records.

    Attributes:
        name: the value of `data.formatting`: instruction data; None: documents.
        reader: `config.data` -> what makes a text of a record.
        extensions: how the names of local data files end.
        domain: the rest of a local file's name -> the domain that it belongs to.
        parts: local files -> how they are read.
    """

    name: str | None
    reader: Callable[[ConfigDict], Reader]
    extensions: tuple[str, ...] = INSTRUCTION_FORMATS
    domain: Callable[[str], str] = str
    parts: Callable[[Sequence[Path]], tuple[Part, ...]] = file_parts


_FORMATTINGS = {
    None: Formatting(None, lambda data: TextReader(data.text_field), FORMATS),
    **{
        name: Formatting(name, lambda data: instruct.ConversationReader.usual(data.formatting))
        for name in instruct.FORMATTINGS
    },
    mmlu.FORMATTING: Formatting(
        mmlu.FORMATTING, lambda data: mmlu.MmluReader(), mmlu.FORMATS, mmlu.subject_of, mmlu.mmlu_parts
    ),
}


def formatting(name: str | None, option: str = "data.formatting") -> Formatting:
    """The format that `data.formatting` names.

    Raises:
        InputError: an unknown name, with the known ones; `option` is at fault.
    """
    if name not in _FORMATTINGS:
        known = ", ".join(map(repr, filter(None, _FORMATTINGS)))
        raise InputError(f"must be one of {known}, or None", option=option, value=name)
    return _FORMATTINGS[name]
