"""The page's figures and tables as files, to go into a paper."""

import re
from collections.abc import Sequence
from pathlib import Path

from dataflex_jax.files import replace_file
from dataflex_jax.reporting.pictures import Section
from dataflex_jax.reporting.table import Table, to_latex, to_markdown


def export(folder: Path, sections: Sequence[Section], tables: Sequence[Table]) -> None:
    """Writes figures/NAME.png, .pdf and .csv, and tables/NAME.tex and .md, replacing those of the same names.

    Args:
        folder: made where it is missing.
        sections: the pictures.
        tables: the tables.
    """
    figures = [picture for _, pictures in sections for picture in pictures]
    for name, picture in zip(_unique([picture.name for picture in figures]), figures, strict=True):
        files = {"png": picture.light, "pdf": picture.chart.drawn("pdf"), "csv": picture.chart.csv().encode()}
        for kind, contents in files.items():
            replace_file(folder / "figures" / f"{name}.{kind}", contents)
    titles = [re.sub(r"[^a-z0-9.]+", "_", table.title.lower()).strip("_.")[:80] or "table" for table in tables]
    for name, table in zip(_unique(titles), tables, strict=True):
        replace_file(folder / "tables" / f"{name}.tex", to_latex(table).encode())
        replace_file(folder / "tables" / f"{name}.md", to_markdown(table).encode())


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where they are alike."""
    found: list[str] = []
    for plain in names:
        name, number = plain, 2
        while name in found:
            name, number = f"{plain}_{number}", number + 1
        found.append(name)
    return found
