"""Writes golden/: what Hugging Face transformers makes of tiny models on torch.

NAME.npz: logits, losses (in float64) and gradients. hf_tensors.json: names and shapes of the checkpoints. CHECKPOINT/:
one of them. classifiers.npz: logits of sequence classification, of the texts `classified_texts`.

Run from the repository root, where torch and transformers are installed: python -m tests.models.make_golden
"""

import json
import pathlib
import re
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
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
MODELS |= {
    "mixtral": _SIZES | {"model_type": "mixtral", "rope_theta": 1e6, "num_local_experts": 4, "sliding_window": 7},
    "qwen2_moe": _SIZES
    | _EXPERTS
    | {"model_type": "qwen2_moe", "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "qwen3_moe": _SIZES
    | _EXPERTS
    | {"model_type": "qwen3_moe", "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": _SIZES
    | _EXPERTS
    | {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 3}
    | {"pad_token_id": None, "eos_token_id": None},
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
WITH_GRADIENTS = ("qwen2_untied", *MIXTURES)
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
        query, key = cfg.qk_norm_widths()
        attention |= {"q_norm": norm(layers, query), "k_norm": norm(layers, key)}

    def gated(width):
        return {
            "gate_proj": linear(cfg.hidden_size, width, False),
            "up_proj": linear(cfg.hidden_size, width, False),
            "down_proj": linear(width, cfg.hidden_size, False),
        }

    def mixture(experts):
        number, width = cfg.num_experts, cfg.expert_width
        mixed = {
            "router": linear(cfg.hidden_size, number, False),
            "experts": {
                "gate_proj": kernel(layers, number, cfg.hidden_size, width),
                "up_proj": kernel(layers, number, cfg.hidden_size, width),
                "down_proj": kernel(layers, number, width, cfg.hidden_size),
            },
        }
        if experts.shared:
            mixed["shared_expert"] = gated(cfg.shared_expert_intermediate_size)
            mixed["shared_expert_gate"] = linear(cfg.hidden_size, 1, False)
        return mixed

    experts = cfg.family.experts
    mlp = gated(cfg.intermediate_size) if experts is None else mixture(experts)
    params = {
        "embed_tokens": {"embedding": rng.standard_normal((cfg.vocab_size, cfg.hidden_size)).astype(np.float32)},
        "layers": {
            "input_layernorm": norm(layers, cfg.hidden_size),
            "attention": attention,
            "post_attention_layernorm": norm(layers, cfg.hidden_size),
            ("mlp" if experts is None else experts.block): mlp,
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


def _is_mixture(hf: dict) -> bool:
    return hf["model_type"] in MIXTURES


def torch_model(hf: dict, params: dict):
    """The model of transformers with these parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**hf)
    eager = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if _is_mixture(hf) else {})
    model = transformers.AutoModelForCausalLM.from_config(config, **eager, dtype=torch.float32)
    state = {name: torch.tensor(array) for name, array in _with_stacked_experts(hf_named(params)).items()}
    result = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if hf.get("tie_word_embeddings") else []
    if result.missing_keys not in ([], tied) or result.unexpected_keys:
        raise ValueError(f"the parameters do not fit: {result}")
    return model


_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(.*)\.weight")
_STACKED = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "up_proj": "gate_up_proj", "w3": "gate_up_proj"}


def _with_stacked_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint by the names of the parameters in transformers, which has all experts in two."""
    plain = {name: array for name, array in tensors.items() if not _EXPERT.match(name)}
    plain = {name.replace("block_sparse_moe", "mlp"): array for name, array in plain.items()}
    experts = [(match, array) for name, array in tensors.items() if (match := _EXPERT.match(name))]
    stacked = {}
    # Of each expert the gate comes before what it gates.
    for match, array in sorted(experts, key=lambda pair: (int(pair[0][2]), pair[0][3] in ("up_proj", "w3"))):
        name = f"{match[1]}.mlp.experts.{_STACKED.get(match[3], 'down_proj')}"
        stacked.setdefault(name, {}).setdefault(int(match[2]), []).append(array)
    joined = {name: np.stack([np.concatenate(parts) for parts in of.values()]) for name, of in stacked.items()}
    return plain | joined


def _without_stacked_experts(hf: dict, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_with_stacked_experts`."""
    apart = {}
    mixtral = hf["model_type"] == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, array in gradients.items():
        _, found, kind = name.partition(".mlp.experts.")
        renamed = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        if not found:
            apart[renamed] = array
            continue
        block = renamed.removesuffix(f".{kind}")
        for i, expert in enumerate(array):
            parts = np.split(expert, 2) if kind == "gate_up_proj" else [expert]
            of_kind = names[:2] if kind == "gate_up_proj" else names[2:]
            apart |= {f"{block}.{i}.{part}.weight": values for part, values in zip(of_kind, parts, strict=True)}
    return apart


def torch_outputs(model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], float]:
    """(logits [B, T, V], losses [B, T], gradients of the loss by Hugging Face's names, the load-balancing loss).

    From transformers; the loss is the mean, and of a mixture of experts its load-balancing loss is added.
    """
    import torch

    tokens, hf = torch.tensor(tokens), model.config.to_dict()
    mixture = _is_mixture(hf)
    output = model(tokens[:, :-1], **({"output_router_logits": True} if mixture else {}))
    losses = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    balancing = output.aux_loss if mixture else torch.zeros(())
    model.zero_grad()
    (losses.mean() + hf.get("router_aux_loss_coef", 0.0) * balancing).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    if mixture:
        gradients = _without_stacked_experts(hf, gradients)
    return output.logits.detach().numpy(), losses.detach().numpy(), gradients, balancing.item()


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
        logits, _, gradients, balancing = torch_outputs(model, tokens)
        _, losses, _, _ = torch_outputs(model.double(), tokens)
        arrays = {"seed": np.array(seed), "tokens": tokens.astype(np.uint8), "logits": logits, "losses": losses}
        if name in WITH_GRADIENTS:
            arrays |= {f"gradient/{path}": gradient for path, gradient in gradients.items()}
        if name in MIXTURES:
            arrays |= {"balancing": np.array(balancing)}
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
    np.savez_compressed(GOLDEN / "classifiers.npz", **{name: torch_classifications(name) for name in CLASSIFIERS})
    lines = [f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in written.items()]
    (GOLDEN / "hf_tensors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
