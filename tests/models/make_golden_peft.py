"""Writes golden/peft/: an adapter as the peft library saves it, and what the adapted model of transformers then says.

Run from the repository root, where torch, transformers and peft are installed: python -m tests.models.make_golden_peft
"""

import numpy as np

from dataflex_jax.models.hf.config import from_hf
from tests.models.make_golden import GOLDEN, MODELS, random_params, random_tokens, torch_model

FOLDER = GOLDEN / "peft"
MODEL, SEED = "qwen2_tied", 3
SETTINGS = {"r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}


def random_adapter(model, seed: int = 0, **settings):
    """The torch model with an adapter by peft, both factors away from zero."""
    import peft
    import torch

    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    rng = np.random.RandomState(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.tensor(0.3 * rng.standard_normal(parameter.shape), dtype=parameter.dtype)
    return adapted


def main():
    hf = MODELS[MODEL]
    cfg = from_hf(hf)
    adapted = random_adapter(torch_model(hf, random_params(cfg, SEED)), **SETTINGS)
    adapted.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink()
    logits = adapted(torch_tokens(random_tokens(cfg, SEED))).logits
    np.savez_compressed(FOLDER / "logits.npz", logits=logits.detach().numpy())


def torch_tokens(tokens):
    import torch

    return torch.tensor(tokens)


if __name__ == "__main__":
    main()
