"""The library's face, `import dataflex_jax as df`: models, rows and signals about them, without a run folder.

Every function takes a `Model` and rows and sweeps over them in batches that fit the devices; results are NumPy arrays
with an entry a row.

    opened = df.open_model("Qwen/Qwen2.5-0.5B")              # or a run folder, or one step of it
    rows = df.rows(["a text", "another one"], opened.tokenizer)
    df.losses(opened.model, rows)
    df.gradients(opened.model, rows, projection=df.Projection("sketch", 1024))
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, PyTree

from dataflex_jax.data.batch import Batch, collated, smallest_bucket
from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.rows import Row
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.text.chat import ChatEncoder, template_text
from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from dataflex_jax.policies import options, registry
from dataflex_jax.policies.base import Mixer, Order, Selector, Weighter
from dataflex_jax.policies.common.pooling import POOLINGS
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.signals import (
    Alignments,
    Embed,
    Embeddings,
    GateLoads,
    GradientNorms,
    Gradients,
    Losses,
    Preconditioner,
    Projection,
)
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject, register_signal
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training.state import Start, TrainState
from dataflex_jax.training.step import TrainStep
from dataflex_jax.training.weights import How, Opened, open_model

__all__ = [
    "AdamState",
    "Alignments",
    "Batch",
    "Embeddings",
    "GateLoads",
    "GradientNorms",
    "Gradients",
    "Hooks",
    "How",
    "InputError",
    "LoraConfig",
    "Losses",
    "Mixer",
    "Model",
    "ModelConfig",
    "Opened",
    "Order",
    "Preconditioner",
    "Projection",
    "Schedule",
    "Scheduled",
    "Selector",
    "Start",
    "TrainState",
    "TrainStep",
    "Weighter",
    "alignments",
    "batch",
    "embeddings",
    "example",
    "gradients",
    "losses",
    "mixer",
    "norms",
    "open_model",
    "open_tokenizer",
    "order",
    "register_signal",
    "rows",
    "selector",
    "sweep",
    "weighter",
]

Chat = Sequence[dict[str, Any]]


def example(**shape: Any) -> tuple[Model, Tokenizer]:
    """A tiny random model and a tokenizer of bytes, to try things with.

    Args:
        **shape: fields of `ModelConfig` in place of the tiny ones.

    >>> model, tokenizer = df.example()
    >>> model.config.num_params()
    28960
    """
    tokenizer = open_tokenizer("bytes")
    tiny = {
        "architecture": "qwen2",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "dtype": "float32",
    }
    return Model.random(ModelConfig(**(tiny | shape)), jax.random.key(0)), tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer: a hub id, a folder, a path to a tokenizer.json, or "bytes".

    Raises:
        InputError: no such tokenizer.

    >>> df.open_tokenizer("bytes").encode_batch(["abc"])
    [[97, 98, 99]]
    """
    return load_tokenizer(name, texts=lambda: iter(()), cache_dir=".")


def rows(
    items: Sequence[str | Chat], tokenizer: Tokenizer, *, max_length: int = 2048, template: str | None = None
) -> ListedRows:
    """Texts or chats as rows of tokens.

    Of a text everything is predicted, and the end of the text after it. Of a chat, in Hugging Face's form, the
    assistant's turns are.

    Args:
        items: texts, or lists of messages {"role": ..., "content": ...}.
        tokenizer: the model's.
        max_length: further tokens are cut off.
        template: of chats: "qwen", "llama3", "mistral", "alpaca"; None: the tokenizer's own.

    Raises:
        InputError: an item without anything to predict, or a chat that the template refuses.

    >>> _, tokenizer = df.example()
    >>> df.rows(["Ada", "Grace Hopper"], tokenizer).lengths().tolist()
    [3, 12]
    >>> chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> int(df.rows([chat], tokenizer, template="alpaca").row(0).mask.sum())
    2
    """
    if isinstance(items, str) or not items:
        raise InputError("rows: give a list of texts or chats, at least one")
    made = []
    for number, item in enumerate(items):
        tokens, targets = _text(item, tokenizer) if isinstance(item, str) else _chat(item, tokenizer, template)
        tokens, mask = tokens[:max_length], targets[1:max_length]
        if not mask.any():
            raise InputError(f"rows: item {number} has nothing to predict within {max_length} tokens")
        made.append(Row(tokens, mask))
    return ListedRows(made)


def _text(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array(tokenizer.encode_documents([text])[0], np.int32)
    return tokens, np.ones(len(tokens), bool)


def _chat(messages: Chat, tokenizer: Tokenizer, template: str | None) -> tuple[np.ndarray, np.ndarray]:
    encoder = ChatEncoder(tokenizer, template_text(template, tokenizer))
    (encoded,) = encoder.encode_batch([Conversation(list(messages))])
    if isinstance(encoded, str):
        raise InputError(f"rows: {encoded}")
    return encoded.tokens, encoded.targets


def batch(
    rows: ListedRows,
    ids: Sequence[int] | None = None,
    *,
    domains: Sequence[int] | None = None,
    drawn_with: Sequence[float] | None = None,
) -> Batch:
    """Some of the rows as one batch, for functions of your own and for `TrainStep`.

    Args:
        rows: from `rows`.
        ids: which of them; None: all.
        domains: of these rows, in [0, K); None: all of domain 0.
        drawn_with: the proportions that a mixer is to take the batch to be drawn with, [K].

    >>> _, tokenizer = df.example()
    >>> df.batch(df.rows(["Ada", "Grace Hopper"], tokenizer)).tokens.shape
    (2, 17)
    """
    ids = range(rows.num_rows) if ids is None else ids
    length = smallest_bucket([rows.length(i) for i in ids], rows.buckets)
    made = collated([rows.row(i) for i in ids], length, [0] * len(ids) if domains is None else domains)
    if drawn_with is not None:
        made = dataclasses.replace(made, drawn_with=np.asarray(drawn_with, np.float32))
    return jax.tree.map(jnp.asarray, made)


def sweep(model: Model, rows: ListedRows, signal: Hashable, *, adam: AdamState | None = None, operand: PyTree = None):
    """Any signal of each row, also of a kind of your own; see docs/extending.md.

    Args:
        model: what is asked.
        rows: from `rows`.
        signal: what is wanted.
        adam: the optimizer's state, for signals that take it.
        operand: arrays for the signal.

    >>> model, tokenizer = df.example()
    >>> df.sweep(model, df.rows(["Ada"], tokenizer), df.Losses()).shape
    (1,)
    """
    mesh = _mesh_of(model)
    with jax.set_mesh(mesh):
        pool = rows.pool()
        ids = np.arange(rows.num_rows)
        row_set = SweptRows(
            Subject(model, adam), _sweeper(mesh), source(pool, mesh), ids, np.zeros_like(ids), (), "rows"
        )
        return row_set.sweep(signal, operand=operand)


def losses(model: Model, rows: ListedRows) -> Float[np.ndarray, " n"]:
    """Token-mean loss of each row in nats.

    >>> model, tokenizer = df.example()
    >>> bool((df.losses(model, df.rows(["Ada", "Grace"], tokenizer)) > 5).all())  # ln 320 is 5.8
    True
    """
    return sweep(model, rows, Losses())


def embeddings(model: Model, rows: ListedRows, pooling: str | Embed = "mean") -> Float[np.ndarray, "n E"]:
    """One vector a row from the last hidden states.

    Args:
        model: what is asked.
        rows: from `rows`.
        pooling: "mean", "last" or "position_weighted", which are L2-normalised; or a function of (hidden states
            [B, T, D], 1 where an input is no padding [B, T]).

    >>> model, tokenizer = df.example()
    >>> df.embeddings(model, df.rows(["Ada", "Grace"], tokenizer), "last").shape
    (2, 32)
    """
    if isinstance(pooling, str):
        options.one_of("pooling", pooling, tuple(POOLINGS))
        pooling = POOLINGS[pooling]
    return sweep(model, rows, Embeddings(pooling))


def gradients(
    model: Model,
    rows: ListedRows,
    *,
    projection: Projection = Projection(),  # noqa: B008 - a constant
    adam: AdamState | None = None,
    preconditioner: Preconditioner = Preconditioner(),  # noqa: B008 - a constant
    parameters: str = "blocks",
    then: Callable[[Float[jax.Array, "B P"], PyTree], Any] | None = None,
    operand: PyTree = None,
) -> Float[np.ndarray, "n *P"]:  # noqa: F821 - a shape
    """Each row's projected gradient of its token-mean loss with respect to the model's trained parameters.

    Projected where it appears in the backward pass: one layer's per-example gradients are in memory at a time. By
    default it is that of the adapters where there are any, else of the kernels of the blocks' linear layers.

    Args:
        model: whose gradients.
        rows: from `rows`.
        projection: the random map; `Projection("none")` keeps every number.
        adam: the optimizer's state, such as `open_model(..., optimizer=True).adam`: precondition by it, as LESS does.
        preconditioner: how.
        parameters: "blocks", as above; or "all" that are trained, embeddings, head, norms and biases too.
        then: keeps only what is wanted of the P numbers of a batch, given `operand` too; a function that stays the
            same object is compiled once.
        operand: arrays for `then`.

    >>> model, tokenizer = df.example()
    >>> df.gradients(model, df.rows(["Ada", "Grace"], tokenizer), projection=df.Projection("sketch", 64)).shape
    (2, 64)
    """
    signal = Gradients(projection, None if adam is None else preconditioner, then, parameters)
    return sweep(model, rows, signal, adam=adam, operand=operand)


def norms(model: Model, rows: ListedRows) -> Float[np.ndarray, " n"]:
    """The norm of each row's gradient, exact; no weight's gradient is formed.

    >>> model, tokenizer = df.example()
    >>> lines = df.rows(["Ada", "Grace"], tokenizer)
    >>> exact = np.linalg.norm(df.gradients(model, lines, projection=df.Projection("none")), axis=1)
    >>> np.allclose(df.norms(model, lines), exact, rtol=1e-4)
    True
    """
    return sweep(model, rows, GradientNorms())


def alignments(model: Model, rows: ListedRows, directions: Sequence[PyTree]) -> Float[np.ndarray, "n G"]:
    """<g, direction> of each row's gradient g, exact: nothing is projected; of one layer at a time there are gradients.

    Args:
        model: whose gradients.
        rows: from `rows`.
        directions: trees like `model.params`, such as gradients of target losses.

    >>> model, tokenizer = df.example()
    >>> zero = jax.tree.map(jnp.zeros_like, model.params)
    >>> df.alignments(model, df.rows(["Ada", "Grace"], tokenizer), [model.params, zero]).shape
    (2, 2)
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    return sweep(model, rows, Alignments(), operand=stacked)


def _policy(kind: str, name: str, hyperparameters: dict[str, Any]) -> Any:
    section = registry.policy_config(kind, name)
    for option, value in hyperparameters.items():
        if option not in section:
            raise InputError(f"{kind} {name!r} has no hyperparameter {option!r}; it has {', '.join(section)}")
        with section.ignore_type():
            section[option] = value
    return registry.build(kind, section, Schedule(0, 1, -1))


def mixer(name: str, **hyperparameters: Any) -> Scheduled[Mixer]:
    """A mixer by name, with its schedule (`warmup_step`, `update_step` and `update_times` are hyperparameters too).

    Raises:
        InputError: no such mixer or hyperparameter, or a value that it refuses.

    >>> odm = df.mixer("odm", alpha=0.8, warmup_step=10)
    >>> odm.schedule.warmup_step, odm.policy.sampling_weights(odm.policy.init(jnp.array([0.5, 0.5]))).tolist()
    (10, [0.5, 0.5])
    """
    return _policy("mixer", name, hyperparameters)


def selector(name: str, **hyperparameters: Any) -> Scheduled[Selector]:
    """A selector by name; see `mixer`.

    >>> df.selector("less", proj_dim=256).name
    'less'
    """
    return _policy("selector", name, hyperparameters)


def order(name: str, **hyperparameters: Any) -> Scheduled[Order]:
    """An order by name; see `mixer`.

    >>> df.order("folding", L=2).policy.arrange(np.array([3.0, 1.0, 2.0, 0.0]), jax.random.key(0)).tolist()
    [3, 2, 1, 0]
    """
    return _policy("order", name, hyperparameters)


def weighter(name: str, **hyperparameters: Any) -> Scheduled[Weighter]:
    """A weighter by name; see `mixer`.

    >>> df.weighter("loss", strategy="quadratic").name
    'loss'
    """
    return _policy("weighter", name, hyperparameters)


def _mesh_of(model: Model) -> Mesh:
    """The mesh that the parameters are on; where they are on no mesh, one of their device alone."""
    leaf = jax.tree.leaves(model.params)[0]
    if isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding.mesh
    return make_mesh({}, list(leaf.devices()))


@functools.cache
def _sweeper(mesh: Mesh) -> Sweeper:
    return Sweeper(mesh)
