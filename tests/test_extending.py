"""docs/extending.md works as it stands: one module adds a signal, a source, an evaluator and a family."""

import numpy as np
import pytest

from tests.helpers import pages, tiny


@pytest.mark.slow
def test_the_command_of_the_page_runs_with_all_of_its_code(tmp_path):
    (tmp_path / "my_module.py").write_text("\n".join(pages.code("extending.md")))
    short = (
        "--config.train_step=4",
        "--config.update_times=1",
        "--config.tensorboard=False",
        "--config.eval_every=2",
        "--config.log_every=1",
        "--config.eval_rows=4",
        "--config.data.seq_len=64",
        "--config.data.valid_fraction=0.8",
        "--config.data.batch_size=4",
    )
    (run,) = pages.trained("extending.md", tmp_path, *short)
    evaluations = tiny.records(run, "eval.jsonl")
    assert [(line["step"], line["split"]) for line in evaluations] == [
        (step, split) for step in (2, 4) for split in ("valid", "longest")
    ]
    assert set(evaluations[0]["domains"]) == {"spring", "winter"}
    chosen = np.load(next((run / "selections").glob("*.npz")))
    assert len(chosen["ids"])
    assert (np.diff(chosen["scores"]) <= 0).all()
    config = (run / "config.json").read_text()
    assert "my_llama" in config
