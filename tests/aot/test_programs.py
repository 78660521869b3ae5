"""What XLA's GPU compiler makes of the project's programs: 8 x H100, a small model that cuDNN's attention takes."""

import jax
import pytest

from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.programs import KINDS, NEW_TOKENS, program
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import REMAT_POLICIES
from tests.helpers.gpu_programs import (
    DEVICES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYER_WEIGHTS,
    LAYERS,
    LENGTH,
    ROWS,
    TABLE,
    TOKENS,
    VOCAB,
    WIDTH,
    gpu_program,
    memory,
    moved,
    needs_compiler,
    small,
)

slow = pytest.mark.slow
PACKED = {"data__formatting": "alpaca", "data__packing": True}


@needs_compiler
@pytest.mark.parametrize(
    "remat", [policy if policy in ("full", "dots") else pytest.param(policy, marks=slow) for policy in REMAT_POLICIES]
)
def test_cudnns_forward_pass_runs_again_only_where_nothing_is_kept(remat):
    compiled = gpu_program(model__remat=remat)
    assert compiled.attentions == (LAYERS * (2 if remat == "full" else 1), LAYERS)


@needs_compiler
@pytest.mark.parametrize("fields", [{}, {"model__remat": "dots"}, {"lora__rank": 8}], ids=["full", "dots", "lora"])
def test_training_multiplies_bfloat16_alone(fields):
    assert set(gpu_program(**fields).cost.flops) == {"bf16"}


@needs_compiler
def test_dots_compute_little_twice_and_full_the_blocks():
    """Neither computes the logits a second time."""
    full, dots = gpu_program(), gpu_program(model__remat="dots")
    model = dots.estimate.program.model_flops / DEVICES
    logits = 2 * TOKENS * TABLE
    blocks = (model - 3 * logits) / 3
    assert dots.cost.flops["bf16"] == pytest.approx(model, abs=0.1 * logits + 0.1 * blocks)
    assert dots.cost.flops["bf16"] + 0.6 * blocks < full.cost.flops["bf16"] <= model + 0.1 * logits + 1.1 * blocks


@needs_compiler
def test_remat_policies_take_more_memory_one_after_the_other():
    assert memory(gpu_program()) < memory(gpu_program(model__remat="dots"))


@needs_compiler
@slow
def test_all_remat_policies_take_more_memory_one_after_the_other():
    taken = [memory(gpu_program(model__remat=remat)) for remat in ("full", "attention", "dots", "none")]
    assert taken == sorted(taken)


@needs_compiler
def test_zero_gathers_bfloat16_once_a_pass_and_scatters_gradients_once():
    compiled = gpu_program()
    # A layer's weights forward and backward; of tied embeddings the head's, for both passes of the loss.
    assert moved(compiled, "all-gather", "bf16") == 2 * (2 * LAYERS * LAYER_WEIGHTS + TABLE)
    assert moved(compiled, "reduce-scatter", "bf16") == 2 * LAYERS * LAYER_WEIGHTS
    assert moved(compiled, "reduce-scatter", "f32") <= 4 * TABLE
    # Norms, biases and what the metrics sum.
    assert compiled.cost.collective_bytes["all-reduce"] < 100_000


@needs_compiler
def test_adapters_gather_the_frozen_base_and_scatter_nothing():
    compiled = gpu_program(lora__rank=8)
    assert compiled.attentions == (2 * LAYERS, LAYERS)
    assert moved(compiled, "all-gather", "bf16") == 2 * (2 * LAYERS * LAYER_WEIGHTS + TABLE)
    assert "reduce-scatter" not in compiled.cost.collective_bytes
    assert compiled.cost.flops["bf16"] < gpu_program().cost.flops["bf16"]


@needs_compiler
@pytest.mark.parametrize("fields", [{}, {"model__remat": "dots"}, {"lora__rank": 8}], ids=["full", "dots", "lora"])
def test_no_array_has_all_logits(fields):
    """Not even inside a fusion."""
    largest = max(array.numbers for array in gpu_program(**fields).module.arrays())
    assert largest < TOKENS * VOCAB


@needs_compiler
def test_generation_reads_prompts_with_cudnn_and_gathers_no_weights_in_float32():
    compiled = gpu_program("generate")
    assert compiled.attentions == (LAYERS, 0)
    assert set(compiled.cost.flops) == {"bf16"}
    # The log-probabilities that come out.
    assert moved(compiled, "all-gather", "f32") == 4 * ROWS * NEW_TOKENS
    assert compiled.cost.unknown_loops == 1


@needs_compiler
def test_norms_run_one_backward_pass():
    compiled = gpu_program("norms")
    assert compiled.attentions == (2 * LAYERS, LAYERS)
    assert set(compiled.cost.flops) == {"bf16"}
    # Products of a row's inputs and output gradients with themselves take the place of a weight's gradient.
    assert compiled.cost.flops["bf16"] < 1.5 * gpu_program().cost.flops["bf16"]


@needs_compiler
@slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("train", "generate", "norms")])
def test_every_kind_of_pass_over_rows_compiles(kind):
    compiled = gpu_program(kind)
    forward, backward = compiled.attentions
    assert forward >= LAYERS
    assert backward == (0 if kind == "losses" else LAYERS)
    assert compiled.estimate.fits


@needs_compiler
@slow
def test_adapters_are_scored_too():
    compiled = gpu_program("gradients", lora__rank=8)
    assert compiled.attentions == (2 * LAYERS, LAYERS)
    assert set(compiled.cost.flops) <= {"bf16", "f32", "tf32"}


@needs_compiler
@slow
def test_packed_rows_attend_by_cudnn_on_hopper_and_by_xla_before():
    forward, backward = gpu_program(**PACKED).attentions
    assert (forward >= 2 * LAYERS, backward) == (True, LAYERS)
    assert gpu_program(**PACKED, card="a100").attentions == (0, 0)
    assert gpu_program(card="a100").attentions == (2 * LAYERS, LAYERS)


@needs_compiler
@slow
def test_packed_rows_take_no_scores():
    scores = ROWS // DEVICES * HEADS * LENGTH * LENGTH
    assert max(array.numbers for array in gpu_program(**PACKED).module.arrays()) < scores


@needs_compiler
@pytest.mark.parametrize(
    "mesh",
    [
        # More parts than there are key/value heads.
        {"tensor": 4},
        pytest.param({"tensor": 2}, marks=slow),
        # More parts than there are heads.
        pytest.param({"tensor": 8}, marks=slow),
        pytest.param({"data": 2}, marks=slow),
        pytest.param({"data": 2, "tensor": 2}, marks=slow),
    ],
    ids=str,
)
def test_every_mesh_shares_the_work(mesh):
    compiled = gpu_program(**{f"mesh__{axis}": size for axis, size in mesh.items()})
    assert compiled.attentions == (2 * LAYERS, LAYERS)
    assert set(compiled.cost.flops) == {"bf16"}
    if mesh.get("tensor", 1) <= HEADS:
        assert compiled.cost.flops["bf16"] == pytest.approx(gpu_program().cost.flops["bf16"], rel=0.15)


@needs_compiler
@slow
def test_copies_on_several_hosts_sum_what_each_host_has_scattered():
    compiled = gpu_program(devices=16, mesh__data=2)
    summed = [each for each in compiled.cost.collectives if each.transfer.kind == "all-reduce"]
    across = [each for each in summed if each.transfer.group == (0, 8)]
    # Each device has an eighth of the gradients.
    assert sum(each.times * each.transfer.bytes for each in across) >= 2 * LAYERS * LAYER_WEIGHTS // 8
    gathers = [each for each in compiled.cost.collectives if each.transfer.kind == "all-gather"]
    assert {each.transfer.group for each in gathers} == {tuple(range(8))}


@needs_compiler
@slow
def test_microbatches_take_less_memory():
    assert memory(gpu_program(data__grad_accumulation=4)) < memory(gpu_program())


def test_what_is_no_kind_of_program_is_refused_by_name():
    with pytest.raises(InputError, match="--program=scores: must be one of train, losses"):
        program("scores", small(), [])


def test_packed_rows_have_a_program_of_each_kind():
    for kind in KINDS:
        made = program(kind, small(**PACKED), jax.devices())
        assert made.tokens > 0


MIXTURE = {
    "model__architecture": "qwen3_moe",
    "model__num_experts": 16,
    "model__num_experts_per_tok": 4,
    "model__moe_intermediate_size": 128,
    "model__remat": "dots",
}


@slow
@needs_compiler
@pytest.mark.parametrize("experts", [1, 4])
def test_a_mixture_multiplies_its_active_parameters_and_moves_what_is_meant(experts):
    compiled = gpu_program(**MIXTURE, mesh__expert=experts)
    made = program("train", small(**MIXTURE), CARDS["h100"].devices(DEVICES))
    model = made.model
    block = WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + WIDTH * 16 + 3 * 4 * WIDTH * 128
    kept, again = LAYERS * block + TABLE, LAYERS * 2 * 4 * WIDTH * 128
    attention = model.flops_per_token(LENGTH) - 6 * kept
    needed = TOKENS * (6 * kept + 2 * again + 1.17 * attention)
    # An exchange has room for a quarter more slots than there are on average.
    assert needed * 0.98 < sum(compiled.cost.flops.values()) < needed * (1.1 if experts == 1 else 1.3)
    exchanged = moved(compiled, "all-to-all", "bf16")
    slots, embedded = 1.25 * TOKENS * 4, 2 * TOKENS
    assert exchanged == (embedded + (0 if experts == 1 else LAYERS * 5 * slots)) * WIDTH * 2
    whole = LAYERS * 3 * 16 * WIDTH * 128 * 2
    gathered = moved(compiled, "all-gather", "bf16")
    assert gathered > 2 * whole if experts == 1 else gathered < whole


@slow
@needs_compiler
@pytest.mark.parametrize("experts", [1, 4])
def test_no_array_has_a_place_of_each_token_in_each_expert(experts):
    """None, not even inside a fusion, has more numbers than twice the slots' inputs."""
    module = gpu_program(**MIXTURE, mesh__expert=experts).module
    slots, capacity = TOKENS * 4, TOKENS * 4 // 16
    largest = max(array.numbers for array in module.arrays())
    assert slots * WIDTH <= largest <= 2 * slots * WIDTH < TOKENS * 16 * capacity
