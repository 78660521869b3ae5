"""Families as records: those that are registered, and one of the user's own through `config.plugins`."""

import dataclasses
import json
import textwrap

import jax
import numpy as np
import pytest

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, families
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.config import from_hf, to_hf
from dataflex_jax.models.hf.resolve import described_config, model_config
from dataflex_jax.models.hf.weights import hf_tensors

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Llama's maths with biases, but other names and defaults.
OWN = families.Family(
    name="own",
    hf_class="OwnForCausalLM",
    defaults={"num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 5e5},
    attention_bias=True,
    qk_norm=True,
    window=families.ONE_WINDOW,
    neutral=families.NEUTRAL | {"logit_scale": (1.0,)},
    names={"num_hidden_layers": "n_layer", "rope_theta": "rotary_base", "sliding_window": "span"},
)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def test_the_families_are_registered_in_order():
    assert families.names()[:4] == ("qwen2", "qwen3", "llama", "mistral")
    for name in families.names():
        assert families.family(name).name == name


def test_an_unknown_name_is_refused_in_one_line_with_the_registered_ones():
    families.register_family(OWN)
    known = "'qwen2', 'qwen3', 'llama', 'mistral', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'olmoe', 'own'"
    for call, field in (
        (lambda: ModelConfig(architecture="gpt9", **SIZES), "architecture"),
        (lambda: from_hf(SIZES | {"model_type": "gpt9"}), "model_type"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == f"model {field}='gpt9' is not supported; accepted: {known}"


def test_a_name_is_registered_once():
    families.register_family(OWN)
    families.register_family(OWN)  # as when its module is imported again
    with pytest.raises(InputError, match="'own' is registered already, as OwnForCausalLM"):
        families.register_family(dataclasses.replace(OWN, hf_class="OtherForCausalLM"))
    with pytest.raises(InputError, match="'llama' is registered already"):
        families.register_family(families.Family(name="llama", hf_class="MyLlama"))


def test_what_a_family_fixes_cannot_be_asked_for_otherwise():
    families.register_family(OWN)
    for field, value in (("attention_bias", False), ("qk_norm", False)):
        with pytest.raises(InputError, match=f"{field}=False is not supported; accepted: True"):
            ModelConfig(architecture="own", **SIZES, **{field: value})
    with pytest.raises(InputError, match="sliding_window=4 is not supported; accepted: None"):
        ModelConfig(architecture="llama", **SIZES, sliding_window=4)


def test_a_family_of_the_users_own_is_read_and_written_by_its_names():
    families.register_family(OWN)
    sizes = {name: value for name, value in SIZES.items() if name != "num_hidden_layers"}
    theirs = sizes | {"model_type": "own", "n_layer": 2, "span": 8, "logit_scale": 1.0}
    cfg = from_hf(theirs)
    assert (cfg.num_hidden_layers, cfg.sliding_window, cfg.rope_theta) == (2, 8, 5e5)
    assert (cfg.num_key_value_heads, cfg.max_position_embeddings) == (2, 64)
    assert (cfg.attention_bias, cfg.output_bias, cfg.qk_norm) == (True, True, True)
    assert from_hf(theirs | {"rotary_base": 7.0}).rope_theta == 7.0
    with pytest.raises(InputError, match=r"logit_scale=0\.5 is not supported; accepted: 1\.0"):
        from_hf(theirs | {"logit_scale": 0.5})

    written = to_hf(cfg)
    assert written["architectures"] == ["OwnForCausalLM"]
    assert (written["n_layer"], written["rotary_base"], written["span"]) == (2, 5e5, 8)
    assert not {"num_hidden_layers", "rope_theta", "sliding_window", "attention_bias"} & written.keys()
    assert from_hf(written) == cfg


def test_a_plugins_family_has_the_decoders_maths(tmp_path, monkeypatch):
    (tmp_path / "plugged_family.py").write_text(
        textwrap.dedent(
            """
            from dataflex_jax.models import families

            families.register_family(
                families.Family(
                    name="plugged",
                    hf_class="PluggedForCausalLM",
                    attention_bias=True,
                    output_bias=False,
                    names={"hidden_size": "d_model"},
                )
            )
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = base.get_config("plugins=plugged_family")
    config.model.update(**SIZES, architecture="plugged", dtype="float32")
    cfg = model_config(config.model, 33)
    twin = dataclasses.replace(cfg, architecture="qwen2")
    assert cfg != twin

    tokens = np.arange(24).reshape(2, 12)
    hidden = {}
    for name, model in (("plugged", cfg), ("qwen2", twin)):
        graphdef, params = decoder.create(model, jax.random.key(0))
        hidden[name], _ = decoder.hidden_states(graphdef, params, tokens)
    np.testing.assert_array_equal(hidden["plugged"], hidden["qwen2"])
    assert "model.layers.1.self_attn.k_proj.bias" in {tensor.name for tensor in hf_tensors(params)}

    # A checkpoint that the run is to start from says its sizes by the family's names.
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    config.model.update(name_or_path=str(tmp_path), from_scratch=False, hidden_size=99)
    assert model_config(config.model, 33) == cfg


def test_a_checkpoint_says_its_family_by_name():
    saved = {"architecture": "mistral", **SIZES, "rope_scaling": None, "sliding_window": 3, "param_dtype": "float32"}
    cfg = described_config(saved, base.get_config().model)
    assert cfg.family is families.family("mistral")
    assert cfg.sliding_window == 3
