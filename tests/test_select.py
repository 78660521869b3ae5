"""`python -m dataflex_jax.select`: its files, records to train on, and what it refuses."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from dataflex_jax import select
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.selection.records import chosen_records, write_records
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import select_run, tiny, tiny_chat
from tests.helpers.command import Starter, Trainer, the_error
from tests.helpers.command_line import parsed
from tests.helpers.select_run import SELECTOR


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return select_run.train(root, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def starter(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter") / "starter"
    folder.mkdir()
    trainer = Trainer(folder)
    trainer.recipe.write_text(
        "from pathlib import Path\nfrom tests.helpers import tiny_chat\n\n"
        f"def get_config(kind='less'):\n    return tiny_chat.config(Path({str(root)!r}), **{SELECTOR!r})\n"
    )
    starter = Starter(trainer, "dataflex_jax.select", devices=8)  # so that it compiles nothing anew
    yield starter
    starter.close()


def test_the_command_writes_ids_scores_and_records_to_train_on(root, run, starter, tmp_path):
    folders = {suffix: tmp_path / suffix for suffix in (".jsonl", ".parquet")}
    files = {suffix: folder / f"chosen{suffix}" for suffix, folder in folders.items()}
    output = tmp_path / "new" / "chosen.npz"
    checkpoint = f"--checkpoint={run / 'checkpoints' / '4'}"
    result = starter.run(checkpoint, f"--output={output}", "--num=30", f"--records={files['.jsonl']}", "--group_scores")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("30 of 67 examples, scores ")
    written = dict(np.load(output))
    expected = tiny_chat.selections(run)[4]
    np.testing.assert_allclose(written["all_scores"], expected["all_scores"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(written["scores"], written["all_scores"][written["ids"]])
    assert (np.diff(written["scores"]) <= 0).all()
    names = sorted(tiny_chat.SIZES)
    assert written["groups"].tolist() == names
    np.testing.assert_allclose(written["group_scores"].mean(axis=1), written["all_scores"], rtol=1e-4, atol=1e-6)
    lines = {name: (root / f"{name}.jsonl").read_text().splitlines() for name in names}
    records = [json.loads(lines[names[d]][r]) for d, r in zip(written["domains"], written["records"], strict=True)]
    assert [json.loads(line) for line in files[".jsonl"].read_text().splitlines()] == records
    pool = Pool(open_domains(tiny_chat.config(root).data, progress=False)[0])
    write_records(files[".parquet"], chosen_records(pool, written["ids"]))
    assert pyarrow.parquet.read_table(files[".parquet"]).to_pylist() == records
    for folder in folders.values():
        (domain,), _ = open_domains(tiny_chat.config(folder).data, progress=False)
        assert domain.train.num_rows + domain.valid.num_rows == 30
    train_and_evaluate(tiny_chat.config(folders[".jsonl"], train_step=2), tmp_path / "run")
    assert len(tiny.records(tmp_path / "run", "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output=a.npz",), "--checkpoint is missing: a run folder, the folder of one step in it, or a Hugging Face"),
        (("--checkpoint=RUN", "--output=a.json"), "--output=a.json: must be a file that ends in .npz"),
        (("--checkpoint=RUN",), "--output=None: must be a file that ends in .npz"),
        (("--checkpoint=RUN", "--output=a.npz", "--num=0"), "--num=0"),
        (("--checkpoint=RUN", "--output=a.npz", "--records=a.csv"), "--records=a.csv: must end in .jsonl or .parquet"),
        (("--checkpoint=/no/such", "--output=a.npz"), "--checkpoint=/no/such: neither a run folder"),
        (("--checkpoint=RUN", "--output=a.npz", "--checkpoint_weights=1,2"), "=1,2: one for each of the 1 checkpoints"),
        (("--checkpoint=RUN", "--output=a.npz", "--checkpoint_weights=x"), "--checkpoint_weights=x: must be numbers"),
        (
            ("--checkpoint=RUN", "--output=a.npz", "--config.data.valid_fraction=0.0"),
            "config.targets: group 'capitals' has no rows",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(run, starter, arguments, message):
    result = starter.run(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert result.returncode == 2
    assert message in the_error(result)


@pytest.mark.slow
def test_the_recipe_that_the_message_names_has_a_selector():
    arguments = "--checkpoint=run", "--output=a.npz"
    with (
        parsed(*arguments, command=select),
        pytest.raises(InputError, match=r"^--config is missing, .*configs/less.py"),
    ):
        select.main(["select"])
