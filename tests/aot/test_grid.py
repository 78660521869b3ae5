import types

import pytest

from dataflex_jax.aot import grid, words
from dataflex_jax.aot.estimate import Memory
from dataflex_jax.configs import base
from dataflex_jax.errors import InputError


def made(speed, fits=True):
    """What the sweep looks at of an estimate."""
    cost = types.SimpleNamespace(roofline_seconds=0.2, exposed_seconds=0.01)
    memory = Memory(parameters=2**30)
    return types.SimpleNamespace(tokens_per_second=speed, fits=fits, memory=memory, cost=cost, mfu_ceiling=0.5)


def test_every_choice_of_values():
    assert list(grid.variants({"a": [1, 2], "b": ["x"]})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]


def test_other_fields_leave_the_configuration_as_it_is():
    config = base.get_config()
    other = grid.having(config, {"model.remat": "dots", "data.batch_size": 8})
    assert (other.model.remat, other.data.batch_size, config.model.remat) == ("dots", 8, "full")
    with pytest.raises(InputError, match=r"model\.remtt='dots'"):
        grid.having(config, {"model.remtt": "dots"})
    with pytest.raises(InputError, match=r"data\.batch_size='many'"):
        grid.having(config, {"data.batch_size": "many"})


def test_what_cannot_be_is_a_row_with_its_reason():
    def of(fields):
        if fields["n"] == 2:
            raise InputError("n = 2:\nnot so many")
        return made(fields["n"])

    rows = grid.tried(of, [{"n": 1}, {"n": 2}, {"n": 3}])
    assert [row.reason for row in rows] == [None, "InputError: n = 2: not so many", None]
    assert rows[1].to_json() == {"fields": {"n": 2}, "reason": "InputError: n = 2: not so many"}
    lines = words.table(rows).splitlines()
    assert lines[0].split() == ["n", "GiB", "fits", "roofline", "ms", "exposed", "ms", "MFU", "<=", "tokens/s", "<="]
    assert lines[1].split() == ["1", "1.0", "yes", "200.0", "10.0", "50.0", "%", "1"]
    assert " ".join(lines[2].split()) == "2 InputError: n = 2: not so many"


def test_the_fastest_that_fits_is_best():
    rows = [
        grid.Tried({"devices": 1, "rows": 4}, made(10)),
        grid.Tried({"devices": 1, "rows": 8}, made(20)),
        grid.Tried({"devices": 1, "rows": 16}, made(30, fits=False)),
        grid.Tried({"devices": 8, "rows": 4}, reason="no"),
        grid.Tried({"devices": 32, "rows": 4}, made(5)),
    ]
    assert grid.best_of_each(rows, ("shape", "devices")) == [rows[1], rows[4]]
    assert grid.best_of_each(rows[2:4], ("devices",)) == []


def test_paths_are_shown_by_their_last_part():
    row = grid.Tried({"shape": "/data/configs/Qwen2.5-0.5B", "rows": 4}, reason="no")
    assert row.to_json()["fields"] == {"shape": "Qwen2.5-0.5B", "rows": 4}
    assert words.table([row]).splitlines()[1].split() == ["Qwen2.5-0.5B", "4", "no"]
