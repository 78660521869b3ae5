"""The commands of the pages are what the commands take; docs/writing_a_policy.md works as it stands."""

import numpy as np
import pytest

from tests.helpers import pages, tiny, tiny_chat
from tests.helpers.command import PROJECT
from tests.helpers.command_line import chosen

SHORT = (
    "--config.train_step=5",
    "--config.warmup_step=2",
    "--config.update_step=2",
    "--config.update_times=1",
    "--config.tensorboard=False",
    "--config.log_every=1",
    "--config.eval_rows=4",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_hidden_layers=1",
    "--config.data.source=local",
    "--config.data.template=mistral",
    "--config.data.tokenizer=bytes",
    "--config.data.batch_size=8",
)


# Those of docs/extending.md run in test_extending.py.
PAGES = sorted({path.name for path in (PROJECT / "docs").glob("*.md")} - {"extending.md"})


@pytest.mark.parametrize("page", ["README.md", *PAGES, "recipes"])
def test_every_training_command_of_a_page_is_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pages.write_code(page, tmp_path)
    for arguments in pages.commands(page):
        if any(argument.startswith("--config=") for argument in arguments):
            chosen(*arguments)


@pytest.mark.slow
def test_the_commands_of_the_page_run_with_its_code(tmp_path):
    pages.write_code("writing_a_policy.md", tmp_path)
    questions = tiny_chat.write_questions(tmp_path / "questions")
    mixed, selected = pages.trained("writing_a_policy.md", tmp_path, *SHORT, f"--config.data.root={questions}")
    lines = tiny.records(mixed, "policy.jsonl")
    weights = np.array([list(line["sampling_weights"].values()) for line in lines])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert (weights[-1] != weights[0]).any()
    lines = tiny.records(selected, "metrics.jsonl")
    np.testing.assert_allclose([line["example_weight_mean"] for line in lines], 1, rtol=1e-5)
    chosen = np.load(selected / "selections/step_00000002.npz")
    assert (np.diff(chosen["scores"]) <= 0).all()
