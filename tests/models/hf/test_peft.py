"""Adapters in PEFT's format: against the library (golden files, and live where it is installed), and back."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dataflex_jax import sharding
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, layout, lora, parts
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.hf import peft
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.models.model import Model
from tests.models.make_golden import MODELS, random_params, random_tokens, torch_model
from tests.models.make_golden_peft import FOLDER, MODEL, SEED, SETTINGS, random_adapter

NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


LORA = LoraConfig(rank=3, alpha=5)


def model_of(name=MODEL, config=LORA, **fields):
    return from_hf(MODELS[name], dtype="float32", lora=config, **fields)


def random_adapters(cfg, seed=0):
    shapes = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0)).training(parts.is_adapter).params
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(cfg, base, adapters, tokens):
    params = parts.combined(base, adapters)
    hidden, _ = decoder.hidden_states(Model.shape(cfg).graphdef, params, tokens)
    return hidden @ decoder.output_weight(params)


@pytest.fixture
def saved(tmp_path):
    """(folder, configuration, adapters)"""
    cfg = model_of()
    adapters = random_adapters(cfg)
    peft.save_adapter(tmp_path / "adapter", cfg.lora, adapters, "org/base", "float32 0123")
    return tmp_path / "adapter", cfg, adapters


def load(folder, cfg, **base):
    return peft.load_adapter(str(folder), cfg, "lora.name_or_path", **base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, dtype):
    config = LoraConfig(rank=3, alpha=2.5, dropout=0.1, use_rslora=True, target_modules=("v_proj", "up_proj"))
    cfg = model_of("qwen3", config, param_dtype=dtype)
    adapters = random_adapters(cfg)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(adapters, layout.param_shardings(mesh, adapters))
        peft.save_adapter(tmp_path, config, placed, None)
    loaded = load(tmp_path, cfg)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
    assert peft.read_lora_config(str(tmp_path), "--adapter", "bfloat16") == (config, None)


def test_a_save_that_is_cut_off_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    cfg = model_of()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        peft.save_adapter(tmp_path, cfg.lora, random_adapters(cfg), None)
    assert os.listdir(tmp_path) == []


def test_names_and_shapes_are_pefts(saved):
    folder, _, adapters = saved
    tensors = load_file(folder / peft.WEIGHTS)
    assert len(tensors) == 2 * 7 * 2
    assert tensors[NAME].shape == (3, 16)
    assert tensors["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"].shape == (24, 3)
    np.testing.assert_array_equal(tensors[NAME], adapters["layers"]["attention"]["q_proj"]["lora_a"][1].T)
    config = json.loads((folder / peft.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, list(LORA_MODULES))


def test_a_golden_adapter_of_peft_gives_its_logits():
    config, base_name = peft.read_lora_config(str(FOLDER), "--adapter")
    assert base_name is None
    assert config == LoraConfig(
        rank=3, alpha=5, dropout=0.1, use_rslora=True, target_modules=tuple(SETTINGS["target_modules"])
    )
    cfg = model_of(config=config)
    adapters = load(FOLDER, cfg)
    logits = logits_of(cfg, random_params(cfg, SEED), adapters, random_tokens(cfg, SEED))
    np.testing.assert_allclose(logits, np.load(FOLDER / "logits.npz")["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2_tied", {"lora_alpha": 4}),
        ("qwen3", {"use_rslora": True, "target_modules": ["k_proj", "o_proj"]}),
        ("llama_biased", {"target_modules": ["up_proj", "q_proj", "k_proj"]}),
    ],
)
def test_equals_peft_where_it_is_installed(name, settings, tmp_path):
    """Both ways: an adapter of peft's here, and that one written here in peft; logits, gradients, merged weights."""
    torch, hf_peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    settings = {"r": 3, "target_modules": list(LORA_MODULES)} | settings
    base = random_params(model_of(name), 5)
    theirs = random_adapter(torch_model(MODELS[name], base), **settings)
    theirs.save_pretrained(tmp_path / "theirs")

    config, _ = peft.read_lora_config(str(tmp_path / "theirs"), "--adapter")
    cfg = model_of(name, config)
    adapters = load(tmp_path / "theirs", cfg)
    tokens = random_tokens(cfg, 5)
    logits = logits_of(cfg, base, adapters, tokens)
    outputs = theirs(torch.tensor(tokens)).logits
    np.testing.assert_allclose(logits, outputs.detach().numpy(), rtol=0, atol=1e-4)

    outputs.square().mean().backward()
    gradients = jax.grad(lambda a: jnp.mean(logits_of(cfg, base, a, tokens) ** 2))(adapters)
    peft.save_adapter(tmp_path / "gradients", config, gradients, None)
    ours = load_file(tmp_path / "gradients" / peft.WEIGHTS)
    parameters = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert parameters.keys() == ours.keys()
    for key, parameter in parameters.items():
        np.testing.assert_allclose(ours[key], parameter.grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=key)

    peft.save_adapter(tmp_path / "ours", config, adapters, None)
    again = hf_peft.PeftModel.from_pretrained(torch_model(MODELS[name], base), tmp_path / "ours").eval()
    np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.detach(), outputs.detach())
    merged = again.merge_and_unload()
    weight = merged.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    ours = lora.merge(parts.combined(base, adapters), config)["layers"]["attention"]["k_proj"]["kernel"][1]
    np.testing.assert_allclose(ours, weight.T, rtol=0, atol=1e-6)


# What does not fit.


def edited_config(folder, **fields):
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edited_tensors(folder, edit):
    tensors = load_file(folder / peft.WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / peft.WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; accepted: 'LORA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters=.* parameters that hold all experts"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=\\['lm_head'\\]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"some_new_variant": {"a": 1}}, "some_new_variant="),
        ({"r": "8"}, "rank is '8'"),
        ({"r": 0}, "rank=0"),
        ({"r": True}, "rank is True; a number is accepted"),
        ({"r": 10**9}, "lora rank=1000000000: must be a positive integer up to"),
        ({"lora_alpha": float("nan")}, "lora alpha=nan"),
        ({"lora_dropout": float("inf")}, "dropout=inf"),
        ({"use_rslora": "false"}, "use_rslora='false': must be true or false"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\]; a folder or hub id"),
        ({"r": 4}, "config.lora.rank = 3: the adapter .* has 4"),
        ({"lora_alpha": 6}, "config.lora.alpha = 5.0: the adapter .* has 6.0"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(saved, fields, message):
    folder, cfg, _ = saved
    edited_config(folder, **fields)
    with pytest.raises(InputError, match=message) as e:
        load(folder, cfg)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), f"has no tensor '{NAME}'"),
        (lambda t: t.update({NAME: t[NAME][:, :8].copy()}), rf"'{NAME}' has shape \[3, 8\]; .* needs \[3, 16\]"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), "has dtype I32; accepted: F32, BF16, F16"),
        (
            lambda t: t.update({NAME.replace(".1.", ".2."): t[NAME]}),
            r"layers\.2.* has no place in this base.* 2 layers",
        ),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[NAME]}), "lm_head.* is no factor of a linear"),
        (lambda t: t.update({NAME.replace("self_attn", "mlp"): t[NAME]}), "mlp.q_proj.* is no factor"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_named(saved, edit, message):
    folder, cfg, _ = saved
    edited_tensors(folder, edit)
    with pytest.raises(InputError, match=message) as e:
        load(folder, cfg)
    assert "\n" not in str(e.value)


def test_another_base_is_refused(saved, caplog):
    folder, cfg, _ = saved
    load(folder, cfg, base_name="/models/base", base_weights="float32 0123")
    load(folder, cfg, base_weights="bfloat16 4567")  # rounded: who knows
    assert not caplog.records
    with pytest.raises(
        InputError, match=r"an adapter for another base \(float32 0123\), not for this one \(float32 89"
    ):
        load(folder, cfg, base_weights="float32 89ab")
    with pytest.raises(InputError, match=r"q_proj.lora_A.weight' has shape \[3, 16\]; .* needs \[3, 32\]"):
        load(folder, dataclasses.replace(cfg, hidden_size=32))
    load(folder, cfg, base_name="org/other")
    assert "was made for org/base; the base here is org/other" in caplog.text


def test_missing_and_damaged_files_are_named(saved, tmp_path):
    folder, cfg, _ = saved
    with pytest.raises(InputError, match=r"config.lora.name_or_path = '/no/such'"):
        load("/no/such", cfg)
    weights = (folder / peft.WEIGHTS).read_bytes()
    (folder / peft.WEIGHTS).write_bytes(weights[:-10])
    with pytest.raises(InputError, match=r"adapter_model.safetensors: cut short or damaged"):
        load(folder, cfg)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors: no such file"):
        load(folder, cfg)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(InputError, match=r"adapter_config.json"):
        load(folder, cfg)
    shutil.copy(__file__, folder)
    with pytest.raises(InputError, match=r"holds .* already"):
        peft.save_adapter(folder, cfg.lora, random_adapters(cfg), None)
