"""Packed rows with selectors, orders and weighters: a row is what is chosen, arranged and weighed; who needs single
examples is refused by name."""

from pathlib import Path

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.policies.active import active_policies
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat
from tests.helpers.command import assert_same_curves
from tests.runs.test_resume import interrupted_at

PACKED = {"data__packing": True, "data__cutoff_len": 128, "data__buckets": (128,), "data__batch_size": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


def test_packed_rows_are_chosen_arranged_and_weighed_and_a_run_goes_on_exactly(root, tmp_path, monkeypatch):
    fields = {"selector__gradient_type": "sgd", "order__scores": "loss", "checkpoint_every": 2, "train_step": 5}
    config = tiny_chat.config(root, selector="less", order="sorting", weighter="loss", **PACKED, **fields)
    whole = tiny_chat.trained(config, tmp_path / "whole", monkeypatch)
    pool = Pool(open_domains(config.data, progress=False)[0])
    assert pool.packed
    assert 2 * pool.num_rows < sum(tiny_chat.SIZES.values())  # several examples a row
    for line, (step, arrays) in zip(whole.decisions(), whole.selections().items(), strict=True):
        assert (line["step"], line["pool"], line["not_finite"]) == (step, pool.num_rows, 0)
        assert arrays["all_scores"].shape == (pool.num_rows,)
        assert "records" not in arrays
        assert set(whole.rows[step : step + 2].ravel()) <= set(arrays["ids"])
        np.testing.assert_array_equal(arrays["lengths"], pool.lengths()[arrays["ids"]])
    metrics = tiny.records(whole.folder, "metrics.jsonl")
    assert metrics[-1]["example_weight_min"] < 1 < metrics[-1]["example_weight_max"]

    run = interrupted_at(2, tmp_path / "whole", tmp_path / "run")
    resumed = tiny_chat.trained(config, run, monkeypatch)
    np.testing.assert_array_equal(resumed.rows, whole.rows[2:])
    assert_same_curves(run, whole.folder)
    tiny_chat.assert_same_selections(run, whole.folder)


@pytest.mark.parametrize(
    ("policies", "fields", "who"),
    [
        *(
            ({"selector": name}, {}, f"selector {name!r} looks at")
            for name in ("near", "tsds", "rds", "coincide", "dsir", "cluster_less")
        ),
        ({"weighter": "field"}, {}, "weighter 'field' looks at"),
        ({"order": "folding"}, {"order__scores": "field:difficulty"}, "order 'folding' goes by 'field:difficulty' of"),
    ],
)
def test_what_needs_single_examples_is_refused_before_data_is_read(policies, fields, who):
    config = tiny_chat.config(Path("/no/such/folder"), **policies, **PACKED, **fields)
    message = rf"^config\.data\.packing = True: {who} single examples; set it to False, or take what goes by the losses"
    with pytest.raises(InputError, match=message) as caught:
        train_and_evaluate(config, "/no/such/run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("selector", ["random", "loss", "delta_loss", "less", "icons", "nice", "greats"])
def test_all_other_selectors_take_packed_rows(selector):
    assert (
        active_policies(tiny_chat.config(Path("/folder"), selector=selector, **PACKED)).names()["selector.name"]
        == selector
    )
