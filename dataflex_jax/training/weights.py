"""A model's parameters: those of a checkpoint, and those that a run starts from.

`open_model` takes a run, one step of it or a Hugging Face checkpoint. A run's checkpoint holds only what the run
trained; what it did not train is read again from where the run had it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, layout, lora, parts, vocabulary
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.hf import config as hf_config
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.hf.weights import load_params
from dataflex_jax.models.model import Model
from dataflex_jax.policies import registry
from dataflex_jax.sharding import make_mesh, shardings
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.training import optim, resume, run_config
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.locate import RunStep, adapter_and_base, locate, run_at, tokenizer_of
from dataflex_jax.training.state import initial_keys

Trained = Callable[[str], bool] | None
RANDOM = "random weights"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model from somewhere, with what belongs to it.

    Attributes:
        source: as it was given.
        model: on the mesh.
        mesh: the devices.
        tokenizer_source: where its tokenizer is, as a value of `config.data.tokenizer`.
        base: `Base.identity` of what was not trained; None where all was.
        run: the run's checkpoint that it comes from; None: a Hugging Face checkpoint.
        config: of that run.
        saved: the JSON part of that checkpoint.
        adam: the optimizer's state, where it was asked for and there is one.
    """

    source: str
    model: Model
    mesh: Mesh
    tokenizer_source: str
    base: dict[str, str] | None = None
    run: RunStep | None = None
    config: ConfigDict | None = None
    saved: dict[str, Any] | None = None
    adam: AdamState | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to the model's token ids and back."""
        return load_tokenizer(
            self.tokenizer_source,
            texts=lambda: iter(()),
            cache_dir=self.tokenizer_source,
            begin_of_text=None if self.config is None else self.config.data.begin_of_text,
        )


@dataclasses.dataclass(frozen=True)
class How:
    """How a Hugging Face checkpoint becomes a model; a run's is as the run had it.

    Attributes:
        dtype: of the forward and backward pass.
        param_dtype: of the parameters.
        remat: what the backward pass recomputes.
        attention: "auto", "xla" or "cudnn".
        lora: fresh adapters on it; None: none.
        trainable: patterns of the parameters that are trained; None: all, or the adapters alone.
        seed: of fresh adapters.
        head: whether it is to predict tokens; False: hidden states are wanted alone, a head is neither needed nor read.
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"
    lora: LoraConfig | None = None
    trainable: tuple[str, ...] | None = None
    seed: int = 0
    head: bool = True

    @classmethod
    def of(cls, config: ConfigDict) -> "How":
        """As a run with this configuration would have it."""
        model = config.model
        run = {name: model[name] for name in ("dtype", "param_dtype", "remat", "attention", "trainable")}
        return cls(**run, lora=lora.lora_config(config.lora), seed=config.seed)


def open_model(
    source: str | Path,
    mesh: Mesh | None = None,
    *,
    option: str = "--checkpoint",
    how: How | None = None,
    optimizer: bool = False,
    frozen: bool = True,
) -> Opened:
    """The model of a run folder (its newest step), of one step's folder, of a Hugging Face folder or hub id.

    A folder in PEFT's format is a model with adapters on the base that it names.

    Args:
        source: which one.
        mesh: the devices; None: all, with the parameters split over them.
        option: what the user set to `source`, for messages.
        how: what becomes of a Hugging Face checkpoint.
        optimizer: read the optimizer's state too.
        frozen: False: leave out the parameters that a run did not train.

    Raises:
        InputError: it cannot be read, or what it was trained on is missing or has changed since.

    >>> opened = df.open_model(folder)  # or "Qwen/Qwen2.5-0.5B"
    >>> opened.model.config.hidden_size, opened.tokenizer.encode_batch(["abc"])
    (32, [[97, 98, 99]])
    """
    mesh = make_mesh({"fsdp": -1}) if mesh is None else mesh
    with jax.set_mesh(mesh):
        run = locate(source, option)
        if run is None:
            return _open_pretrained(str(source), mesh, option, how or How())
        return _open_run(str(source), run, mesh, optimizer=optimizer, frozen=frozen)


def _open_run(source: str, run: RunStep, mesh: Mesh, *, optimizer: bool, frozen: bool) -> Opened:
    config = run_config.read(run.folder)
    registry.load_plugins(config.plugins)
    with Checkpoints(run.folder, writable=False) as checkpoints:
        saved = checkpoints.read_run(run.step)
        model = Model.shape(resume.saved_model(saved, config.model))
        trained = trained_of(model.config, resume.saved_trainable(saved))
        shapes = {"params": _trained_shapes(model.config, trained)}
        if optimizer:
            made = optim.adamw(config.optim, optim.learning_rate(config.optim, config.train_step))
            shapes["opt_state"] = jax.eval_shape(made.init, shapes["params"])
        read = checkpoints.read_parts(run.step, **layout.placed(mesh, shapes))
    origin, identity = Origin.of(config), saved.get("base")
    base = open_base(origin, model.config, trained, mesh) if frozen else None
    resume.check_base(saved, base and base.identity())
    if identity is not None:
        identity = identity | {"name": origin.weights or RANDOM}  # where it is by now
    adam = None
    if optimizer:
        adam = AdamState(read["opt_state"], config.optim.b1, config.optim.b2, config.optim.eps)
    model = model.having(read["params"], base and base.params)
    return Opened(source, model, mesh, tokenizer_of(source), identity, run, config, saved, adam)


def _open_pretrained(source: str, mesh: Mesh, option: str, how: How) -> Opened:
    adapter, weights = adapter_and_base(source, option, how.lora.base_dtype if how.lora else how.param_dtype)
    run = {name: getattr(how, name) for name in ("dtype", "param_dtype", "remat", "attention")}
    headless = {} if how.head else {"tie_word_embeddings": True}  # a model without weights for one
    config = hf_config.from_hf(_hf_config(weights, option), **run, **headless, lora=adapter or how.lora)
    origin = Origin(how.seed, weights, source if adapter else None, option, option, head=how.head)
    trained = trained_of(config, how.trainable)
    base = open_base(origin, config, trained, mesh)
    params = starting_params(origin, config, layout.placed(mesh, _trained_shapes(config, trained)), base)
    model = Model.shape(config).having(params, base and base.params)
    return Opened(source, model, mesh, tokenizer_of(source, option), base and base.identity())


# What a model is, and what of it is trained.


def resolved_model(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model that a configuration asks for, with its adapters; `name_or_path` may be a run.

    Raises:
        InputError: no such model, or one that is incomplete, unsupported or too small for the tokenizer.
    """
    named, option = config.model.name_or_path, "model.name_or_path"
    shape = _hf_config(named, option) if named is not None and run_at(named, option) else None
    return dataclasses.replace(model_config(config.model, vocab_size, shape), lora=lora.lora_config(config.lora))


def _hf_config(source: str, option: str) -> dict[str, Any]:
    """The config.json of a checkpoint; of a run, what it would be exported with."""
    run = run_at(source, option)
    if run is None:
        return hf_config.read_shape(folders.local_folder(source, [folders.CONFIG], option))
    with Checkpoints(run.folder, writable=False) as checkpoints:
        model = resume.saved_model(checkpoints.read_run(run.step), run_config.read(run.folder).model)
    return hf_config.to_hf(dataclasses.replace(model, lora=None))


def shape_of(source: str, option: str = "--checkpoint") -> ModelConfig:
    """The shape of a model, of any kind that `open_model` takes; its parameters are not read.

    Raises:
        InputError: no such model.
    """
    if run_at(source, option) is None:
        _, source = adapter_and_base(source, option, "float32")
    return hf_config.from_hf(_hf_config(source, option))


def vocab_size_of(source: str, option: str = "--checkpoint") -> int:
    """How many tokens a model has; see `shape_of`."""
    return shape_of(source, option).vocab_size


def trained_of(config: ModelConfig, patterns: Sequence[str] | None) -> Trained:
    """Which parameters of a model are trained, by path; None: all.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    return parts.trained_paths(_shapes(config), patterns)


def _trained_shapes(config: ModelConfig, trained: Trained) -> PyTree:
    shapes = _shapes(config)
    return shapes if trained is None else parts.split(shapes, trained)[1]


@functools.cache
def _shapes(config: ModelConfig) -> PyTree:
    return jax.eval_shape(lambda key: decoder.create(config, key)[1], jax.random.key(0))


# What a run starts from.


class Origin(NamedTuple):
    """Where the parameters of a model come from before any step.

    Attributes:
        seed: of those that are drawn.
        weights: a checkpoint, as for `open_model`; None: they are drawn.
        adapter: a PEFT folder or hub id; None: fresh adapters, if there are any.
        option: what the user set to `weights`, for messages.
        adapter_option: what the user set to `adapter`.
        resize_vocab: whether tokens that the weights lack are added to them.
        head: see `How`.
    """

    seed: int
    weights: str | None
    adapter: str | None
    option: str = "model.name_or_path"
    adapter_option: str = "lora.name_or_path"
    resize_vocab: bool = False
    head: bool = True

    @classmethod
    def of(cls, config: ConfigDict) -> "Origin":
        """What a configuration names."""
        model = config.model
        weights = None if model.from_scratch else model.name_or_path
        return cls(config.seed, weights, config.lora.name_or_path, resize_vocab=model.resize_vocab)


class Base(NamedTuple):
    """The frozen parameters of a run, and what tells them from others.

    Attributes:
        params: on the mesh.
        name: where they come from, or `RANDOM`.
        weights: their dtype and fingerprint; the seed where they are random, as devices round these differently.
    """

    params: PyTree[Array]
    name: str
    weights: str

    def identity(self) -> dict[str, str]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "weights": self.weights}


def open_base(origin: Origin, model: ModelConfig, trained: Trained, mesh: Mesh) -> Base | None:
    """The parameters that are not trained; None where all are.

    Drawn ones are those that a run which trains all of them starts from.

    Raises:
        InputError: weights that cannot be read or do not fit `model`.
    """
    if trained is None:
        return None
    dtype = jnp.dtype(model.param_dtype if model.lora is None else model.lora.base_dtype)
    plain = dataclasses.replace(model, lora=None)

    def draw(key):
        frozen, _ = parts.split(decoder.create(plain, initial_keys(key)[0])[1], trained)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), frozen)

    key = jax.random.key(origin.seed)
    abstract = layout.placed(mesh, jax.eval_shape(draw, key))
    if origin.weights is None:
        return Base(jax.jit(draw, out_shardings=shardings(abstract))(key), RANDOM, f"seed {origin.seed}")
    if grown := _has_new_tokens(origin, plain) and vocabulary.grown_paths(abstract):
        reason = f"config.model.resize_vocab adds rows to {grown[0]}, which must be trained; name it too"
        raise InputError(reason, option="model.trainable")
    params = _read_weights(origin, plain, abstract)
    return Base(params, origin.weights, f"{dtype} {parts.fingerprint(params)}")


def _has_new_tokens(origin: Origin, plain: ModelConfig) -> bool:
    grows = origin.resize_vocab and origin.weights is not None
    return grows and vocab_size_of(origin.weights, origin.option) < plain.vocab_size


def starting_params(origin: Origin, model: ModelConfig, abstract: PyTree, base: Base | None) -> PyTree | None:
    """The trained parameters before the first step; None: all of them are drawn, as `Start.state` does.

    Args:
        origin: where they come from.
        model: with its adapters, if any.
        abstract: shapes, dtypes and shardings of the trained parameters.
        base: the frozen parameters beside them.

    Raises:
        InputError: they cannot be read or do not fit.
    """
    if origin.weights is None and origin.adapter is None:
        return None
    others, adapters = parts.split(abstract, parts.is_adapter)
    if origin.adapter is not None:
        read = peft.load_adapter(origin.adapter, model, origin.adapter_option, base.name, base.weights)
        adapters = jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), read, adapters)
    elif adapters:
        # Under jit nothing but the adapters is drawn.
        draw = jax.jit(
            lambda key: parts.split(decoder.create(model, initial_keys(key)[0])[1], parts.is_adapter)[1],
            out_shardings=shardings(adapters),
        )
        adapters = draw(jax.random.key(origin.seed))
    if not others:
        return adapters
    if origin.weights is None:
        reason = "needs weights for what is trained beside it"
        raise InputError(reason, option=origin.adapter_option, value=origin.adapter)
    return parts.combined(_read_weights(origin, dataclasses.replace(model, lora=None), others), adapters)


def _read_weights(origin: Origin, plain: ModelConfig, abstract: PyTree) -> PyTree[Array]:
    """Parameters of `origin.weights` in the shapes, dtypes and shardings of `abstract`, all of `plain`'s or a part.

    A run's adapters are merged into them. Tokens that the weights lack are added where the origin says so.
    """
    grows = _has_new_tokens(origin, plain)
    if run_at(origin.weights, origin.option) is None:
        part = parts.paths(abstract) != parts.paths(_shapes(plain))
        held = vocabulary.of_size(abstract, vocab_size_of(origin.weights, origin.option)) if grows else abstract
        read = load_params(origin.weights, held, origin.option, part=part, head=origin.head)
        return vocabulary.grown(read, abstract)
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    wanted = dict(parts.leaves(abstract))
    found = open_model(origin.weights, mesh, option=origin.option).model.without_adapters().whole()
    _, found = parts.split(found, lambda path: path in wanted)
    if grows:
        found = vocabulary.grown(found, abstract)
    there = dict(parts.leaves(found))
    for path, leaf in wanted.items():
        if path not in there or there[path].shape != leaf.shape:
            has = f"has {list(there[path].shape)} there" if path in there else "does not have it"
            reason = f"{path} is {list(leaf.shape)} in this run, and the model {has}"
            raise InputError(reason, option=origin.option, value=origin.weights)
    cast = jax.jit(
        lambda tree: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, abstract),
        out_shardings=shardings(abstract),
    )
    return cast(found)
