"""What a sequence-classification model, which has its own tokenizer, makes of texts."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.rows import Row
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.classifier import open_classifier, probability
from dataflex_jax.policies.signals import Embeddings
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.sweep import Sweeper, source

_OPTION = "selector.reward"


def judged(judge: str, texts: Sequence[str], like: ModelConfig, sweeper: Sweeper) -> Float[np.ndarray, " n"]:
    """The classifier's probability of each text; see `policies.signals.Signals.judge`.

    It is in memory only meanwhile: between two selections the memory is the training's.

    Args:
        judge: a folder or hub id.
        texts: at least one.
        like: the model in training, whose compute dtype it has.
        sweeper: runs the sweep.

    Raises:
        InputError: see `open_classifier`; no tokenizer beside it.
    """
    classifier = open_classifier(judge, sweeper.mesh, like, _OPTION)
    tokenizer = load_tokenizer(judge, texts=lambda: iter(()), cache_dir=judge)
    rows = ListedRows([_row(ids or [tokenizer.eos_id]) for ids in tokenizer.encode_rendered(texts)])
    operands = Subject(classifier.model), classifier.head
    swept = source(rows.pool("judged texts"), sweeper.mesh)
    return sweeper.run(row_function(_JUDGED), operands, swept, np.arange(rows.num_rows), "rewards of responses")


def _row(ids: list[int]) -> Row:
    # A row's last token is only predicted, so one more follows that nobody looks at.
    return Row(np.array([*ids, 0], np.int32), np.zeros(len(ids), bool))


def _last(hidden: Float[Array, "B T D"], real: Float[Array, "B T"]) -> Float[Array, "B D"]:
    place = jnp.maximum(jnp.sum(real, axis=1).astype(jnp.int32) - 1, 0)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def _probability(last: Float[Array, "B D"], head: Float[Array, "D L"]) -> Float[Array, " B"]:
    return probability(jnp.matmul(last, head, precision="highest"))


_JUDGED = Embeddings(_last, then=_probability)
