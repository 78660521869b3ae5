"""A small instruction set that every machine has, in the alpaca format: questions about the Python installation.

Nothing is downloaded. Three domains: what a function of the standard library does (from its docstring), how it is
called (from its definition), and what a part of the language reference says. As `builtin_text`'s documents, they depend
on the installed Python version and on nothing else.
"""

import ast
import functools
import tokenize
from collections.abc import Iterator

from dataflex_jax.data.sources import builtin_text
from dataflex_jax.errors import InputError

DOMAIN_EXAMPLES = 2_000
_MAX_CHARACTERS = 600


def records(domain: str) -> tuple[dict[str, str], ...]:
    """The examples of one of `DOMAINS` in a fixed order, at most `DOMAIN_EXAMPLES`: instruction, input, output.

    Raises:
        InputError: this Python installation lacks the files (a stripped-down one without sources, say).
    """
    chosen: dict[tuple[str, str], str] = {}
    for instruction, given, output in DOMAINS[domain]():
        if 0 < len(output) <= _MAX_CHARACTERS:
            chosen.setdefault((instruction, given), output)
        if len(chosen) == DOMAIN_EXAMPLES:
            break
    if not chosen:
        raise InputError(
            f"this Python installation has no examples for domain {domain!r}; leave it out of domains or take source "
            "'local'",
            option="data.source",
            value="builtin",
        )
    return tuple({"instruction": q, "input": given, "output": output} for (q, given), output in chosen.items())


@functools.cache
def _functions() -> tuple[tuple[str, str, str], ...]:
    """(name, call, first paragraph of its docstring) of the public functions of the standard library."""
    found = []
    for path in builtin_text.standard_library():
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                docstring = ast.get_docstring(node) or ""
                call = f"{node.name}({ast.unparse(node.args)})"
                found.append((f"{path.stem}.{node.name}", call, " ".join(docstring.split("\n\n")[0].split())))
    return tuple(found)


def _purposes() -> Iterator[tuple[str, str, str]]:
    for name, _, summary in _functions():
        yield f"What does {name} do?", "", summary


def _calls() -> Iterator[tuple[str, str, str]]:
    for name, call, _ in _functions():
        yield "How is this Python function called?", name, call


def _topics() -> Iterator[tuple[str, str, str]]:
    for section in builtin_text.reference():
        title, *paragraphs = section.strip().split("\n\n")
        name, body = title.split("\n")[0].strip(), " ".join(" ".join(paragraphs[:1]).split())
        yield "Explain this part of the Python language.", name, body


DOMAINS = {"calls": _calls, "purposes": _purposes, "topics": _topics}
