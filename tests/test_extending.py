"""The code of docs/extending.md works as it stands: one module adds a signal, a source, an evaluator and a family."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny

PAGE = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module with all of the page's code."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_module.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_module"
    sys.modules.pop("my_module", None)


def test_a_run_with_all_of_the_page(plugin, tmp_path):
    config = tiny.config(
        tmp_path,
        f"static,selector=surprising,plugins={plugin}",
        train_step=6,
        eval_every=3,
        evaluators=("held_out", "longest"),
        data__source="haiku",
        data__root=None,
        data__domains=None,
        data__valid_fraction=0.2,
        model__architecture="my_llama",
        selector__save_all_scores=True,
    )
    train_and_evaluate(config, tmp_path / "run")
    evaluations = tiny.records(tmp_path / "run", "eval.jsonl")
    assert [(line["step"], line["split"]) for line in evaluations] == [
        (step, split) for step in (3, 6) for split in ("valid", "longest")
    ]
    assert set(evaluations[0]["domains"]) == {"spring", "winter"}
    chosen = np.load(next((tmp_path / "run/selections").glob("*.npz")))
    for domain in (0, 1):
        scores = chosen["scores"][chosen["domains"] == domain]
        assert (np.diff(scores) <= 0).all()
    assert "longest" in (tmp_path / "run/config.json").read_text()
