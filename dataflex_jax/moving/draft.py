"""What a conversion reads, field by field, and the recipe that grows of that."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dataflex_jax.errors import InputError, shown
from dataflex_jax.files import expanded
from dataflex_jax.moving.yaml_files import Lines, Place

_LINE = 120


class Note(NamedTuple):
    """What is to be known of a field.

    Attributes:
        place: of the field.
        reason: what became of it.
        matters: whether results may differ by it.
    """

    place: Place
    reason: str
    matters: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Given:
    """The fields of a mapping, each of which is to be taken.

    Args:
        fields: the mapping.
    """

    def __init__(self, fields: Lines):
        self._fields, self._left = fields, dict(fields)

    def has(self, name: str) -> bool:
        """Whether it says anything of a field; null says nothing."""
        return self._fields.get(name) is not None

    def place(self, name: str) -> Place:
        """Where a field stands, for messages."""
        return self._fields.place(name)

    def left(self) -> tuple[str, ...]:
        """The fields that have not been taken."""
        return tuple(self._left)

    def raw(self, name: str, default: Any = None) -> Any:
        """A field's value as it is; the default where it is null or not given."""
        value = self._left.pop(name, self._fields.get(name))
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        return self._of(name, bool, "true or false", default)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A field that is a text."""
        return self._of(name, str, "a text", default)

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A field that is a whole number."""
        value = self.raw(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | None):
            self.refuse(name, "a whole number is expected")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A field that is a number."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            self.refuse(name, "a number is expected")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A field that is names with commas between, or a list of them."""
        value = self.raw(name, [])
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            self.refuse(name, "names with commas between are expected")
        return tuple(part.strip() for part in parts if part.strip())

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """A field that is a list of numbers."""
        value = self.raw(name)
        if value is not None and (
            not isinstance(value, list) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in value)
        ):
            self.refuse(name, "a list of numbers is expected")
        return None if value is None else tuple(value)

    def mapping(self, name: str) -> "Given":
        """A field that is a mapping, an empty one where it is not given."""
        value = self.raw(name, Lines(self._fields.path))
        if not isinstance(value, Lines):
            self.refuse(name, "a mapping of names to values is expected")
        return Given(value)

    def one_of(self, name: str, accepted: Mapping[Any, Any], default: Any = None) -> Any:
        """What stands for a field's value; refused where nothing does."""
        value = self.raw(name, default)
        if not isinstance(value, str | int | float | bool | None) or value not in accepted:
            self.refuse(name, f"accepted: {', '.join(map(str, accepted))}")
        return accepted[value]

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Ends the conversion because of a field.

        Raises:
            InputError: file, line, name, value and reason.
        """
        value = f" = {shown(self._fields[name], 80)}" if name in self._fields else " (not given)"
        raise InputError(f"{self.place(name)}{value}: {reason}")

    def _of(self, name: str, kind: type, words: str, default: Any) -> Any:
        value = self.raw(name, default)
        if not isinstance(value, kind | None):
            self.refuse(name, f"{words} is expected")
        return value


class Code(str):
    """Python that a recipe has as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclasses.dataclass
class Draft:
    """A recipe in the making.

    Attributes:
        source: the file that it is made of.
        fields: values by dotted name.
        policies: by kind, the hyperparameters of each policy by its name.
        notes: what is to be known.
    """

    source: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    policies: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    notes: list[Note] = dataclasses.field(default_factory=list)

    def set(self, **fields: Any) -> None:
        """Sets fields, by names with "__" for the dot; None is left as it is."""
        self.fields |= {name.replace("__", "."): value for name, value in fields.items() if value is not None}

    def add(self, kind: str, name: str, fields: Mapping[str, Any]) -> None:
        """Adds a policy with its hyperparameters, of which None are left as they are."""
        chosen = {field: value for field, value in fields.items() if value is not None}
        self.policies.setdefault(kind, {})[name] = chosen

    def note(self, place: Place, reason: str, *, matters: bool = True) -> None:
        """Notes what became of a field."""
        self.notes.append(Note(place, reason, matters))

    def located(self, path: str) -> str:
        """A path of the file, which may be relative to where it was used: to the working directory, or else above it.

        What is found above is made absolute; what is found nowhere, such as a hub id, stays as it is.
        """
        if os.path.isabs(expanded(path)) or Path(expanded(path)).exists():
            return path
        for folder in Path(self.source).resolve().parents:
            if (folder / path).exists():
                return str(folder / path)
        return path

    def text(self, name: str) -> str:
        """The recipe, as Python that is kept in a file called `name`."""
        chosen = ",".join(f"{kind}={'+'.join(of_kind)}" for kind, of_kind in self.policies.items())
        variant = f'f"{chosen},{{variant}}"' if chosen else "variant"
        lines = [
            f'"""{_plain(Path(self.source).name)} as a recipe, made by `python -m dataflex_jax.convert`.',
            "",
            f"python -m dataflex_jax.train --config={_plain(name)}",
            '"""',
            "",
            "from dataflex_jax.configs import llamafactory",
            "",
            "",
            'def get_config(variant=""):',
            f"    config = llamafactory.get_config({variant})",
        ]
        sections: dict[str, dict[str, Any]] = {}
        for field, value in self.fields.items():
            section, _, last = field.rpartition(".")
            sections.setdefault(section, {})[last] = value
        for section in sorted(sections):
            target = f"config.{section}" if section else "config"
            lines += _call(f"{target}.update", (), sections[section])
        for kind, of_kind in self.policies.items():
            for policy, fields in of_kind.items():
                lines += (
                    _call("llamafactory.tune", ("config", _literal(kind), _literal(policy)), fields) if fields else []
                )
        return "\n".join([*lines, "    return config", ""])


def _call(function: str, first: tuple[str, ...], keywords: Mapping[str, Any]) -> list[str]:
    arguments = [*first, *(f"{name}={_literal(value)}" for name, value in keywords.items())]
    line = f"    {function}({', '.join(arguments)})"
    if len(line) <= _LINE:
        return [line]
    return [f"    {function}(", *(f"        {argument}," for argument in arguments), "    )"]


def _literal(value: Any) -> str:
    # Texts in double quotes, as in the other recipes, where that is the same text.
    if isinstance(value, str) and not isinstance(value, Code) and repr(value)[1:-1] == value and '"' not in value:
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _plain(name: str) -> str:
    """A file's name as a docstring can have it."""
    return "".join(c if c.isprintable() and c not in '"\\' else "_" for c in name)
