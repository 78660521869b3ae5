"""YAML files that others wrote: one mapping, with every key once and the line that it stands in, and no anchors."""

import os
import re
from typing import Any, NamedTuple

import yaml

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import read_bytes

_MAX_BYTES = 1 << 20


class Place(NamedTuple):
    """Where a field stands: the file, the line from 1 (0 where it is not given), and its name."""

    path: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}" if self.line else f"{self.path}: {self.name}"


class Lines(dict[str, Any]):
    """A mapping of a file.

    Attributes:
        path: of the file.
        lines: in which each key stands, from 1.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.lines: dict[str, int] = {}

    def place(self, key: str) -> Place:
        """Where a key stands, for messages."""
        return Place(self.path, self.lines.get(key, 0), key)


class _Loader(yaml.SafeLoader):
    """YAML's plain types, with 1e-4 a number, as those have it who read these files."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """A node, refused where it is or has another name."""
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise yaml.MarkedYAMLError(
                problem=f"{mark}{event.anchor}: anchors and aliases are not read; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | os.PathLike[str]) -> Lines:
    """The mapping in a YAML file; mappings in it are `Lines` too.

    Raises:
        InputError: it cannot be read, is no YAML or no mapping, has a key twice or that is no text, or an anchor; names
            the file and the line.
    """
    path = os.fspath(path)
    loader = None
    try:
        loader = _Loader(read_bytes(path, "a YAML file", _MAX_BYTES).decode())
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}: no mapping of names to values")
        return _value(loader, root, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deep") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: {one_line(error.problem or error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # a character, or a date or number that there is not
        raise InputError(f"{path}: not valid YAML ({one_line(error)})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: _Loader, node: yaml.Node, path: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, path) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping = Lines(path)
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise InputError(f"{path}:{line}: a key that is no text")
        if key in mapping:
            raise InputError(f"{path}:{line}: {key} a second time; the first is in line {mapping.lines[key]}")
        mapping[key] = _value(loader, value_node, path)
        mapping.lines[key] = line
    return mapping
