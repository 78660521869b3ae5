"""A table of the report, and its forms for a paper: LaTeX and Markdown."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

MISSING = "—"

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "—": "---",
    "→": r"$\to$",
}
_MINUS = re.compile(r"(?<![\w.-])-(?=\d)")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Rules as in booktabs, and plain lines where the paper does not use that package.
_RULES = tuple(rf"\providecommand{{\{name}rule}}{{\hline}}" for name in ("top", "mid", "bottom"))


@dataclass(frozen=True)
class Cell:
    """One table cell.

    Attributes:
        text: what it says.
        best: whether it is the best of its row, or better than what it is compared with.
        worse: whether it is worse than what it is compared with.
    """

    text: str
    best: bool = False
    worse: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: its heading, and the name of its files.
        columns: their heads.
        rows: (head, cells).
        corner: the head of the rows' heads.
        spans: (head, how many columns) above the columns; empty: there are none.
        last: how many rows at the end are set apart.
        words: whether the cells are texts that may be wrapped.
        notes: what to mind, a sentence or several each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    corner: str = ""
    spans: Sequence[tuple[str, int]] = ()
    last: int = 0
    words: bool = False
    notes: Sequence[str] = ()

    @property
    def edges(self) -> set[int]:
        """The columns at which spans begin."""
        widths = [width for _, width in self.spans]
        return {sum(widths[:number]) for number in range(len(widths))}

    def titled(self, title: str) -> Self:
        """The same table under another title."""
        return replace(self, title=title)


def text_of(value: Any, number: str = "{:.6g}") -> str:
    """A value as people read it; `number` is the format of floats."""
    if value is None:
        return MISSING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # "{:#.4g}" leaves the dot of "3863." there.
        return number.format(value).removesuffix(".") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value) or MISSING
    return str(value)


def to_latex(table: Table) -> str:
    """A `tabular`, with the notes as comments before it; without `booktabs` the rules are plain lines."""
    lines = [f"% {_line(note)}" for note in (table.title, *table.notes)]
    wrapped = rf"p{{{0.9 / (len(table.columns) + 1):.2f}\linewidth}}"
    columns = (wrapped if table.words else "r") * len(table.columns)
    lines += [*_RULES, rf"\begin{{tabular}}{{l{columns}}}", r"\toprule"]
    if table.spans:
        spans = [rf"\multicolumn{{{width}}}{{c}}{{{_latex(head)}}}" for head, width in table.spans]
        lines.append(_row(["", *spans]))
    lines += [_row([_latex(table.corner), *map(_latex, table.columns)]), r"\midrule"]
    for number, (head, cells) in enumerate(table.rows):
        if table.last and number == len(table.rows) - table.last:
            lines.append(r"\midrule")
        lines.append(_row([_latex(head), *map(_latex_cell, cells)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown under its title, with the notes after it; spanning heads go before each column's."""
    above = [head for head, width in table.spans for _ in range(width)] or [""] * len(table.columns)
    heads = [" ".join(filter(None, pair)) for pair in zip(above, table.columns, strict=True)]
    lines = [f"### {_line(table.title)}", "", _cells([table.corner, *heads])]
    lines.append("|" + " --- |" + " ---: |" * len(heads))
    for head, cells in table.rows:
        texts = (f"**{_markdown(cell.text)}**" if cell.best else _markdown(cell.text) for cell in cells)
        lines.append(f"| {' | '.join((_markdown(head), *texts))} |")
    notes = [line for note in table.notes for line in ("", _markdown(note))]
    return "\n".join([*lines, *notes, ""])


def _line(text: str) -> str:
    return _CONTROLS.sub("", " ".join(text.split()))


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in _line(text))
    return _MINUS.sub("$-$", escaped)


def _latex_cell(cell: Cell) -> str:
    return rf"\textbf{{{_latex(cell.text)}}}" if cell.best else _latex(cell.text)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", _line(text))


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, texts))} |"
