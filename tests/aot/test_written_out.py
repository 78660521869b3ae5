"""What XLA's GPU compiler makes of train steps whose layers are written out, beside those that are a loop."""

import jax
import pytest

from dataflex_jax.aot.programs import program
from tests.helpers.gpu_programs import (
    DEVICES,
    LAYER_WEIGHTS,
    LAYERS,
    TABLE,
    TOKENS,
    WIDTH,
    gpu_program,
    memory,
    moved,
    needs_compiler,
    small,
)


@needs_compiler
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_layers_that_are_written_out_move_no_more_and_read_and_write_less(remat):
    scanned = gpu_program(model__remat=remat)
    compiled = gpu_program(model__remat=remat, model__scan_layers=False)
    for kind, dtype in (("all-gather", "bf16"), ("reduce-scatter", "bf16"), ("reduce-scatter", "f32")):
        assert moved(compiled, kind, dtype) == moved(scanned, kind, dtype)
    assert compiled.attentions == scanned.attentions
    assert compiled.cost.flops == scanned.cost.flops
    assert compiled.cost.hbm_bytes < scanned.cost.hbm_bytes
    assert memory(compiled) < 1.05 * memory(scanned)


@needs_compiler
def test_layers_that_are_written_out_keep_no_operands_of_products_that_are_put_off():
    """Of three times the layers, the temporaries are more by what the forward pass keeps of them."""
    written_out = {"model__remat": "full", "model__scan_layers": False}
    few, many = memory(gpu_program(**written_out)), memory(gpu_program(**written_out, model__num_hidden_layers=9))
    added = 9 - LAYERS
    block_inputs = added * 2 * TOKENS * WIDTH
    weights = added * LAYER_WEIGHTS * (2 + 4 + 4) // DEVICES  # in bfloat16, and their gradients twice
    assert many - few < 1.1 * (block_inputs + weights)


@pytest.mark.parametrize(("kind", "written_out"), [("train", True), ("losses", False), ("gradients", False)])
def test_only_train_steps_are_written_out(kind, written_out):
    """Per-example gradients of each layer by itself, for one, would take a quarter of an hour to compile."""

    def traced(scan_layers):
        made = program(kind, small(model__scan_layers=scan_layers), jax.devices())
        with jax.set_mesh(made.mesh):
            return str(made.function.trace(*made.arguments).jaxpr)

    assert (traced(True) != traced(False)) == written_out


@needs_compiler
def test_a_norm_of_layers_that_are_written_out_is_one_kernel_each_time_it_is_computed():
    compiled = gpu_program(model__remat="full", model__scan_layers=False)
    norms_of_a_layer, times = 2, 2
    assert compiled.cost.fusions["__triton"] >= norms_of_a_layer * times * LAYERS + 1


@needs_compiler
def test_the_heads_gradient_is_summed_over_the_devices_beside_the_last_block_and_not_at_the_end():
    compiled = gpu_program(model__remat="full", model__scan_layers=False)
    ordered = list(compiled.module.computations[compiled.module.entry].values())
    of_head = [
        place
        for place, each in enumerate(ordered)
        if each.opcode == "reduce-scatter-done" and each.arrays[0].dtype == "f32" and each.bytes >= 4 * TABLE // DEVICES
    ]
    backward = [place for place, each in enumerate(ordered) if each.target == "__cudnn$fmhaSoftmaxBackward"]
    assert len(of_head) == 1
    assert of_head[0] < backward[1]
