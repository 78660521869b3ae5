"""Which runs are shown as one, what such groups are called, and curves with bands."""

import json

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.bands import band
from dataflex_jax.reporting.groups import are_single, by_seed, grouped
from dataflex_jax.reporting.run_folder import RunRecords
from tests.helpers.synthetic_run import write_run


def run(folder, seed=0, **fields):
    """A run with fields of its configuration set otherwise."""
    write_run(folder, seed=seed, steps=1)
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (config["config"][section] if section else config["config"])[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return RunRecords.load(folder)


def members(groups):
    return {name: [r.folder.name for r in runs] for name, runs in groups.items()}


def test_runs_that_differ_in_nothing_but_the_seed_are_a_group(tmp_path):
    runs = {
        name: run(tmp_path / name, seed, train_step=steps)
        for name, seed, steps in (("a-seed0", 0, 1), ("b", 0, 2), ("a-seed1", 1, 1), ("c_1", 3, 3), ("c_2", 4, 3))
    }
    groups = grouped(runs)
    assert members(groups) == {"a": ["a-seed0", "a-seed1"], "b": ["b"], "c": ["c_1", "c_2"]}
    assert not are_single(groups)


def test_runs_that_no_seed_tells_apart_stay_single(tmp_path):
    runs = {name: run(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))}
    assert members(grouped(runs)) == {"a": ["a"], "b": ["b"], "c": ["c"]}
    for each in runs.values():
        each.config.clear()
    assert are_single(grouped(runs))


def test_groups_are_told_apart_where_their_runs_names_do_not(tmp_path):
    runs = {
        name: run(tmp_path / name, seed, train_step=steps)
        for name, seed, steps in (("0", 0, 1), ("1", 1, 1), ("x1", 0, 2), ("x2", 1, 2), ("x3", 0, 3), ("x4", 1, 3))
    }
    assert list(grouped(runs)) == ["0 (of 2)", "x1 (of 2)", "x3 (of 2)"]


def test_groups_by_fields_are_named_by_their_values(tmp_path):
    runs = {
        name: run(tmp_path / name, seed, mixer__name=mixer, mixer__alpha=alpha)
        for name, seed, mixer, alpha in (("a", 0, "odm", 0.5), ("b", 1, "odm", 0.9), ("c", 0, "ado", 0.5))
    }
    assert members(grouped(runs, ["mixer.name"])) == {"odm": ["a", "b"], "ado": ["c"]}
    assert list(grouped(runs, ["mixer.name", "mixer.alpha"])) == ["odm, alpha=0.5", "odm, alpha=0.9", "ado, alpha=0.5"]
    with pytest.raises(InputError, match=r"^--group-by=mixr\.name: no run has this field .*nearest are mixer\.name"):
        grouped(runs, ["mixr.name"])


def test_values_have_the_seeds_as_keys_where_they_tell_runs_apart(tmp_path):
    one, two, again = run(tmp_path / "one", 3), run(tmp_path / "two", 4), run(tmp_path / "again", 3)
    assert by_seed([one, two], [1.0, None]) == {3: 1.0}
    assert set(by_seed([one, again], [1.0, 2.0])).isdisjoint(by_seed([one, two], [1.0, 2.0]))


def test_a_band_is_the_mean_and_the_range_at_the_steps_that_all_runs_have():
    curves = [
        (np.array([1, 2, 3, 5]), np.array([1.0, 2.0, 3.0, 5.0])),
        (np.zeros(0, int), np.zeros(0)),
        (np.array([2, 3, 4, 5]), np.array([4.0, 3.0, 9.0, -1.0])),
    ]
    found = band(curves)
    assert found.steps.tolist() == [2, 3, 5]
    assert found.values.tolist() == [3.0, 3.0, 2.0]
    assert found.low.tolist() == [2.0, 3.0, -1.0]
    assert found.high.tolist() == [4.0, 3.0, 5.0]
    alone = band(curves[:2])
    assert alone.low is alone.values is alone.high is curves[0][1]
    assert len(band([]).steps) == 0
