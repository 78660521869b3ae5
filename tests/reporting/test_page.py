"""The page of one run and of several: its tables and pictures, and that it stands alone."""

import base64
import json
import os
from html.parser import HTMLParser

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.page import write_report
from dataflex_jax.reporting.plot_style import Chart
from tests.helpers.synthetic_run import write_run


class Page(HTMLParser):
    """The rows of each table (text, classes of the cell), the headings, and every address the page refers to."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.headings, self.addresses, self.tags = [], [], [], []
        self._into = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attrs[key] for key in ("src", "srcset", "href") if key in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._into = [attrs.get("class", ""), ""]
            self.tables[-1][-1].append(self._into)
        elif tag == "h2":
            self._into = ["", ""]
            self.headings.append(self._into)

    def handle_data(self, data):
        if self._into is not None:
            self._into[1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th", "h2"):
            self._into = None

    def table(self, first_row_label):
        """{row label: [(text, is best)]} of the first table that has such a row."""
        for table in self.tables:
            rows = {row[0][1]: [(text, "best" in classes) for classes, text in row[1:]] for row in table}
            if first_row_label in rows:
                return rows
        raise AssertionError(f"no table with a row {first_row_label}")


@pytest.fixture
def undrawn(monkeypatch):
    """Empty pictures, where the page's text is asked for: drawing takes most of the time."""
    monkeypatch.setattr(Chart, "drawn", lambda chart, kind: b"")


def report(tmp_path, *folders):
    return Page(write_report(folders, tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def evals_only(folder):
    """Leaves the run little to draw, which takes most of the time."""
    (folder / "metrics.jsonl").unlink()
    (folder / "policy.jsonl").unlink(missing_ok=True)
    (folder / "times.jsonl").unlink()
    return folder


def test_one_run(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "policy.jsonl", "a") as file:
        file.write('{"step": 20, "policy": "less", "coverage": 0.1, "domain_share": {"books": 0.5, "web": 0.5}}\n')
    page = report(tmp_path, folder)
    headings = [text for _, text in page.headings]
    assert headings[:3] == ["Configuration", "Run", "Held out: valid"]
    selections = "Selections by domain, coverage and overlap"
    assert {"Loss", "Loss by domain", "Mixture", selections, "Throughput"} <= set(headings)
    rows = page.table("books")
    # 2 + i / 10 + 6 exp(-4) at step 20.
    assert rows["books"][0] == ("2.1099", False)
    assert rows["web"][0] == ("2.3099", False)
    assert not any(best for cells in rows.values() for _, best in cells)


@pytest.mark.usefixtures("undrawn")
def test_several_runs_are_compared_and_the_best_is_marked(tmp_path):
    static = write_run(tmp_path / "static", mixer=False, offset=0.1)
    other = write_run(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    config["config"]["train_step"] = 21
    (other / "config.json").write_text(json.dumps(config))
    page = report(tmp_path, write_run(tmp_path / "odm"), static, other)
    rows = page.table("books")
    # nll, perplexity, bits/byte of three runs; the first and the third have equal losses.
    for name in ("books", "code", "web", "overall"):
        assert [best for _, best in rows[name]] == [True, False, True] * 3
    assert [text for text, _ in rows["books"][:3]] == ["2.1099", "2.2099", "2.1099"]
    differences = page.table("mixer.name")
    assert [text for text, _ in differences["mixer.name"]] == ["odm", "—", "odm"]
    assert [text for text, _ in differences["seed"]] == ["0", "0", "1"]
    assert "data.seq_len" not in differences
    assert {"Shared configuration", "What differs", "Held-out nll by domain"} <= {text for _, text in page.headings}


def test_a_second_evaluator_has_its_own_table_and_picture(tmp_path):
    page = report(tmp_path, evals_only(write_run(tmp_path / "run", evaluator="mmlu")))
    headings = [text for _, text in page.headings]
    assert headings[1:4] == ["Held out: valid", "Held out: mmlu", "mmlu over steps"]
    assert page.tables[0][0][0][1] == "domain"
    rows = page.table("law")
    assert [text for text, _ in rows["group"]] == ["accuracy", "length"]
    assert rows["algebra"] == [("0.4500 ± 0.0123", False), ("—", False)]
    assert rows["law"] == [("0.5500 ± 0.0123", False), ("—", False)]
    assert rows["overall"] == [("0.5000 ± 0.0123", False), ("12.35", False)]
    # The groups of an evaluator are no domains of the run.
    assert "law" not in page.table("books")


@pytest.mark.usefixtures("undrawn")
def test_the_highest_accuracy_is_the_best_and_of_an_unknown_metric_none_is(tmp_path):
    folders = [
        evals_only(write_run(tmp_path / name, evaluator="mmlu", offset=offset))
        for name, offset in (("low", 0.0), ("high", 0.2), ("also high", 0.2))
    ]
    rows = report(tmp_path, *folders).table("law")
    assert [best for _, best in rows["algebra"]] == [False, True, True] + [False] * 3
    assert [best for _, best in rows["overall"]] == [False, True, True] + [False] * 3
    assert [text for text, _ in rows["overall"][3:]] == ["12.35", "12.55", "12.55"]


def test_an_evaluator_without_domains_has_a_row_and_one_without_overall_has_none(tmp_path):
    folder = evals_only(write_run(tmp_path / "run"))
    lines = [
        {"split": "exam", "domains": {}, "overall": {"exact_match": 0.5, "exact_match_stderr": None}},
        {"split": "<poll>", "domains": {"a": {"tokens": 7, "mood": -1e-7}}, "overall": None},
        {"split": "counts", "domains": {}, "overall": {"samples": 3}},
    ]
    with open(folder / "eval.jsonl", "a") as file:
        file.writelines(json.dumps({"step": 20, **line}) + "\n" for line in lines)
    page = report(tmp_path, folder)
    held_out = [text for _, text in page.headings if text.startswith("Held out: ")]
    assert held_out == ["Held out: valid", "Held out: exam", "Held out: <poll>"]
    exam, poll = [[[text for _, text in row] for row in table] for table in page.tables[1:3]]
    assert exam == [["group", "exact match"], ["overall", "0.5000"]]
    assert poll == [["group", "mood"], ["a", "-1e-07"]]
    # One evaluation makes no curve.
    assert "exam over steps" not in {text for _, text in page.headings}


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_evaluations_does_not_hinder_the_comparison(tmp_path):
    begun = evals_only(write_run(tmp_path / "begun", steps=2))
    page = report(
        tmp_path, evals_only(write_run(tmp_path / "a")), begun, evals_only(write_run(tmp_path / "b", offset=0.1))
    )
    assert [best for _, best in page.table("books")["overall"]] == [True, False, False] * 3


@pytest.mark.usefixtures("undrawn")
def test_overall_is_not_compared_across_other_domains(tmp_path):
    page = report(
        tmp_path,
        evals_only(write_run(tmp_path / "a")),
        evals_only(write_run(tmp_path / "b", names=("books", "code"), offset=0.1)),
    )
    rows = page.table("books")
    assert rows["books"][0][1]
    assert not rows["books"][1][1]
    assert rows["web"][:2] == [("2.3099", False), ("—", False)]
    assert not any(best for _, best in rows["overall"])


@pytest.mark.usefixtures("undrawn")
def test_other_tokenizers_are_pointed_out(tmp_path):
    one, other = (evals_only(write_run(tmp_path / name, evaluator="mmlu")) for name in ("one", "other"))
    output = tmp_path / "report.html"
    assert "different tokenizers" not in write_report([one, other], output).read_text()
    config = json.loads((other / "config.json").read_text())
    config["config"]["data"]["tokenizer"] = "another"
    (other / "config.json").write_text(json.dumps(config))
    assert write_report([one, other], output).read_text().count("different tokenizers") == 1


def test_the_page_stands_alone(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert page.addresses
    assert "script" not in page.tags
    assert "link" not in page.tags
    for address in page.addresses:
        head, _, data = address.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    # Every picture in a dark and a light form.
    assert page.tags.count("img") == page.tags.count("source") == len(set(page.addresses)) / 2
    assert "url(" not in (tmp_path / "out" / "report.html").read_text()


def test_text_is_escaped(tmp_path):
    nasty = "<script>alert('1')</script>"
    folder = write_run(tmp_path / "a&b", names=(nasty, "x"))
    (folder / "summary.json").write_text(json.dumps({nasty: nasty}))
    (folder / "config.json").write_text(json.dumps({"config": {"model": {"name_or_path": nasty}}}))
    page = report(tmp_path, folder)
    assert "script" not in page.tags
    assert page.table(nasty)[nasty][0][0] == "2.1099"
    assert "a&amp;b" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    page = report(
        tmp_path, evals_only(write_run(tmp_path / "x" / "run")), evals_only(write_run(tmp_path / "y" / "run"))
    )
    assert [text for _, text in page.tables[0][1]] == ["domain", *["x/run", "y/run"] * 3]


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    page = report(tmp_path, folder)
    assert "img" not in page.tags


@pytest.mark.usefixtures("undrawn")
def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, output = write_run(tmp_path / "run"), tmp_path / "pages" / "report.html"
    output.parent.mkdir()
    output.write_text("before")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report([folder], output)
    assert output.read_text() == "before"
    assert os.listdir(output.parent) == ["report.html"]


@pytest.mark.usefixtures("undrawn")
def test_bad_input_is_one_line(tmp_path):
    good = write_run(tmp_path / "good")
    output = tmp_path / "report.html"
    with pytest.raises(InputError, match=r"no run given; usage: "):
        write_report([], output)
    with pytest.raises(InputError, match=r"same run folder is given twice"):
        write_report([good, tmp_path / "." / "good"], output)
    with pytest.raises(InputError, match=r"--output=.*cannot be written"):
        write_report([good], tmp_path)
    with open(good / "metrics.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:21: not valid JSON") as error:
        write_report([good], output)
    assert "\n" not in str(error.value)
    assert not output.exists()
