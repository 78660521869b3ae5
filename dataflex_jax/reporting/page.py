"""One self-contained HTML page that shows one run, or compares several."""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from dataflex_jax.errors import InputError, is_disk_full
from dataflex_jax.files import replace_file
from dataflex_jax.reporting.bands import Groups
from dataflex_jax.reporting.exports import export
from dataflex_jax.reporting.groups import are_single, grouped
from dataflex_jax.reporting.pictures import sections
from dataflex_jax.reporting.results import difference_table, results_table
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.selections import examples_table, selections_table
from dataflex_jax.reporting.table import Table
from dataflex_jax.reporting.tables import (
    config_tables,
    differences,
    evaluation_tables,
    highlights,
    overview,
    summary_table,
)

_USAGE = "python -m dataflex_jax.report RUN_DIR [RUN_DIR ...] --output=report.html"


def write_report(
    run_folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    group_by: Sequence[str] = (),
    files: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the page and returns its path; the page needs no other file and no network.

    Args:
        run_folders: of the runs.
        output: the page.
        group_by: fields of the configuration; runs with the same values of them are shown as one group. None: runs that
            differ in nothing but the seed are.
        files: a folder for the figures and tables as files; None: they are not written.

    Raises:
        InputError: no folder given, one is not a run folder, a file in one is malformed, no run has a field of
            `group_by`, or the page cannot be written.
    """
    if not run_folders:
        raise InputError(f"no run given; usage: {_USAGE}")
    runs = _named([RunRecords.load(folder) for folder in run_folders])
    groups = grouped(runs, group_by)
    pictures, tables = sections(runs, groups), _tables(groups)
    selections = _selection_tables(runs, groups)
    summary = summary_table(runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dataflex_jax.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    page = environment.get_template("report.html.jinja").render(
        title=" · ".join(groups),
        several=len(runs) > 1,
        folders=[str(run.folder) for name, run in runs.items() if str(run.folder) != name],
        highlights=highlights(list(runs.values())),
        tables=tables,
        sections=pictures,
        selections=selections,
        configs=config_tables(runs),
        summary=summary,
    )
    output = Path(output)
    try:
        replace_file(output, page.encode())
        if files is not None:
            export(Path(files), pictures, [*tables, *selections])
    except OSError as error:
        if is_disk_full(error):
            raise
        path = error.filename or output
        raise InputError(f"--output={output}: {path} cannot be written ({error.strerror})") from error
    return output


def _tables(groups: Groups) -> list[Table]:
    found = [differences(groups), overview(groups), results_table(groups), difference_table(groups)]
    return [table for table in found if table is not None] + evaluation_tables(groups)


def _selection_tables(runs: Mapping[str, RunRecords], groups: Groups) -> list[Table]:
    """What was chosen, of every run, or of groups of their first."""
    firsts = [of_group[0] for of_group in groups.values()]
    shown = {name: run for name, run in runs.items() if any(run is first for first in firsts)}
    found = ((name, table(run)) for name, run in shown.items() for table in (selections_table, examples_table))
    return [
        table if len(shown) == 1 and are_single(groups) else table.titled(f"{table.title}: {name}")
        for name, table in found
        if table is not None
    ]


def _named(runs: Sequence[RunRecords]) -> dict[str, RunRecords]:
    """The runs by the shortest end of their paths that tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise InputError("the same run folder is given twice; each RUN_DIR must be another run")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return {"/".join(p[-depth:]): run for p, run in zip(parts, runs, strict=True)}
