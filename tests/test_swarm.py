"""`python -m dataflex_jax.swarm`: what it writes, that it goes on, other tools' tables, and what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest

from dataflex_jax import swarm
from dataflex_jax.errors import InputError
from dataflex_jax.mapped import models
from dataflex_jax.mixtures import drawing, tables
from dataflex_jax.policies import registry
from dataflex_jax.training.domain_weights import read_weights
from tests.helpers import tiny
from tests.helpers.command_line import parsed
from tests.mixtures import planted

DOMAINS = ["code", "digits", "vowels"]
TARGETS = ["target/vowels", "target/code"]
RUNS, STEPS = 8, 6
_RECIPE = """
from pathlib import Path
from tests.helpers import tiny

def get_config(mixer=""):
    config = tiny.config(Path({root!r}), mixer, train_step={steps}, checkpoint_every=4)
    config.model.update(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    config.model.num_hidden_layers = 1
    config.targets.update(source="local", root={root!r}, domains=("vowels", "code"))
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe."""
    folder = tmp_path_factory.mktemp("swarm")
    root = tiny.write_domains(folder / "domains")
    (folder / "recipe.py").write_text(_RECIPE.format(root=str(root), steps=STEPS))
    return folder


def run(folder, *arguments, recipe="recipe.py", output="out"):
    with parsed(
        f"--config={folder / recipe}", f"--output={folder / output}", f"--runs={RUNS}", *arguments, command=swarm
    ):
        swarm.main(["swarm"])


def from_tables(folder, *arguments, output="fitted"):
    given = [f"--ratios={folder / 'ratios.csv'}", f"--metrics={folder / 'metrics.csv'}", f"--output={folder / output}"]
    with parsed(*given, *arguments, command=swarm):
        swarm.main(["swarm"])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(folder):
    """The folder after a swarm of two seeds with all further runs, and its verification."""
    run(folder, "--seeds=2", "--natural", "--deletions", "--verify=2")
    return folder / "out"


def test_it_writes_the_mixtures_and_what_was_measured(folder, written):
    mixtures, measured = rows(written / "ratios.csv"), rows(written / "metrics.csv")
    names = [f"mixture {n + 1}" for n in range(RUNS)] + ["natural", *(f"without {name}" for name in DOMAINS)]
    assert [row["run"] for row in mixtures] == names
    assert [(row["run"], row["seed"]) for row in measured] == [(name, seed) for name in names for seed in ("42", "43")]
    weights = np.array([[float(row[name]) for name in DOMAINS] for row in mixtures])
    natural = weights[RUNS]
    expected = [mixture.weights for mixture in drawing.drawn(natural, RUNS, 42)]
    np.testing.assert_array_equal(weights[:RUNS], expected)
    assert weights[RUNS + 1][0] == 0
    for row in measured:  # a byte is a token
        for name in (*DOMAINS, *TARGETS):
            nll, bits = float(row[f"nll/{name}"]), float(row[f"bits_per_byte/{name}"])
            assert bits == pytest.approx(nll / np.log(2), rel=0.02)
        # The rows of a target group are those that the domain has in all.
        assert float(row["nll/target/code"]) == pytest.approx(float(row["nll/code"]), rel=0.1)


def test_it_writes_the_law_the_proposal_and_a_picture(written):
    found = json.loads((written / "swarm.json").read_text())
    assert list(found["metrics"]) == [f"bits_per_byte/{name}" for name in TARGETS]
    assert found["runs"] == RUNS + 4
    for figures in found["metrics"].values():
        assert figures["deviation_of_seeds"] > 0
    assert sum(found["proposal"].values()) == pytest.approx(1)
    np.testing.assert_allclose(read_weights(written / "domain_weights.json", DOMAINS), list(found["proposal"].values()))
    assert (written / "swarm.png").read_bytes().startswith(b"\x89PNG")
    assert {name: len(values) for name, values in found["verified"]["values"].items()} == {
        "proposal": 2,
        "natural": 2,
        "uniform": 2,
    }
    for change in found["verified"]["against"].values():
        assert change["low"] <= change["mean"] <= change["high"]


def test_the_same_command_trains_nothing_and_says_the_same(folder, written, monkeypatch, capsys):
    monkeypatch.delattr(models, "train")
    before = {path.name: path.read_bytes() for path in written.glob("*.csv")}
    run(folder, "--seeds=2", "--natural", "--deletions", "--verify=2")
    out = capsys.readouterr().out
    assert "Verified by 2 seeds each, the mean of the metrics: proposal " in out
    assert f"{RUNS + 4} runs. Written to {written}: swarm.json, swarm.png, domain_weights.json." in out
    assert {path.name: path.read_bytes() for path in written.glob("*.csv")} == before


@pytest.mark.slow
def test_a_stopped_swarm_goes_on_to_the_same_tables(folder, written, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(models, "train", _stopping_at(models.train, 3))
        run(folder, output="stopped")
    assert "Stopped on request, saved" in capsys.readouterr().out
    assert not (folder / "stopped" / "ratios.csv").exists()
    run(folder, output="stopped")
    whole = [row for row in rows(written / "metrics.csv") if row["seed"] == "42" and row["run"].startswith("mixture")]
    went_on = rows(folder / "stopped" / "metrics.csv")
    assert [row["run"] for row in went_on] == [row["run"] for row in whole]
    for ours, theirs in zip(went_on, whole, strict=True):
        for name in DOMAINS:
            assert float(ours[f"nll/{name}"]) == pytest.approx(float(theirs[f"nll/{name}"]), rel=1e-5)


def _stopping_at(train, step):
    def stopping(together, standing, save, stop_requested, stepped):
        return train(together, standing, save, lambda done: done == step, stepped)

    return stopping


def test_tables_are_fitted_without_training(folder, written, monkeypatch):
    monkeypatch.delattr(models, "train")
    shutil.copytree(written, folder / "copied")
    from_tables(folder / "copied", f"--prior={written / 'domain_weights.json'}")
    found = json.loads((folder / "copied" / "fitted" / "swarm.json").read_text())
    assert found["prior"] == json.loads((written / "swarm.json").read_text())["proposal"]
    assert found["verified"] is None


@pytest.fixture
def foreign(tmp_path):
    """A folder with another tool's tables of a planted law."""
    runs = planted.runs(40, 0.005)
    lines = [[n, *row] for n, row in enumerate(runs.weights.tolist())]
    tables.write(tmp_path / "ratios.csv", ["index", *runs.domains], lines)
    tables.write(tmp_path / "metrics.csv", ["index", *runs.metrics], [[n, *row] for n, row in enumerate(runs.values)])
    return tmp_path


def test_caps_hold_in_what_is_proposed_of_tables(foreign, capsys):
    from_tables(foreign, output="free")
    free = json.loads((foreign / "free" / "swarm.json").read_text())["proposal"]
    most = max(free, key=free.get)
    tokens = dict.fromkeys(planted.DOMAINS, 1000) | {most: 100}
    (foreign / "tokens.json").write_text(json.dumps({"domains": tokens}))
    from_tables(foreign, f"--tokens={foreign / 'tokens.json'}", "--target_tokens=2000", output="capped")
    capped = json.loads((foreign / "capped" / "swarm.json").read_text())["proposal"]
    assert capped[most] == pytest.approx(4 * 100 / 2000, abs=1e-6)
    assert sum(capped.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs=7",), r"^--runs=7: 8 or more are needed for a law"),
        (("--verify=1",), r"^--verify=1: an interval needs 2 seeds or more"),
        (("--target_tokens=-1",), r"^--target_tokens=-1.0: must be a number > 0"),
        (("--target_tokens=1e12",), r"^--target_tokens=1e\+12: the domains have .* tokens, and each is taken 4 times"),
        (("--config.data.domains=code",), r"^config.data.domains = \('code',\): a mixture has two domains or more"),
        (
            ("--config.data.proportions=0,1,0",),
            r"^config.data.proportions = .*: a mixture has two domains or more above 0",
        ),
        (("--config.data.max_epochs=1",), r"^config.data.max_epochs: models that are trained as one program"),
        (("--config.train_step=9",), r"models.json: its models were trained with config.train_step = 6, not 9"),
        (("--ratios=r.csv",), r"^--metrics is missing: both tables are needed"),
        (("--metrics=m.csv",), r"^--ratios is missing: both tables are needed"),
        (("--ratios=r.csv", "--metrics=m.csv"), r"^--config: is for a swarm that is trained here, without --ratios"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, written, arguments, message):
    with pytest.raises(InputError, match=message) as raised:
        run(folder, *arguments)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_done_with_tables_is_one_line(foreign):
    with pytest.raises(InputError, match=r"^--tokens and --target_tokens: give both or none"):
        from_tables(foreign, "--target_tokens=10")
    (foreign / "tokens.json").write_text('{"domains": {"news": 1, "code": "many"}}')
    with pytest.raises(InputError, match=r"tokens.json: must hold .* with a number for each domain, and 'code' has no"):
        from_tables(foreign, f"--tokens={foreign / 'tokens.json'}", "--target_tokens=10")
    with pytest.raises(InputError, match=r"^--output=/proc/x: cannot be written \(.*\); choose another folder"):
        from_tables(foreign, output="/proc/x")
    with pytest.raises(InputError, match=r"^--output is missing: a folder"), parsed(command=swarm):
        swarm.main(["swarm"])


@pytest.mark.parametrize(
    ("mixer", "field", "value"),
    [
        ("odm", "initial_proportions", "uniform"),
        ("static", "proportions", (1.0, 2.0, 3.0)),
        ("ado", "prior", "uniform"),
    ],
)
def test_a_mixer_with_proportions_of_its_own_is_refused(folder, written, mixer, field, value):
    arguments = [f"--config.mixer.{field}={value}"]
    with pytest.raises(
        InputError, match=rf"^config.mixer = '{mixer}': begins with code 0.\d+, .* whatever the mixture"
    ):
        run(folder, *arguments, recipe=f"recipe.py:{mixer}", output=f"out-{mixer}")


# DoReMi needs a reference model, dynamic_moe a mixture of experts.
@pytest.mark.parametrize("mixer", [name for name in registry.names("mixer") if name not in ("doremi", "dynamic_moe")])
def test_every_mixer_begins_with_a_models_own_mixture(folder, mixer, monkeypatch):
    monkeypatch.setattr("dataflex_jax.mixtures.swarm.train_and_measure", lambda *_, **__: None)
    run(folder, recipe=f"recipe.py:{mixer}", output=f"out-{mixer}")
