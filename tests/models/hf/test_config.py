"""Reading, checking and writing Hugging Face configurations."""

import json

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.config import RopeScaling
from dataflex_jax.models.hf.config import from_hf, read_shape, to_hf

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2, QWEN3, LLAMA, MISTRAL = (SIZES | {"model_type": name} for name in ("qwen2", "qwen3", "llama", "mistral"))


def test_both_spellings_of_rope_are_one_config():
    old = LLAMA | {"rope_theta": 500000, "rope_scaling": LLAMA3}
    older = LLAMA | {"rope_theta": 500000.0, "rope_scaling": {k.replace("rope_", ""): v for k, v in LLAMA3.items()}}
    new = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    configs = [from_hf(hf) for hf in (old, older, new)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 500000.0
    assert configs[0].rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain = from_hf(QWEN2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert plain == from_hf(QWEN2 | {"rope_theta": 1e6, "rope_scaling": None})


def test_defaults_of_each_family():
    qwen2, qwen3, llama, mistral = map(from_hf, (QWEN2, QWEN3, LLAMA, MISTRAL))
    assert [c.attention_bias for c in (qwen2, qwen3, llama, mistral)] == [True, False, False, False]
    assert [c.qk_norm for c in (qwen2, qwen3, llama, mistral)] == [False, True, False, False]
    assert [c.head_dim for c in (qwen2, qwen3, llama, mistral)] == [8, 128, 8, 8]
    assert [c.sliding_window for c in (qwen2, qwen3, llama, mistral)] == [None, None, None, 4096]
    assert [c.max_position_embeddings for c in (qwen2, qwen3, llama, mistral)] == [32768, 32768, 2048, 131072]
    assert {c.rope_theta for c in (qwen2, qwen3, llama, mistral)} == {10000.0}
    without = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    assert from_hf(without | {"model_type": "llama"}).num_key_value_heads == 4
    assert from_hf(without | {"model_type": "mistral", "num_attention_heads": 16}).num_key_value_heads == 8


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 64}, None),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3}, 64),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 3}, None),
        ({"use_sliding_window": False, "layer_types": ["full_attention"] * 3}, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 64}, 64),
    ],
)
def test_sliding_window(fields, window):
    cfg = from_hf(QWEN2 | fields)
    assert cfg.sliding_window == window
    assert from_hf(to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3'.*'qwen2', 'qwen3', 'llama', 'mistral'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True.*False"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn'.*'default', 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type='linear'"),
        ({"rope_parameters": LLAMA3 | {"attention_factor": 2.0}}, "rope_parameters field='attention_factor'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters field='full_attention'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "no low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "rope_scaling.factor='8'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
        ({"num_attention_heads": 3}, "num_key_value_heads=2: must divide num_attention_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": "100"}, "vocab_size='100': must be a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"hidden_size": [32]}, r"hidden_size=\[32\]"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be a positive integer up to 8192"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings=2147483648"),
        ({"head_dim": "8"}, "head_dim='8'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6'"),
        ({"rope_theta": 10**400}, "rope_theta=10"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3': must be an object"),
        ({"rope_scaling": LLAMA3 | {"factor": float("inf")}}, "rope_scaling.factor=inf"),
        ({"rope_parameters": [LLAMA3]}, r"rope_parameters=\[.*must be an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': must be true or false"),
        ({"model_type": "llama", "attention_bias": 1}, "attention_bias=1: must be true or false"),
        ({"use_sliding_window": "false"}, "use_sliding_window='false': must be true or false"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers='all'"),
        ({"use_sliding_window": True, "sliding_window": "x", "max_window_layers": 0}, "sliding_window='x'"),
        ({"layer_types": 3}, "layer_types=3: must be a list"),
        ({"layer_types": [{}]}, r"layer_types=\[\{\}\]: must be a list"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers=1: layers that differ"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types=.*layers that differ",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types='sliding_attention'"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types='linear_attention'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "they must agree"),
    ],
)
def test_refuses_by_name_what_it_would_compute_otherwise(change, message):
    with pytest.raises(InputError, match=message) as error:
        from_hf(QWEN2 | change)
    assert "\n" not in str(error.value)


def test_a_field_that_config_json_must_not_have_is_passed_over():
    """What says how a model is run is not a checkpoint's to say."""
    own = {"lora": {"rank": 10**9}, "remat": "none", "attention": 3, "param_dtype": "int8", "qk_norm": "x"}
    assert from_hf(QWEN2 | own) == from_hf(QWEN2)


def test_a_fault_of_a_file_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: model num_hidden_layers=1000000000: must be"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    "hf",
    [
        QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1e6, "torch_dtype": "float16", "unknown_note": "kept out"},
        QWEN3 | {"head_dim": 16, "attention_bias": True},
        LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "initializer_range": 0.01},
        MISTRAL | {"sliding_window": 5},
    ],
)
def test_to_hf_builds_the_same_model(hf):
    cfg = from_hf(hf)
    assert from_hf(to_hf(cfg)) == cfg
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in to_hf(cfg).items() if name != "model_type"}
    theirs = transformers.AutoConfig.for_model(cfg.architecture, **fields).to_dict()
    assert from_hf(theirs) == cfg


def test_rope_scaling_may_be_a_mapping_and_overrides_apply():
    cfg = from_hf(LLAMA, rope_scaling=LLAMA3, dtype="float32", remat="dots")
    assert cfg.rope_scaling.factor == 8.0
    assert (cfg.dtype, cfg.remat) == ("float32", "dots")
    assert isinstance(hash(cfg), int)
