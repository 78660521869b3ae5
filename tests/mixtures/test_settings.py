"""Swarms over hyperparameters: each model is what a run of its own would be, and what is written and refused."""

import csv
import json

import numpy as np
import pytest

from dataflex_jax import swarm
from dataflex_jax.errors import InputError
from dataflex_jax.mapped import models
from dataflex_jax.mapped.draws import Draws
from dataflex_jax.mixtures import settings
from dataflex_jax.mixtures.settings import Setting
from tests.helpers import tiny, tiny_chat
from tests.helpers.command_line import parsed

STEPS = 20
VARY = ["mixer.alpha=0.5", "optim.learning_rate=1e-2,3e-3"]
_RECIPE = """
from pathlib import Path
from tests.mixtures.test_settings import small

def get_config():
    return small(Path({root!r}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny.write_domains(tmp_path_factory.mktemp("settings") / "domains")
    (root.parent / "recipe.py").write_text(_RECIPE.format(root=str(root)))
    return root


def small(root, **fields):
    config = tiny.config(root, train_step=STEPS, checkpoint_every=6, eval_rows=10**6, **fields)
    config.model.update(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    config.model.num_hidden_layers = 1
    return config


def run(root, *arguments, output="out"):
    given = [f"--config={root.parent / 'recipe.py'}", f"--output={root.parent / output}"]
    with parsed(*given, *arguments, command=swarm):
        swarm.main(["swarm"])


@pytest.fixture(scope="module")
def written(root):
    """(the folder, the rows of each batch [settings x steps][seeds, B])."""
    asked, load = [], Draws.load

    def spy(self, rows, plans, length=None):
        if length is None:
            asked.append(rows)
        return load(self, rows, plans, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "load", spy)
        run(root, *(f"--vary={text}" for text in VARY), "--seeds=2", "--at_once=2")
    return root.parent / "out", asked


@pytest.mark.slow  # a run of its own is compiled for it; tests/mapped has the same comparison of members
def test_each_model_is_what_it_would_be_alone(root, written, tmp_path, monkeypatch):
    folder, rows = written
    with open(folder / "metrics.csv", newline="") as file:
        measured = {(row["run"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(measured) == 2 * 2
    # The second setting and seed.
    fields = {"mixer__alpha": 0.5, "optim__learning_rate": 3e-3}
    config = small(root, seed=43, mesh__fsdp=1, mesh__data=-1, **fields)
    alone = tiny_chat.trained(config, tmp_path / "run", monkeypatch)
    np.testing.assert_array_equal(alone.rows, [ids[1] for ids in rows[STEPS : 2 * STEPS]])
    figures = tiny.records(tmp_path / "run", "eval.jsonl")[-1]["domains"]
    ours = measured["mixer.alpha=0.5, optim.learning_rate=0.003", "43"]
    for name, of_domain in figures.items():
        assert float(ours[f"nll/{name}"]) == pytest.approx(of_domain["nll"], rel=1e-5)


def test_settings_are_compared_seed_by_seed(written):
    folder, _ = written
    with open(folder / "settings.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["mixer.alpha"], line["optim.learning_rate"]) for line in lines] == [
        ("0.5", "0.01"),
        ("0.5", "0.003"),
    ]
    with open(folder / "metrics.csv", newline="") as file:
        measured = list(csv.DictReader(file))
    bits = [np.mean([float(row[f"bits_per_byte/{name}"]) for name in tiny.DOMAINS]) for row in measured]
    first, other = json.loads((folder / "settings.json").read_text())["settings"]
    assert first["over_the_first"] is None
    np.testing.assert_allclose([first["values"]["42"], first["values"]["43"]], bits[:2])
    change = np.subtract(bits[2:], bits[:2])
    assert other["over_the_first"]["mean"] == pytest.approx(change.mean())
    assert other["over_the_first"]["low"] < change.mean() < other["over_the_first"]["high"]
    assert other["mean"] > first["mean"]  # the smaller rate learns less in so few steps


def test_the_same_command_trains_nothing_and_says_the_same(root, written, monkeypatch, capsys):
    monkeypatch.delattr(models, "train")
    before = (written[0] / "metrics.csv").read_bytes()
    run(root, *(f"--vary={text}" for text in VARY), "--seeds=2")
    assert (written[0] / "metrics.csv").read_bytes() == before
    printed = capsys.readouterr().out
    assert f"2 settings of 2 seeds. Written to {written[0]}: settings.csv, metrics.csv, settings.json." in printed
    lines = [line for line in printed.splitlines() if line.startswith("mixer.alpha")]
    means = [float(line[line.rindex("=") :].split()[1]) for line in lines]
    assert means == sorted(means)


@pytest.mark.slow
def test_a_stop_leaves_what_was_trained(root, monkeypatch, capsys):
    real, calls = models.train, []

    def stopping(together, standing, save, stop_requested, stepped):
        calls.append(1)
        return real(together, standing, save, lambda step: len(calls) == 2 and step == 3, stepped)

    with monkeypatch.context() as patch:
        patch.setattr(models, "train", stopping)
        run(root, f"--vary={VARY[1]}", output="stopped")
    assert "Stopped on request, saved" in capsys.readouterr().out
    assert not (root.parent / "stopped" / "metrics.csv").exists()
    run(root, f"--vary={VARY[1]}", output="stopped")
    assert len(json.loads((root.parent / "stopped" / "settings.json").read_text())["settings"]) == 2


def test_values_are_literals_or_words():
    assert [setting.fields for setting in settings.settings(["config.mixer.variant=paper,exp3"])] == [
        {"mixer.variant": "paper"},
        {"mixer.variant": "exp3"},
    ]
    (made,) = settings.settings(["weighter.quantiles=(0.1,0.9)"])
    assert made == Setting("weighter.quantiles=(0.1, 0.9)", {"weighter.quantiles": (0.1, 0.9)})
    assert [s.fields["mixer.ema"] for s in settings.settings(["mixer.ema=1,None,true,x"])] == [1, None, True, "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vary=mixer.alpha",), r"^--vary=mixer.alpha: FIELD=VALUE,VALUE is expected"),
        (("--vary=mixer.beta=1,2",), r"^--vary=mixer.beta: is no field of this configuration"),
        (("--vary=weighter.r=1,2",), r"^--vary=weighter.r: is no field of this configuration"),
        (("--vary=mixer.alpha=a,b",), r"^--vary=mixer.alpha=a: "),
        (("--vary=mixer.alpha=0.5,2",), r"^config.mixer.alpha = 2.*: must be"),
        (("--vary=mixer.alpha=1,2", "--vary=mixer.alpha=3"), r"^--vary=mixer.alpha: is given twice"),
        (("--vary=mixer.alpha=0.5,0.5",), r"^--vary=mixer.alpha=0.5,0.5: a value is there twice"),
        (("--vary=mixer.name=odm,ado",), r"^--vary=mixer.name: models may not differ in it; fields of mixer, "),
        (("--vary=data.seq_len=32,64",), r"^--vary=data.seq_len: models may not differ in it"),
        (("--vary=seed=1,2",), r"^--vary=seed: --seeds says how many"),
        (("--vary=mixer.alpha=0.5", "--verify=2"), r"^--verify: is for a swarm of mixtures, without --vary"),
        (("--vary=mixer.alpha=0.5", "--runs=64"), r"^--runs: is for a swarm of mixtures, without --vary"),
    ],
)
def test_what_cannot_be_done_is_one_line(root, arguments, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        run(root, *arguments, output=f"refused-{abs(hash(arguments))}")
    assert "\n" not in str(raised.value)
