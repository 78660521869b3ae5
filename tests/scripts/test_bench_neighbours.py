"""The benchmarks of neighbours and of TSDS's plan at a tiny size: what they write, not how fast anything is."""

import json

import numpy as np
import pytest

from tests.scripts.test_bench import MACHINE, SCRIPTS, run


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the scripts."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import neighbours
    import tsds

    return neighbours, tsds


def test_both_sides_find_the_same_neighbours(scripts):
    neighbours, _ = scripts
    rng = np.random.default_rng(0)
    targets, candidates = (neighbours.unit_rows(rng, rows, 8) for rows in (5, 90))
    sides = neighbours.searches(None)
    np.testing.assert_array_equal(sides["numpy"](targets, candidates, 7), sides["ours"](targets, candidates, 7))


def test_the_heap_finds_the_plan(scripts):
    """Where no neighbours run out, both have the same probabilities."""
    _, tsds = scripts
    rng = np.random.default_rng(1)
    distances = np.sort(rng.uniform(0, 9, (6, 200)), axis=1)
    densities, ids = rng.uniform(1, 4, distances.shape), rng.permuted(np.tile(np.arange(300), (6, 1)), axis=1)[:, :200]
    found = [side(distances, densities, ids, 300) for side in (tsds.by_search, tsds.by_heap)]
    np.testing.assert_allclose(*found, atol=1e-9)
    assert found[0].sum() == pytest.approx(1)


@pytest.mark.slow
def test_results_are_written_and_shown(tmp_path):
    small = ("--candidates=400", "--rounds=1", "--width=8")
    run("neighbours.py", *small, "--targets=5,9", "--k=4", f"--output={tmp_path / 'neighbours.json'}")
    run("tsds.py", *small, "--targets=9", "--max_k=30", f"--output={tmp_path / 'tsds.json'}")
    found, plan = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("neighbours", "tsds"))
    assert found.keys() >= MACHINE
    assert plan.keys() >= MACHINE
    assert [size["targets"] for size in found["sizes"]] == [5, 9]
    assert plan["max_k"] == 30
    page = (tmp_path / "README.md").read_text()
    assert "| [neighbours](neighbours.json): candidates |" in page
    assert "| [tsds](tsds.json): candidates |" in page


def test_a_list_of_anything_else_than_numbers_is_refused():
    assert run("neighbours.py", "--targets=ten", code=2).startswith("error: --targets=ten: must be a list of integers")
