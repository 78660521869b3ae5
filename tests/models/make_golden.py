"""Writes golden/: what Hugging Face transformers makes of tiny models on torch.

NAME.npz: logits, losses (in float64) and gradients. hf_tensors.json: names and shapes of the checkpoints. CHECKPOINT/:
one of them. classifiers.npz: logits of sequence classification, of the texts `classified_texts`.

Run from the repository root, where torch and transformers are installed: python -m tests.models.make_golden
"""

import json
import pathlib
import tempfile

import numpy as np
from safetensors import safe_open

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.models.hf.weights import hf_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
_SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# config.json contents; rows of 40 tokens go beyond Llama's original context and Mistral's window.
MODELS = {
    "qwen2_tied": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2_untied": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen3": _SIZES | {"model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 8},
    "llama3": _SIZES | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3, "head_dim": 8},
    "llama_biased": _SIZES | {"model_type": "llama", "rope_theta": 1e4, "attention_bias": True},
    "mistral": _SIZES | {"model_type": "mistral", "rope_theta": 1e4, "sliding_window": 7},
}
WITH_GRADIENTS = "qwen2_untied"
CHECKPOINT = "llama3"
CLASSIFIERS = {"qwen2_tied": 1, "qwen3": 2, "llama3": 1, "llama_biased": 3, "mistral": 1}  # their numbers of labels


def random_params(cfg: ModelConfig, seed: int) -> dict:
    """Parameters in this framework's layout, far enough from their initial values that each of them matters."""
    # RandomState's streams never change, so the files need not hold the weights.
    rng = np.random.RandomState(seed)
    heads, layers = cfg.num_attention_heads * cfg.head_dim, cfg.num_hidden_layers
    groups = cfg.num_key_value_heads * cfg.head_dim

    def kernel(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

    def linear(inputs, outputs, bias):
        bias = {"bias": rng.standard_normal((layers, outputs)).astype(np.float32)} if bias else {}
        return {"kernel": kernel(layers, inputs, outputs)} | bias

    def norm(*shape):
        return {"scale": (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32)}

    attention = {
        "q_proj": linear(cfg.hidden_size, heads, cfg.attention_bias),
        "k_proj": linear(cfg.hidden_size, groups, cfg.attention_bias),
        "v_proj": linear(cfg.hidden_size, groups, cfg.attention_bias),
        "o_proj": linear(heads, cfg.hidden_size, cfg.output_bias),
    }
    if cfg.qk_norm:
        attention |= {"q_norm": norm(layers, cfg.head_dim), "k_norm": norm(layers, cfg.head_dim)}
    mlp = {
        "gate_proj": linear(cfg.hidden_size, cfg.intermediate_size, False),
        "up_proj": linear(cfg.hidden_size, cfg.intermediate_size, False),
        "down_proj": linear(cfg.intermediate_size, cfg.hidden_size, False),
    }
    params = {
        "embed_tokens": {"embedding": rng.standard_normal((cfg.vocab_size, cfg.hidden_size)).astype(np.float32)},
        "layers": {
            "input_layernorm": norm(layers, cfg.hidden_size),
            "attention": attention,
            "post_attention_layernorm": norm(layers, cfg.hidden_size),
            "mlp": mlp,
        },
        "norm": norm(cfg.hidden_size),
    }
    if not cfg.tie_word_embeddings:
        params["lm_head"] = {"kernel": kernel(cfg.hidden_size, cfg.vocab_size)}
    return params


def hf_named(params: dict) -> dict[str, np.ndarray]:
    """The same arrays under Hugging Face's names, one a layer, weights as [out, in]."""
    return {tensor.name: np.asarray(tensor.value()) for tensor in hf_tensors(params)}


def random_tokens(cfg: ModelConfig, seed: int, length: int = 40) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, cfg.vocab_size, (2, length + 1))


def classified_texts(cfg: ModelConfig) -> list[list[int]]:
    """Tokens of texts of different lengths, without padding."""
    return [random_tokens(cfg, length, length)[0, :length].tolist() for length in (1, 3, 17, 40)]


def classifier_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a sequence-classification checkpoint, by Hugging Face's names."""
    params = random_params(from_hf(MODELS[name] | {"tie_word_embeddings": True}), seed=11)
    head = np.random.RandomState(12).standard_normal((CLASSIFIERS[name], _SIZES["hidden_size"]))
    return hf_named(params) | {"score.weight": head.astype(np.float32)}


def torch_classifier(name: str):
    """The classifier of transformers with `classifier_tensors`."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**MODELS[name], num_labels=CLASSIFIERS[name])
    make = transformers.AutoModelForSequenceClassification.from_config
    model = make(config, attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict({key: torch.tensor(array) for key, array in classifier_tensors(name).items()})
    return model


def torch_classifications(name: str) -> np.ndarray:
    """The logits of `classified_texts`, one by one: [texts, labels]."""
    import torch

    model = torch_classifier(name)
    texts = classified_texts(from_hf(MODELS[name]))
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([text])).logits.numpy() for text in texts])


def torch_model(hf: dict, params: dict):
    """The model of transformers with these parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**hf)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {name: torch.tensor(array) for name, array in hf_named(params).items()}
    result = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if hf.get("tie_word_embeddings") else []
    if result.missing_keys not in ([], tied) or result.unexpected_keys:
        raise ValueError(f"the parameters do not fit: {result}")
    return model


def torch_outputs(model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(logits [B, T, V], losses [B, T], gradients of the mean loss by Hugging Face's names) from transformers."""
    import torch

    tokens = torch.tensor(tokens)
    logits = model(tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    losses.mean().backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return logits.detach().numpy(), losses.detach().numpy(), gradients


def main():
    GOLDEN.mkdir(exist_ok=True)
    written = {}
    for seed, (name, hf) in enumerate(MODELS.items()):
        cfg = from_hf(hf)
        tokens = random_tokens(cfg, seed)
        model = torch_model(hf, random_params(cfg, seed))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with safe_open(f"{folder}/model.safetensors", "np") as file:
                written[name] = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
        if name == CHECKPOINT:
            model.save_pretrained(GOLDEN / name, max_shard_size="8KB")
        logits, _, gradients = torch_outputs(model, tokens)
        _, losses, _ = torch_outputs(model.double(), tokens)
        arrays = {"seed": np.array(seed), "tokens": tokens.astype(np.uint8), "logits": logits, "losses": losses}
        if name == WITH_GRADIENTS:
            arrays |= {f"gradient/{path}": gradient for path, gradient in gradients.items()}
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
    np.savez_compressed(GOLDEN / "classifiers.npz", **{name: torch_classifications(name) for name in CLASSIFIERS})
    lines = [f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in written.items()]
    (GOLDEN / "hf_tensors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
