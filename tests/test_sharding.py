"""The mesh, the rules, and what a sharded training step stores, computes and sends (8 virtual CPU devices)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dataflex_jax import sharding
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder
from dataflex_jax.models.config import REMAT_POLICIES, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.sharding import batch_sharding, make_mesh, program_device, replicated

ROWS, SEQ_LEN = 16, 24
MESHES = {"fsdp": {"fsdp": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
LARGE = {
    "embed_tokens/embedding",
    "lm_head/kernel",
    *(f"layers/attention/{name}_proj/kernel" for name in "qkvo"),
    *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
}
# One layer's weights, the head's and the table's: no other two-dimensional shape belongs in an fsdp=8 collective.
LAYER_SHAPES = {(64, 64), (64, 32), (64, 144), (144, 64)}
# Queries, keys and values have one product for their gradients.
GRADIENT_SHAPES = {(64, 64), (64, 128), (64, 144), (144, 64)}
HEAD_SHAPES = {(64, 256), (256, 64)}


def config(**overrides):
    fields = {
        "architecture": "qwen2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 144,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dtype": "float32",
    }
    return ModelConfig(**(fields | overrides))


@functools.cache
def host_inputs(cfg):
    graphdef, params = jax.jit(functools.partial(decoder.create, cfg))(jax.random.key(0))
    tokens = np.random.RandomState(0).randint(0, cfg.vocab_size, (ROWS, SEQ_LEN + 1))
    return graphdef, jax.device_get(params), tokens


def value_and_grad(graphdef):
    def objective(params, tokens):
        losses = decoder.token_losses(graphdef, params, tokens, hooks=Hooks(tile_tokens=16)).losses
        return losses.mean(), losses

    return jax.value_and_grad(objective, has_aux=True)


def compile_on_mesh(cfg, mesh, **options):
    """(compiled gradient, its sharded arguments)."""
    graphdef, params, tokens = host_inputs(cfg)
    shardings = param_shardings(mesh, params)
    with jax.set_mesh(mesh):
        arguments = jax.device_put(params, shardings), jax.device_put(tokens, batch_sharding(mesh))
        outputs = ((replicated(mesh), batch_sharding(mesh)), shardings)
        step = jax.jit(value_and_grad(graphdef), out_shardings=outputs).lower(*arguments)
        return step.compile(compiler_options=options or None), arguments


def collectives(hlo):
    """[(operation, [shapes of its results], op_name)] of a module's text."""
    found = []
    for line in hlo.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)[a-z-]*\(", line
        )
        if match:
            shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1])
            name = re.search(r'op_name="([^"]*)"', line)
            shapes = [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in shapes]
            found.append((match[2], shapes, name[1] if name else ""))
    return found


def named_leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, None),  # one device of eight
        ({"fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": 8, "fsdp": 1, "tensor": 1}, (8, 1, 1, 1)),
        ({"fsdp": -1, "expert": 4}, (1, 2, 4, 1)),
        ({"data": 3, "fsdp": -1}, None),
        ({"data": -1, "fsdp": -1}, None),
        ({"data": 0, "fsdp": -1}, None),
        ({"data": 16}, None),
        ({"data": 16, "fsdp": -1}, None),
        ({"data": 2.0, "fsdp": 4}, None),
    ],
)
def test_make_mesh(sizes, shape):
    if shape is None:
        with pytest.raises(InputError, match=r"mesh\.data=.*mesh\.fsdp=.*mesh\.tensor=") as error:
            make_mesh(sizes)
        assert "\n" not in str(error.value)
    else:
        mesh = make_mesh(sizes)
        assert tuple(mesh.shape.values()) == shape
        assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_program_is_for_the_devices_of_the_mesh_that_is_set():
    seen = []
    trace = jax.jit(lambda x: seen.append(program_device()) or x).trace
    trace(jnp.zeros(()))
    last = jax.devices()[-1]
    with jax.set_mesh(make_mesh({}, [last])):
        trace(jnp.zeros(()))
    assert seen == [jax.local_devices()[0], last]


@pytest.mark.parametrize(
    ("experts", "axes"),
    [(8, (("expert", "fsdp"), None)), (6, ("expert", "fsdp")), (3, (None, "fsdp")), (4, ("expert", "fsdp"))],
)
def test_an_axis_splits_the_first_dimension_that_names_it_and_that_it_divides(experts, axes):
    mesh = make_mesh({"fsdp": 4, "expert": 2})
    rules = [("weight", P(("expert", "fsdp"), "fsdp"))]
    found = sharding.param_shardings(mesh, {"weight": jax.ShapeDtypeStruct((experts, 8), jnp.float32)}, rules)
    assert found["weight"].spec == P(*axes)


def test_rules_reach_parameters_and_optimizer_state():
    mesh = make_mesh(MESHES["all"])
    _, params, _ = host_inputs(config())
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params)
    expected = {
        "embed_tokens/embedding": P("tensor", "fsdp"),
        "lm_head/kernel": P("fsdp", "tensor"),
        "layers/attention/q_proj/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/q_proj/bias": P(None, "tensor"),
        "layers/attention/o_proj/kernel": P(None, ("tensor", "fsdp"), None),
        "layers/mlp/up_proj/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/down_proj/kernel": P(None, ("tensor", "fsdp"), None),
        "layers/input_layernorm/scale": P(None, None),
        "norm/scale": P(None),
    }
    placed = {name: sharding.spec for name, sharding in named_leaves(param_shardings(mesh, params)).items()}
    assert expected.items() <= placed.items()
    of_state = {name: sharding.spec for name, sharding in named_leaves(param_shardings(mesh, state)).items()}
    for name, spec in placed.items():
        moments = [found for path, found in of_state.items() if path.endswith(f"/{name}")]
        assert moments == [spec, spec], name
    assert [spec for path, spec in of_state.items() if path.endswith("count")] == [P()]


def test_axes_that_do_not_divide_are_dropped():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    tree = {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 10), jnp.float32)}}
    assert param_shardings(mesh, tree)["lm_head"]["kernel"].spec == P(None, "tensor")
    # A factored second moment has the path of its parameter and fewer axes.
    tree = {"v_row": {"lm_head": {"kernel": jax.ShapeDtypeStruct((8,), jnp.float32)}}}
    assert param_shardings(mesh, tree)["v_row"]["lm_head"]["kernel"].spec == P(None)


@pytest.mark.parametrize(("mesh_name", "parts"), [("fsdp", 8), ("all", 4)])
def test_every_large_parameter_and_moment_is_stored_in_parts(mesh_name, parts):
    mesh, cfg = make_mesh(MESHES[mesh_name]), config()

    def init(key):
        params = decoder.create(cfg, key)[1]
        return params, optax.adam(1e-3).init(params)

    shardings = param_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    leaves = named_leaves(state)
    for suffix in LARGE:
        found = [leaf for name, leaf in leaves.items() if name.endswith(suffix)]
        assert len(found) == 3, suffix
        for leaf in found:
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, suffix
    # The values drawn in parts are those drawn whole.
    _, params, _ = host_inputs(cfg)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7), jax.device_get(state[0]), params)


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        ({"fsdp": 8}, {}),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"tie_word_embeddings": True}),
        ({"data": 2, "fsdp": 4}, {"tie_word_embeddings": True}),
        # More parts than key heads, and than query heads.
        ({"fsdp": 2, "tensor": 4}, {"num_hidden_layers": 1}),
        pytest.param({"tensor": 8}, {"num_hidden_layers": 1}, marks=pytest.mark.slow),
        # Neither the vocabulary nor the width is divisible: whole weights on every device.
        ({"fsdp": 4, "tensor": 2}, {"vocab_size": 255, "hidden_size": 66, "head_dim": 16}),
    ],
)
def test_sharded_losses_and_gradients_equal_unsharded(sizes, overrides):
    cfg = config(**overrides)
    graphdef, params, tokens = host_inputs(cfg)
    (_, expected_losses), expected = jax.jit(value_and_grad(graphdef))(params, tokens)
    step, arguments = compile_on_mesh(cfg, make_mesh(sizes))
    (_, losses), gradients = step(*arguments)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, expected)
    assert losses.sharding.is_equivalent_to(batch_sharding(make_mesh(sizes)), 2)


def test_rows_that_the_mesh_does_not_divide_still_give_the_right_losses():
    graphdef, params, tokens = host_inputs(config())
    mesh = make_mesh(MESHES["fsdp"])
    objective = value_and_grad(graphdef)
    (_, expected_losses), expected = jax.jit(objective)(params, tokens[:3])
    with jax.set_mesh(mesh):
        (_, losses), gradients = jax.jit(objective)(jax.device_put(params, param_shardings(mesh, params)), tokens[:3])
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, expected)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_fsdp_gathers_one_layer_at_a_time_and_moves_no_activations(remat):
    step, _ = compile_on_mesh(config(remat=remat), make_mesh(MESHES["fsdp"]))
    hlo = step.as_text()
    found = collectives(hlo)
    assert {operation for operation, _, _ in found} == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    gathers = [(shape, name) for kind, shapes, name in found if kind == "all-gather" for _, shape in shapes]
    assert {shape for shape, _ in gathers} == LAYER_SHAPES | {(64, 256), (ROWS, SEQ_LEN)}
    # The table is not gathered: its columns of hidden states, and of their gradients, go to the tokens' devices.
    exchanged = [shapes for kind, shapes, _ in found if kind == "all-to-all"]
    assert [{shape for _, shape in shapes} for shapes in exchanged] == [{(ROWS // 8, SEQ_LEN, 64 // 8)}] * 2
    assert all("while/body" in name for shape, name in gathers if shape in LAYER_SHAPES)
    # Not in the loss's loop over tiles, where each tile would repeat them.
    assert not [name for _, _, name in found if "shard_map/while" in name]
    # What is summed or scattered is gradients: one layer's, the head's, the table's, and vectors.
    for kind, shapes, _ in found:
        if kind == "all-reduce":
            allowed = GRADIENT_SHAPES | HEAD_SHAPES | {shape[::-1] for shape in GRADIENT_SHAPES} | {(8, 256), (256, 8)}
            assert {shape for _, shape in shapes if len(shape) > 1} <= allowed
    assert [shape for kind, shapes, _ in found if kind == "reduce-scatter" for _, shape in shapes] == [(8, 256)]
    reduced = {shape for kind, shapes, _ in found if kind == "all-reduce" for _, shape in shapes}
    assert all(shape in reduced or shape[::-1] in reduced for shape in GRADIENT_SHAPES)
    # No device ever holds every layer's whole weights, not even to keep them for the backward pass.
    assert not re.search(r"\[3,(64,64|64,32|64,144|144,64)\]", hlo)


def test_head_gradient_is_reduced_once_with_every_axis_in_use():
    step, _ = compile_on_mesh(config(), make_mesh(MESHES["all"]))
    found = collectives(step.as_text())
    for kind, shapes, name in found:
        if "shard_map/while" in name:
            # Per tile only the softmax's maximum and sums cross the vocabulary's parts: [.., rows, tile].
            assert kind == "all-reduce", name
            assert all(np.prod(shape) <= 2 * 16 for _, shape in shapes), name
    head = [shape for kind, shapes, _ in found if kind == "reduce-scatter" for _, shape in shapes]
    assert head == [(32, 128)]


def test_weights_are_gathered_in_bfloat16(tmp_path):
    """Read after partitioning, because later the CPU backend turns every bfloat16 collective into a float32 one."""
    cfg = config(dtype="bfloat16")
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    compile_on_mesh(cfg, make_mesh(MESHES["fsdp"]), **options)
    (stage,) = tmp_path.glob("*.after_spmd-partitioning.*.txt")
    gathers = [entry for kind, shapes, _ in collectives(stage.read_text()) if kind == "all-gather" for entry in shapes]
    assert set(gathers) == {("bf16", shape) for shape in LAYER_SHAPES | {(64, 256)}} | {("s32", (ROWS, SEQ_LEN))}


def test_per_example_gradients_gather_weights_only(tmp_path):
    """vmap(grad) with respect to a vector that meets the weights inside the scan: each device keeps its own rows."""
    cfg = config(dtype="bfloat16")
    graphdef, params, tokens = host_inputs(cfg)
    mesh = make_mesh(MESHES["fsdp"])

    def loss(tap, params, row):
        def transform(weights, index):
            kernel = weights["mlp"]["up_proj"]["kernel"]
            mlp = weights["mlp"] | {"up_proj": {"kernel": kernel * (1 + tap).astype(kernel.dtype)}}
            return weights | {"mlp": mlp}

        return decoder.token_losses(graphdef, params, row[None], hooks=Hooks(block_transform=transform)).losses.mean()

    per_example = jax.vmap(jax.grad(loss), in_axes=(None, None, 0))
    tap = jnp.zeros(cfg.intermediate_size)
    expected = np.stack([jax.jit(jax.grad(loss))(tap, params, row) for row in tokens[:2]])
    with jax.set_mesh(mesh):
        arguments = jax.device_put(params, param_shardings(mesh, params)), jax.device_put(tokens, batch_sharding(mesh))
        options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
        step = jax.jit(per_example).lower(tap, *arguments).compile(compiler_options=options)
        gradients = step(tap, *arguments)
    assert gradients.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    np.testing.assert_allclose(gradients[:2], expected, rtol=0, atol=0.05 * np.abs(expected).max())
    (stage,) = tmp_path.glob("*.after_spmd-partitioning.*.txt")
    for kind, shapes, _ in collectives(stage.read_text()):
        assert kind == "all-gather"
        assert {dtype for dtype, _ in shapes} == {"bf16"}
        assert {shape for _, shape in shapes} <= LAYER_SHAPES | HEAD_SHAPES
