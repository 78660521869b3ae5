"""scripts/bench/memory.py says what a run's arrays really take on each device."""

import importlib.util
from pathlib import Path

import jax
import pytest

from dataflex_jax.training.setup import prepared
from tests.helpers import tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "memory.py"


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"lora__rank": 2}, marks=pytest.mark.slow),
        pytest.param({"model__trainable": ("layers/attention/*",)}, marks=pytest.mark.slow),
    ],
)
def test_the_bytes_of_the_arrays_are_those_of_a_run(memory, tmp_path, fields):
    root = tiny.write_domains(tmp_path / "domains")
    config = tiny.config(root, data__domains=tuple(tiny.DOMAINS), **fields)
    estimate, about = memory.measure(config, vocab_size=257)

    def first_device(tree):
        arrays = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    with prepared(config, tmp_path / "run") as (job, state, position):
        assert estimate.parameters == first_device(state.params)
        assert estimate.optimizer == first_device(state.opt_state)
        assert estimate.frozen == first_device(job.step.keywords["fixed"])
        assert (estimate.frozen > 0) == bool(fields)
        plan, _ = job.draws.sampler.plan(position.sampler)
        batch = job.loader.load(job.draws.sequences.ids(plan), plan.drawn_with)
        assert estimate.batch == first_device(batch)
    assert estimate.temporaries > 0
    assert about["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("packing", [False, True])
def test_instruction_data_is_counted_at_its_longest_rows(memory, tmp_path, packing):
    """Two segment rows beside the tokens of packed examples; a row of 48 tokens, not of seq_len = 32."""
    fields = {"data__formatting": "alpaca", "data__cutoff_len": 49, "data__packing": packing, "data__buckets": (24, 48)}
    config = tiny.config(tmp_path, data__domains=("a",), **fields)
    estimate, _ = memory.measure(config, vocab_size=257)
    # One of the 8 devices has 1 of the 8 rows: tokens, mask, domain and length, and the domain's proportion.
    assert estimate.batch == 4 * (49 + 48 + 1 + 1 + 2 * 48 * packing + 1)
