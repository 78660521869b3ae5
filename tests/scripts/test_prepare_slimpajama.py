import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dataflex_jax.data.stores.documents import open_document_stores

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_slimpajama.py"
SETS = ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")
NAMES = ["commoncrawl", "c4", "github", "book", "arxiv", "wikipedia", "stackexchange"]


def run(*flags):
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [
        json.dumps({"text": f"{name} {i}", "meta": {"redpajama_set_name": f"RedPajama{name}"}})
        for i in range(20)
        for name in SETS
    ]
    (folder / "chunk.jsonl").write_text("\n".join(lines))
    return folder


def options(root, cache):
    return [
        "--config=configs/odm.py:slimpajama-6b",
        "--config.data.source=local",
        f"--config.data.root={root}",
        "--config.data.tokenizer=bytes",
        f"--config.data.cache_dir={cache}",
        "--config.data.valid_fraction=0.3",
    ]


def test_builds_the_store_that_the_trainer_finds(tmp_path, root):
    done = run(*options(root, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows[1:9]] == [*NAMES, "total"]
    saved = json.loads((tmp_path / "cache" / "rows_store.json").read_text())
    assert list(saved["domains"]) == NAMES
    for domain in saved["domains"].values():
        assert domain["train"]["documents"] + domain["valid"]["documents"] == 20
    before = sorted((tmp_path / "cache" / "stores").iterdir())
    stores, _ = open_document_stores(ConfigDict(saved["data"]), progress=False)
    assert sorted((tmp_path / "cache" / "stores").iterdir()) == before
    assert [store.path for store in stores] == [domain["path"] for domain in saved["domains"].values()]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.root=missing", "missing"),
        ("--config.data.domain_field=meta.name", "meta.name"),
        ("--config.data.sauce=x", "no such field"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, root, flag, message):
    done = run(*options(root, tmp_path / "cache"), flag)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
