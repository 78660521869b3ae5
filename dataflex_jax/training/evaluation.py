"""Held-out loss per domain."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.loader import held_out_batches
from dataflex_jax.training.step import PyTree, eval_step


def make_evaluate(
    graphdef: nnx.GraphDef, domains: Sequence[Domain], batch_size: int, max_rows: int, mesh: Mesh
) -> Callable[[PyTree], dict[str, Any]]:
    """A function from parameters to the record of eval.jsonl (without the step).

    Per domain and overall: nll [nats a token], perplexity = exp(nll), bits_per_byte (of UTF-8 text), tokens (that
    count in the loss). Domains without held-out rows are left out.

    Args:
        graphdef: the model's static part.
        domains: the K domains.
        batch_size: rows a batch.
        max_rows: rows a domain, at most, from the start of its held-out split.
        mesh: the devices.
    """
    step = jax.jit(functools.partial(eval_step, graphdef, len(domains)))

    def evaluate(params: PyTree) -> dict[str, Any]:
        batches = held_out_batches(domains, batch_size, max_rows, mesh)
        sums = jax.device_get([step(params, batch) for batch in batches])
        nll, tokens = (sum((s[i] for s in sums), start=np.zeros(len(domains))) for i in range(2))
        return _record(domains, nll, tokens)

    return evaluate


def _record(domains: Sequence[Domain], nll_sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    byte_counts = [n * domain.valid.bytes_per_target for n, domain in zip(tokens, domains, strict=True)]
    figures = {
        domain.name: _figures(nll, n, num_bytes)
        for domain, nll, n, num_bytes in zip(domains, nll_sums, tokens, byte_counts, strict=True)
        if n
    }
    overall = _figures(nll_sums.sum(), tokens.sum(), sum(byte_counts)) if figures else None
    return {"split": "valid", "domains": figures, "overall": overall}


def _figures(nll_sum: float, tokens: float, num_bytes: float) -> dict[str, float]:
    nll = nll_sum / tokens
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": nll_sum / math.log(2) / num_bytes,
        "tokens": int(tokens),
    }
