"""The mixture of experts: routing, the routers' losses, devices, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dataflex_jax.errors import InputError
from dataflex_jax.models import moe
from dataflex_jax.models.config import LoraConfig, ModelConfig, check_experts
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.hf.config import from_hf, to_hf
from dataflex_jax.models.hf.resolve import describe
from dataflex_jax.models.layout import ATTENTION_MODULES, LORA_MODULES, param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from tests.helpers.tiny_model import batch_of, random_tokens
from tests.models.make_golden import MIXTURES, MODELS, random_params

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dtype": "float32",
}


@pytest.mark.parametrize("normalized", [False, True])
def test_routes_to_the_most_likely(normalized):
    logits = np.random.default_rng(2).normal(0, 2, (2, 5, 7))
    probabilities, experts = moe.route(jnp.asarray(logits, jnp.float32), 3, normalized)
    exp = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-exp, axis=-1)[..., :3]
    np.testing.assert_array_equal(experts, best)
    expected = np.take_along_axis(exp, best, -1)
    expected = expected / expected.sum(-1, keepdims=True) if normalized else expected
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_the_routers_losses_are_over_real_tokens_of_all_layers():
    rng = np.random.default_rng(3)
    logits, real = rng.normal(0, 2, (2, 3, 6, 5)), np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 6])
    sums = [
        moe.router_sums(2, jnp.asarray(real, jnp.float32))(jnp.asarray(of_layer, jnp.float32)) for of_layer in logits
    ]
    sums = jax.tree.map(lambda *parts: jnp.stack(parts), *sums)
    kept = logits[:, real == 1].reshape(-1, 5)
    probabilities = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    chosen = np.argsort(-kept, axis=-1)[:, :2]
    share = np.bincount(chosen.ravel(), minlength=5) / len(kept)
    expected = 5 * np.sum(share * probabilities.mean(0))
    np.testing.assert_allclose(moe.balancing_loss(sums, jnp.float32(real.sum())), expected, rtol=1e-5)
    of_rows = np.stack([np.bincount(chosen[:6].ravel(), minlength=5), np.bincount(chosen[6:10].ravel(), minlength=5)])
    by_domain = moe.router_sums(2, jnp.asarray(real, jnp.float32), jnp.asarray([1, 0, 2]), 3)
    slots = by_domain(jnp.asarray(logits[0], jnp.float32)).slots
    np.testing.assert_array_equal(slots, np.stack([of_rows[1], of_rows[0], np.zeros(5)]))
    z = np.mean(np.log(np.exp(kept).sum(-1)) ** 2)
    np.testing.assert_allclose(moe.z_loss(sums, jnp.float32(real.sum())), z, rtol=1e-5)


WHOLE = P(None, ("expert", "fsdp"), None, "tensor")


@pytest.mark.parametrize(
    ("name", "rows", "axes", "spec"),
    [
        ("qwen2_moe", 8, {"data": 2, "fsdp": 2, "tensor": 2}, WHOLE),
        ("mixtral", 8, {"data": 2, "fsdp": 2, "tensor": 2}, WHOLE),
        ("olmoe", 3, {"data": 2, "fsdp": 2, "tensor": 2}, P(None, "expert", "fsdp", "tensor")),
        ("qwen3_moe", 8, {"fsdp": 2, "expert": 2, "tensor": 2}, WHOLE),
        ("mixtral", 8, {"fsdp": 2, "expert": 4}, P(None, "expert", "fsdp", "tensor")),
    ],
)
def test_eight_devices_compute_as_one(name, rows, axes, spec):
    cfg = from_hf(MODELS[name] | {"vocab_size": 64, "num_key_value_heads": 4}, dtype="float32")
    model = Model.shape(cfg).having(random_params(cfg, seed=1))
    tokens = random_tokens(rows=rows, length=12)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(shape, params, tokens):
        def loss(params):
            batch = batch_of(tokens)
            hooks = Hooks(of_router=moe.router_sums(cfg.num_experts_per_tok, batch.real_inputs))
            losses, _, aux, _ = shape.having(params).token_losses(batch, hooks)
            return losses.mean() + moe.balancing_loss(aux["of_router"], jnp.float32(losses.size))

        return jax.value_and_grad(loss)(params)

    expected = value_and_gradient(Model.shape(cfg), model.params, tokens)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, param_shardings(mesh, model.params))
        found = value_and_gradient(Model.shape(cfg), params, tokens)
    block = cfg.family.experts.block
    assert params["layers"][block]["experts"]["up_proj"].sharding.spec == spec
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_parameters_and_flops_are_counted(name):
    cfg = from_hf(MODELS[name])
    params = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cfg.num_params()
    # One expert more in reserve costs its row of the router only.
    more = dataclasses.replace(cfg, num_experts=cfg.num_experts + 1)
    router = 6 * cfg.num_hidden_layers * cfg.hidden_size
    assert more.flops_per_token(32) - cfg.flops_per_token(32) == router
    one = dataclasses.replace(cfg, num_experts_per_tok=1)
    expert = 3 * cfg.hidden_size * cfg.expert_width
    rest = (cfg.num_experts_per_tok - 1) * 6 * cfg.num_hidden_layers * expert
    assert cfg.flops_per_token(32) - one.flops_per_token(32) == rest


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_what_the_backward_pass_recomputes_changes_nothing(remat):
    cfg = from_hf(MODELS["qwen2_moe"] | {"vocab_size": 64, "num_hidden_layers": 1}, dtype="float32", remat=remat)
    plain = dataclasses.replace(cfg, remat="full")
    params, batch = random_params(cfg, seed=2), batch_of(random_tokens(2))

    def gradient(cfg):
        return jax.grad(lambda p: Model.shape(cfg).having(p).token_losses(batch).losses.mean())(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradient(cfg), gradient(plain))


def test_the_router_is_float32_in_a_bfloat16_model():
    cfg = from_hf(MODELS["qwen3_moe"] | {"vocab_size": 64}, dtype="bfloat16")
    seen = []

    def of_router(logits):
        seen.append(logits.dtype)
        return logits

    params = random_params(cfg, seed=0)
    model = Model.shape(cfg).having(params)
    aux = model.token_losses(batch_of(random_tokens(2)), Hooks(of_router=of_router)).aux
    assert set(seen) == {jnp.dtype("float32")}
    assert aux["of_router"].shape == (2, 2, 12, 4)
    # Rounded to bfloat16 they would have 8 bits.
    assert not np.array_equal(aux["of_router"], np.asarray(aux["of_router"].astype(jnp.bfloat16), np.float32))


# Configuration.


def test_adapters_are_the_attentions_unless_experts_are_named():
    cfg = ModelConfig(architecture="olmoe", **SIZES, num_experts=4, num_experts_per_tok=2, lora=LoraConfig(rank=2))
    assert cfg.lora.target_modules == ATTENTION_MODULES
    assert dataclasses.replace(cfg, remat="none").lora.target_modules == ATTENTION_MODULES
    everything = dataclasses.replace(cfg, lora=LoraConfig(rank=2, target_modules=LORA_MODULES))
    assert everything.lora.target_modules == LORA_MODULES
    with pytest.raises(
        InputError, match=r"target_modules='up_proj': adapters of the experts .* have no dropout; .*=0.5"
    ):
        dataclasses.replace(cfg, lora=LoraConfig(rank=2, target_modules=("q_proj", "up_proj"), dropout=0.5))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("qwen2", {"num_experts": 4}, "num_experts=4 is not supported; accepted: None"),
        ("olmoe", {"num_experts": 0}, "num_experts=0: must be a positive integer"),
        ("olmoe", {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3: must be at most num_experts=2"),
        ("olmoe", {"moe_intermediate_size": 3}, "moe_intermediate_size=3 is not supported; accepted: None"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 3}, "shared_expert_intermediate_size=3 is not supported"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False is not supported; accepted: True"),
        ("mixtral", {"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1: must be a number >= 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(architecture, fields, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(architecture=architecture, **SIZES, **fields)


def test_experts_are_split_where_there_are_as_many_for_each_device():
    mixture = ModelConfig(architecture="olmoe", **SIZES, num_experts=6, num_experts_per_tok=2)
    check_experts(mixture, 3)
    with pytest.raises(InputError, match=r"config\.mesh\.expert = 4: must divide the model's num_experts=6"):
        check_experts(mixture, 4)
    dense = ModelConfig(architecture="qwen2", **SIZES)
    check_experts(dense, 1)
    with pytest.raises(InputError, match=r"config\.mesh\.expert = 2: .*'qwen2' is dense and has no experts"):
        check_experts(dense, 2)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen2_moe", "mlp_only_layers", [0]),
        ("qwen2_moe", "use_sliding_window", True),
        ("mixtral", "router_jitter_noise", 0.1),
        ("olmoe", "clip_qkv", 8.0),
    ],
)
def test_maths_of_others_is_refused_by_name(name, field, value):
    with pytest.raises(InputError, match=f"model {field}="):
        from_hf(MODELS[name] | {field: value})


def test_the_number_of_experts_has_two_names():
    fields = {name: value for name, value in MODELS["qwen3_moe"].items() if name != "num_experts"}
    assert from_hf(fields | {"num_local_experts": 4}) == from_hf(MODELS["qwen3_moe"])
    with pytest.raises(InputError, match="num_experts=4 and num_local_experts=5: must be the same"):
        from_hf(MODELS["qwen3_moe"] | {"num_local_experts": 5})


@pytest.mark.parametrize("name", MIXTURES)
def test_a_configuration_is_read_as_it_was_written(name):
    cfg = from_hf(MODELS[name])
    assert from_hf(to_hf(cfg)) == cfg


def test_a_window_is_read_where_it_is_used():
    fields = {"use_sliding_window": True, "sliding_window": 9}
    assert from_hf(MODELS["qwen3_moe"] | fields).sliding_window == 9
    assert from_hf(MODELS["qwen3_moe"] | fields | {"use_sliding_window": False}).sliding_window is None
    assert from_hf(MODELS["mixtral"] | {"sliding_window": None}).sliding_window is None


def test_a_dense_model_is_described_as_ever():
    # Or runs of before mixtures of experts would not resume.
    assert "num_experts" not in describe(from_hf(MODELS["qwen3"]))
    assert describe(from_hf(MODELS["olmoe"]))["num_experts"] == 5
