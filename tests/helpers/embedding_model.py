"""A tiny embedding checkpoint as Qwen3-Embedding's are: a decoder alone, whose texts end with an end of text.

Run from the repository root, where torch and transformers are installed, to write golden/qwen3_embedding.npz:
python -m tests.helpers.embedding_model
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from dataflex_jax.models.hf.config import from_hf
from tests.models.make_golden import GOLDEN, MODELS, hf_named, random_params

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = MODELS["qwen3"] | {"vocab_size": 272, "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 64}
TEXTS = ("the capital", "Instruct: find\nQuery:the", "a", "the theatre, the thermometer and the other three of them")
WIDTH = SHAPE["hidden_size"]


def write(folder: Path, *, seed: int = 7, prefix: str = "", heads: Sequence[str] = (), **fields: Any) -> Path:
    """The folder, with config.json, model.safetensors and the tokenizer's files.

    Args:
        folder: where.
        seed: of the weights.
        prefix: of the tensors' names.
        heads: names of further tensors.
        **fields: of config.json.
    """
    folder.mkdir(parents=True)
    shape = SHAPE | fields
    params = hf_named(random_params(from_hf(SHAPE), seed))
    tensors = {prefix + name.removeprefix("model."): value for name, value in params.items()}
    further = {name: np.ones((3, WIDTH), np.float32) for name in heads}
    save_file(tensors | further, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*letters, "th", "the"))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.add_special_tokens(list(TOKENS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = processors.TemplateProcessing(
        single=f"$A {TOKENS[0]}", special_tokens=[(TOKENS[0], backend.token_to_id(TOKENS[0]))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), end])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": TOKENS[2], "pad_token": TOKENS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path) -> np.ndarray:
    """The embeddings of `TEXTS` as the model's card has them computed, [4, WIDTH]."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(dim=1) - 1
    return torch.nn.functional.normalize(hidden[torch.arange(len(TEXTS)), last], dim=1).numpy()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        np.savez(GOLDEN / "qwen3_embedding.npz", embeddings=by_transformers(write(Path(made) / "model")))
