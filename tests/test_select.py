"""`python -m dataflex_jax.select`: the choice of training without training, and records to train on."""

import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from dataflex_jax import select
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.policies.selectors.delta_loss import in_window
from dataflex_jax.selection.records import chosen_records, write_records
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.training import optim
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat
from tests.helpers.command import Starter, Trainer, the_error

SELECTOR = {"selector": "less", "selector__save_all_scores": True, "selector__group_agg": "mean"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Checkpoints after 2, 4 and 5 steps, choices after 2 and 4; the learning rate falls."""
    folder = tmp_path_factory.mktemp("run")
    schedule = {"warmup_step": 2, "update_step": 2, "checkpoint_every": 2, "train_step": 5}
    train_and_evaluate(tiny_chat.config(root, **SELECTOR, **schedule, optim__schedule="linear"), folder)
    return folder


@pytest.fixture(scope="module")
def starter(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter") / "starter"
    folder.mkdir()
    trainer = Trainer(folder)
    trainer.recipe.write_text(
        "from pathlib import Path\nfrom tests.helpers import tiny_chat\n\n"
        f"def get_config(kind='less'):\n    return tiny_chat.config(Path({str(root)!r}), **{SELECTOR!r})\n"
    )
    starter = Starter(trainer, "dataflex_jax.select")
    yield starter
    starter.close()


def at(run, *steps):
    return [str(run / "checkpoints" / str(step)) for step in steps]


def test_the_scores_are_those_of_training(root, run):
    for step in (2, 4):
        _, chosen = select.select(tiny_chat.config(root, **SELECTOR), at(run, step), None, 16)
        trained = tiny_chat.selections(run)[step]
        np.testing.assert_allclose(chosen.all_scores, trained["all_scores"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(chosen.ids, trained["ids"])
        np.testing.assert_allclose(chosen.scores, trained["scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_checkpoints_are_a_weighted_sum(root, run):
    first, second = (tiny_chat.selections(run)[step]["all_scores"] for step in (2, 4))
    config = tiny_chat.config(root, **SELECTOR)
    _, chosen = select.select(config, at(run, 2, 4), [0.25, 2.0], 5)
    expected = 0.25 * first + 2.0 * second
    np.testing.assert_allclose(chosen.all_scores, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chosen.ids, np.argsort(-expected, kind="stable")[:5])
    _, default = select.select(config, at(run, 2, 4), None, 5)
    # Falling to 0 in 5 steps: the update before checkpoint 2 had 4/5 of the highest rate, the one before 4 had 2/5.
    np.testing.assert_allclose(default.all_scores, (2 * first + second) / 3, rtol=1e-5, atol=1e-6)


def test_learning_rates_of_checkpoints(root, run):
    np.testing.assert_allclose(select.learning_rates(at(run, 2, 4)), [2 / 3, 1 / 3], rtol=1e-6)
    rate = optim.learning_rate(tiny_chat.config(root, optim__schedule="linear").optim, 5)
    assert rate(1) / rate(3) == pytest.approx(2)


def test_other_selectors_take_the_last_checkpoint_and_the_first_as_baseline(root, run, monkeypatch):
    losses, original = [], SweptRows.sweep
    monkeypatch.setattr(SweptRows, "sweep", lambda *args: losses.append(original(*args)) or losses[-1])
    config = tiny_chat.config(root, selector="delta_loss", selector__window_size=0.5)
    _, chosen = select.select(config, at(run, 2, 5), None, 8)
    first, last = losses
    assert last.mean() < first.mean()
    inside = np.asarray(in_window(jnp.asarray(first - last), 1, 1, 0.5))
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(chosen.all_scores == chosen.all_scores.max(), inside)


def test_one_checkpoint_is_in_memory_at_a_time(root, run, monkeypatch):
    reads = []
    original = select.open_model

    def opened(source, *args, **options):
        gc.collect()
        assert not any(alive() for _, alive in reads)
        model = original(source, *args, **options)
        reads.append((source, weakref.ref(jax.tree.leaves(model.model.params)[0])))
        return model

    monkeypatch.setattr(select, "open_model", opened)
    select.select(tiny_chat.config(root, **SELECTOR), at(run, 2, 4), None, 5)
    second, fourth = at(run, 2, 4)
    assert [source for source, _ in reads] in ([second, fourth], [fourth, second, fourth])


def test_the_command_writes_ids_scores_and_records_to_train_on(root, run, starter, tmp_path):
    folders = {suffix: tmp_path / suffix for suffix in (".jsonl", ".parquet")}
    files = {suffix: folder / f"chosen{suffix}" for suffix, folder in folders.items()}
    output = tmp_path / "new" / "chosen.npz"
    checkpoint = f"--checkpoint={run / 'checkpoints' / '4'}"
    result = starter.run(checkpoint, f"--output={output}", "--num=30", f"--records={files['.jsonl']}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("30 of 67 examples, scores ")
    written = dict(np.load(output))
    expected = tiny_chat.selections(run)[4]
    # Eight devices there, one here.
    np.testing.assert_allclose(written["all_scores"], expected["all_scores"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(written["scores"], written["all_scores"][written["ids"]])
    assert (np.diff(written["scores"]) <= 0).all()
    names = sorted(tiny_chat.SIZES)
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


def test_records_of_several_kinds_keep_all_their_fields(tmp_path):
    records = [{"instruction": "a"}, {"output": "b", "instruction": "c"}]
    for name in ("x.jsonl", "x.parquet"):
        write_records(tmp_path / name, iter(records))
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == records
    read = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert read == [{"instruction": "a", "output": None}, {"instruction": "c", "output": "b"}]


def test_by_default_a_twentieth_is_chosen(root, run):
    pool, chosen = select.select(tiny_chat.config(root, **SELECTOR), at(run, 5), None, None)
    assert len(chosen.ids) == round(0.05 * pool.num_rows) == 3


def test_more_than_there_are_repeats_every_candidate_equally(root, run):
    pool, chosen = select.select(tiny_chat.config(root, selector="random"), at(run, 5), None, 150)
    assert set(np.bincount(chosen.ids, minlength=pool.num_rows)) == {2, 3}


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


def test_a_selector_that_scores_is_needed(root, run):
    for options in ({}, {"selector": "full"}):
        with pytest.raises(InputError, match="--config: needs a selector that scores"):
            select.select(tiny_chat.config(root, **options), at(run, 5), None, 5)


def test_rows_of_documents_have_no_records(tmp_path, run):
    documents = tiny.write_domains(tmp_path / "documents", characters=1800, names=("digits", "vowels"))
    with pytest.raises(InputError, match="--records: rows of documents are no records"):
        select.select(tiny_chat.documents(documents, selector="random"), at(run, 5), None, 5, records=True)


def test_records_of_several_formats_are_refused_before_anything_is_scored(tmp_path, run):
    alpaca = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(30)]
    messages = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(30)
    ]
    (tmp_path / "a.json").write_text(json.dumps(alpaca))
    (tmp_path / "b.json").write_text(json.dumps(messages))
    entries = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    config = tiny_chat.config(tmp_path, selector="random", data__source="dataset_info", data__formatting=None)
    with pytest.raises(InputError, match="--records: 'a' and 'b' have other formats or columns"):
        select.select(config, at(run, 5), None, 5, records=True)
