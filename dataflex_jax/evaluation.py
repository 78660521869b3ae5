"""Held-out loss per domain."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dataflex_jax.data.loader import held_out_batches
from dataflex_jax.data.store import DomainStore
from dataflex_jax.state import PyTree, eval_step


def make_evaluate(
    graphdef: nnx.GraphDef, stores: Sequence[DomainStore], seq_len: int, batch_size: int, max_rows: int, mesh: Mesh
) -> Callable[[PyTree], dict[str, Any]]:
    """A function from parameters to the record of eval.jsonl (without the step).

    Per domain and overall: nll [nats a token], perplexity = exp(nll), bits_per_byte (of UTF-8 text), tokens. Domains
    without held-out text are left out.

    Args:
        graphdef: the model's static part.
        stores: the K domains.
        seq_len: T, tokens a row.
        batch_size: rows a batch.
        max_rows: rows a domain, at most, from the start of its held-out split.
        mesh: the devices.
    """
    step = jax.jit(functools.partial(eval_step, graphdef, len(stores)))

    def evaluate(params: PyTree) -> dict[str, Any]:
        batches = held_out_batches(stores, seq_len, batch_size, max_rows, mesh)
        sums = jax.device_get([step(params, batch) for batch in batches])
        nll, tokens = (np.sum([s[i] for s in sums], axis=0, dtype=np.float64) for i in range(2))
        return _record(stores, np.atleast_1d(nll), np.atleast_1d(tokens))

    return evaluate


def _record(stores: Sequence[DomainStore], nll_sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    byte_counts = [n * s.valid.num_bytes / max(s.valid.num_tokens, 1) for n, s in zip(tokens, stores, strict=True)]
    domains = {
        store.name: _figures(nll, n, num_bytes)
        for store, nll, n, num_bytes in zip(stores, nll_sums, tokens, byte_counts, strict=True)
        if n
    }
    overall = _figures(nll_sums.sum(), tokens.sum(), sum(byte_counts)) if domains else None
    return {"split": "valid", "domains": domains, "overall": overall}


def _figures(nll_sum: float, tokens: float, num_bytes: float) -> dict[str, float]:
    nll = nll_sum / tokens
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": nll_sum / math.log(2) / num_bytes,
        "tokens": int(tokens),
    }
