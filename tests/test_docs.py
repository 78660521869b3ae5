"""The code of docs/writing_a_policy.md works as it stands there."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex_jax.train import train_and_evaluate
from tests.helpers import tiny

PAGE = Path(__file__).parents[1] / "docs/writing_a_policy.md"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module with all of the page's code."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "from_the_docs.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    yield "from_the_docs"
    sys.modules.pop("from_the_docs", None)


def test_the_policies_of_the_page_train_together(plugin, tmp_path):
    root = tiny.write_domains(tmp_path / "domains")
    policies = f"progress,selector=hardest,weighter=clip_loss,plugins={plugin}"
    config = tiny.config(root, policies, train_step=5, selector__save_all_scores=True)
    train_and_evaluate(config, tmp_path / "run")
    lines = tiny.records(tmp_path / "run", "metrics.jsonl")
    np.testing.assert_allclose([line["example_weight_mean"] for line in lines], 1, rtol=1e-5)
    chosen = np.load(tmp_path / "run/selections/step_00000002.npz")
    for domain in np.unique(chosen["domains"]):
        scores = chosen["scores"][chosen["domains"] == domain]
        assert (np.diff(scores) <= 0).all()
        assert scores[0] == chosen["all_scores"][chosen["ids"][chosen["domains"] == domain]].max()
