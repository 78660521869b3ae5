"""What an estimate says of bytes is what a run's arrays take; of a card, what its figures make of it."""

import dataclasses

import jax
import pytest

from dataflex_jax.aot import hlo
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.cost import Cost, Work
from dataflex_jax.aot.estimate import USABLE, Estimate, Memory, estimate, per_device
from dataflex_jax.aot.programs import program
from dataflex_jax.training.setup import prepared
from tests.helpers import tiny


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"lora__rank": 2}, marks=pytest.mark.slow),
        pytest.param({"model__trainable": ("layers/attention/*",)}, marks=pytest.mark.slow),
    ],
)
def test_the_bytes_of_the_arrays_are_those_of_a_run(tmp_path, fields):
    root = tiny.write_domains(tmp_path / "domains")
    config = tiny.config(root, data__domains=tuple(tiny.DOMAINS), **fields)
    found = estimate("train", config, None, 8, vocab_size=257)

    def first_device(tree):
        arrays = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    with prepared(config, tmp_path / "run") as (job, state, position):
        assert found.memory.parameters == first_device(state.params)
        assert found.memory.optimizer == first_device(state.opt_state)
        assert found.memory.frozen == first_device(job.step.keywords["fixed"])
        assert (found.memory.frozen > 0) == bool(fields)
        plan, _ = job.draws.sampler.plan(position.sampler)
        batch = job.loader.load(job.draws.sequences.ids(plan), plan.drawn_with)
        assert found.memory.batch == first_device(batch)
        assert found.program.model_flops == 8 * 32 * job.log.flops_per_token
    assert found.memory.temporaries > 0
    assert found.to_json()["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert found.to_json()["platform"] == "cpu"
    assert (found.fits, found.mfu_ceiling, found.tokens_per_second) == (None, None, None)


@pytest.mark.parametrize("packing", [False, True])
def test_instruction_data_is_counted_at_its_longest_rows(tmp_path, packing):
    """Two segment rows beside the tokens of packed examples; a row of 48 tokens, not of seq_len = 32."""
    fields = {"data__formatting": "alpaca", "data__cutoff_len": 49, "data__packing": packing, "data__buckets": (24, 48)}
    config = tiny.config(tmp_path, data__domains=("a",), **fields)
    batch = program("train", config, jax.devices(), 257).held["batch"]
    # One of the 8 devices has 1 of the 8 rows: tokens, mask, domain and length, and the domain's proportion.
    assert per_device(batch) == 4 * (49 + 48 + 1 + 1 + 2 * 48 * packing + 1)


def test_a_sweep_holds_the_state_of_the_run_and_its_directions(tmp_path):
    config = tiny.config(tmp_path, data__domains=("a",))
    found = estimate("influences", config, None, 8, vocab_size=257).memory
    assert found.optimizer == found.parameters * 2 + 8  # two moments and two counters
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert found.directions == 8 * 4 * linear // 8
    assert found.results == 4 * 8 * 8  # an influence along each of 8 directions of each of 8 rows, on every device


def test_the_ceiling_is_the_models_flops_over_what_the_roofline_allows(tmp_path):
    made = program("train", tiny.config(tmp_path, data__domains=("a",)), jax.devices(), 257)
    card = CARDS["h100"]
    product = hlo.Instruction("p", (), "dot", (), "", "", True)
    computing = Work(product, 2, {"bf16": 1e12}, 10, 0.25)
    cost = Cost((computing,), ())
    found = Estimate(made, Memory(parameters=3, temporaries=4), card, cost)
    assert found.memory.peak == 7
    assert found.mfu_ceiling == pytest.approx(made.model_flops / 8 / (0.5 * card.peak_flops))
    assert found.tokens_per_second == 8 * 32 / 0.5
    assert found.fits
    most = int(USABLE * card.memory)
    assert dataclasses.replace(found, memory=Memory(optimizer=most)).fits
    assert not dataclasses.replace(found, memory=Memory(optimizer=most + 1)).fits
    scored = dataclasses.replace(found, program=made._replace(model_flops=None))
    assert scored.mfu_ceiling is None
    assert scored.to_json()["model_flops"] is None
