"""Programs of a small model by XLA's GPU compiler, which needs no GPU; each is compiled once."""

import functools
from typing import Any, NamedTuple

import pytest

from dataflex_jax.aot import compiler, hlo
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.cost import Cost
from dataflex_jax.aot.estimate import Estimate, compiled, estimated
from dataflex_jax.aot.programs import program
from dataflex_jax.configs import base
from tests.helpers.tiny import having

needs_compiler = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
LAYERS, VOCAB, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 3, 2048, 256, 640, 4, 2, 64
# More tokens a device than the loss has in a tile.
ROWS, LENGTH, DEVICES = 64, 512, 8
LAYER_WEIGHTS = WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * MLP
TABLE = VOCAB * WIDTH
TOKENS = ROWS * LENGTH // DEVICES


def small(**fields):
    """The configuration of a model that cuDNN's attention takes; `fields` as in `tiny.having`."""
    config = base.get_config("mixer=odm")
    config.model.update(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    config.data.update(seq_len=LENGTH, cutoff_len=LENGTH + 1, batch_size=ROWS)
    return having(config, fields)


class Compiled(NamedTuple):
    """A program, and what it takes."""

    module: hlo.Module
    estimate: Estimate

    @property
    def cost(self) -> Cost:
        return self.estimate.cost

    @property
    def attentions(self) -> tuple[int, int]:
        """How often cuDNN's attention runs: (forward, backward)."""
        calls = self.cost.calls
        return calls.get("__cudnn$fmhaSoftmax", 0), calls.get("__cudnn$fmhaSoftmaxBackward", 0)


def gpu_program(kind: str = "train", devices: int = DEVICES, card: str = "h100", **fields) -> Compiled:
    """A program of `small(**fields)`, which recomputes the blocks unless the fields say otherwise."""
    fields = {"model__remat": "full"} | fields
    return _compiled(kind, devices, card, tuple(sorted(fields.items())))


@functools.cache
def _compiled(kind: str, devices: int, card: str, fields: tuple[tuple[str, Any], ...]) -> Compiled:
    made = program(kind, small(**dict(fields)), CARDS[card].devices(devices))
    executable = compiled(made.function, made.arguments, made.mesh, CARDS[card], made.options)
    return Compiled(hlo.parse(executable.as_text()), estimated(made, executable, CARDS[card]))


def moved(compiled: Compiled, kind: str, dtype: str) -> int:
    """Bytes in a dtype that the collectives of a kind move."""
    of_kind = [each for each in compiled.cost.collectives if each.transfer.kind == kind]
    return sum(each.times * each.transfer.by_dtype.get(dtype, 0) for each in of_kind)


def memory(compiled: Compiled) -> int:
    """Bytes of a device's temporaries."""
    return compiled.estimate.memory.temporaries
