"""The benchmark of LDS on tiny text: what it writes, and that a finished study is not repeated."""

import json
import shutil

import pytest

from tests.helpers import tiny
from tests.scripts.test_bench import MACHINE, run


@pytest.mark.slow
def test_lds_of_both_tasks(tmp_path):
    root, output, runs = tiny.write_domains(tmp_path / "domains"), tmp_path / "lds.json", tmp_path / "runs"
    for path in sorted(root.glob("*.jsonl")):
        shutil.copy(path, path.with_suffix(".valid.jsonl"))
    arguments = (f"--root={root}", "--subsets=8", f"--runs={runs}", f"--output={output}")
    run("lds.py", *arguments)
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    planted, text = (result["tasks"][name] for name in ("planted", "text"))
    assert list(planted["scores"]) == ["less", "the planted ones"]
    assert list(text["scores"]) == ["less", "less (one score)", "rds", "near", "loss", "the same domain"]
    assert list(text["losses"]) == sorted(tiny.DOMAINS)
    assert (tmp_path / "lds_planted.png").exists()
    assert "| planted: scores | LDS |" in (tmp_path / "README.md").read_text()
    trained = [path.read_bytes() for path in sorted(runs.glob("*/validate/models.json"))]
    assert "as one program" not in run("lds.py", *arguments)
    assert [path.read_bytes() for path in sorted(runs.glob("*/validate/models.json"))] == trained
