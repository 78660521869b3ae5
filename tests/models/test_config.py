"""What a configuration refuses, and the sizes and FLOPs that follow from it."""

import dataclasses

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig

MISTRAL = ModelConfig(
    architecture="mistral",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("field", ["dtype", "param_dtype", "remat", "attention", "architecture"])
def test_refuses_unknown_choices_of_ours(field):
    with pytest.raises(InputError, match=f"{field}='other'.*accepted: "):
        dataclasses.replace(MISTRAL, **{field: "other"})


def test_sizes_of_published_models():
    """Parameter counts of Qwen2.5-0.5B and Llama-3.2-1B as their safetensors headers give them."""
    qwen = ModelConfig(
        architecture="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    assert qwen.num_params() == 494_032_768
    llama = ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    assert llama.num_params() == 1_235_814_400


def test_flops_by_hand():
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    matmuls = 6 * (3 * per_layer + 100 * 32)
    # Four queries see 1, 2, 3 and 4 keys; each (query, key) pair costs 2 FLOPs a channel in QK^T and in PV, thrice.
    assert MISTRAL.flops_per_token(4) == matmuls + 3 * 12 * 32 * (1 + 2 + 3 + 4) / 4
    windowed = dataclasses.replace(MISTRAL, sliding_window=2)
    assert windowed.flops_per_token(4) == matmuls + 3 * 12 * 32 * (1 + 2 + 2 + 2) / 4
    assert dataclasses.replace(MISTRAL, tie_word_embeddings=True).flops_per_token(4) == MISTRAL.flops_per_token(4)
