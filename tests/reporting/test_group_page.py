"""The page of groups of runs, its figures and tables as files, and how a browser shows it."""

import csv
import json
import shutil
import subprocess

import numpy as np
import pytest

from dataflex_jax.reporting.evaluations import evaluations
from dataflex_jax.reporting.page import write_report
from dataflex_jax.reporting.run_folder import RunRecords, series
from tests.helpers.synthetic_run import write_run, write_selections
from tests.reporting.test_page import Page

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NASTY = "<script>document.title='other'</script><img src=x onerror=\"document.title='other'\">"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the page, run folders by name) of two mixers with two seeds each."""
    root = tmp_path_factory.mktemp("report")
    runs = {}
    for mixer, offset in (("odm", 0.0), ("ado", 0.1)):
        for seed in (0, 1):
            folder = write_run(root / mixer / f"seed{seed}", steps=20, seed=seed, offset=offset + seed / 50)
            config = json.loads((folder / "config.json").read_text())
            config["config"]["mixer"]["name"] = mixer
            (folder / "config.json").write_text(json.dumps(config))
            runs[f"{mixer}/seed{seed}"] = folder
    for seed in (0, 1):
        write_selections(runs[f"ado/seed{seed}"], steps=(5, 10), seed=seed)
    write_report(list(runs.values()), root / "report.html", files=root / "files")
    return root, runs


def test_groups_have_tables_and_pictures_of_their_own(written):
    root, _ = written
    page = Page((root / "report.html").read_text(encoding="utf-8"))
    assert [text for _, text in page.headings] == [
        *("Shared configuration", "What differs", "Runs", "Results", "Differences to odm", "Held out: valid"),
        *("Loss", "Held-out nll by domain", "Mixture", "Epochs by domain"),
        *("Selections by domain, coverage and overlap", "Coverage and overlap of selections", "Selector scores"),
        *("Scores of candidates and of what was chosen", "Lengths of candidates and of what was chosen"),
        *("Learning rate and gradient norm", "Throughput"),
        *("Selections: ado/seed0", "Highest and lowest scored after step 10: ado/seed0", "Everything recorded"),
    ]
    assert [text for text, _ in page.table("odm")["odm"]] == ["2", *results(root)["odm"]]
    assert [text for text, _ in page.table("last step")["last step"]] == ["20", "20"]


def results(root):
    """The cells after the number of runs in the Markdown of the results."""
    lines = (root / "files" / "tables" / "results.md").read_text().splitlines()
    rows = [line.strip("| ").replace("**", "").split(" | ") for line in lines if line.startswith("| ")]
    return {name: cells for name, _, *cells in rows[2:]}


def test_every_figure_is_a_csv_of_the_run_folders_numbers(written):
    root, folders = written
    figures = root / "files" / "figures"
    names = {path.stem for path in figures.iterdir()}
    assert {"loss", "held_out_by_domain", "mixture", "throughput", "score_histograms-ado_seed0", "reach"} <= names
    for name in names:
        assert {path.suffix for path in figures.glob(f"{name}.*")} == {".png", ".pdf", ".csv"}
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (figures / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    runs = {name: RunRecords.load(folder) for name, folder in folders.items()}
    with open(figures / "held_out_by_domain.csv") as file:
        found = {(row["plot"], row["curve"], int(row["x"])): row for row in csv.DictReader(file)}
    assert len(found) == 3 * 2 * 4
    for (domain, mixer, step), row in found.items():
        values = []
        for seed in (0, 1):
            steps, nll = series(evaluations(runs[f"{mixer}/seed{seed}"]), "domains", domain, "nll")
            values.append(nll[steps.tolist().index(step)])
        expected = [np.mean(values), min(values), max(values)]
        np.testing.assert_allclose([float(row[name]) for name in ("value", "low", "high")], expected, rtol=1e-15)


def test_every_table_is_latex_and_markdown(written):
    root, _ = written
    tables = root / "files" / "tables"
    names = {path.stem for path in tables.iterdir()}
    assert names == {
        *("what_differs", "runs", "results", "differences_to_odm", "held_out_valid", "selections_ado_seed0"),
        "highest_and_lowest_scored_after_step_10_ado_seed0",
    }
    for name in names:
        latex, markdown = ((tables / f"{name}.{kind}").read_text() for kind in ("tex", "md"))
        assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 1
        assert markdown.startswith("### ")


def test_a_page_allows_nothing_but_its_own_styles_and_pictures(written):
    root, _ = written
    page = (root / "report.html").read_text()
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in page
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page


def test_without_a_folder_for_files_none_is_written(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_report([folder], tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_a_browser_shows_the_page_and_runs_nothing_of_the_data(tmp_path):
    folder = write_run(tmp_path / "run", names=(NASTY, "x"), steps=10)
    (folder / "summary.json").write_text(json.dumps({NASTY: NASTY}))
    page = write_report([folder], tmp_path / "report.html")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = Page(done.stdout)
    assert "<title>run</title>" in done.stdout
    assert "script" not in shown.tags
    assert shown.table(NASTY)
    assert not [line for line in done.stderr.splitlines() if "Refused" in line or "Content Security" in line]
