"""Where a model's parameters come from: a run, a Hugging Face checkpoint, or the seed.

`open_model` takes any of them. A run's checkpoint holds only what the run trained; what it did not train is read again
from where the run had it.
"""

import dataclasses
import functools
import json
import re
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
from dataflex_jax.models import decoder, layout, lora, parts
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.hf import config as hf_config
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.hf.weights import load_params
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh, shardings
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.training import optim, resume, run_config
from dataflex_jax.training.checkpoint import FOLDER, Checkpoints
from dataflex_jax.training.state import initial_keys

CHECKPOINTS = "a run folder, the folder of one step in it, or a Hugging Face folder or hub id"

Trained = Callable[[str], bool] | None


class RunStep(NamedTuple):
    """A checkpoint of a run."""

    folder: Path
    step: int


class Base(NamedTuple):
    """The frozen parameters of a run, and what tells them from others.

    Attributes:
        params: on the mesh.
        name: where they come from, or "random weights".
        weights: their dtype and fingerprint; the seed where they are random, as devices round these differently.
    """

    params: PyTree[Array]
    name: str
    weights: str

    def identity(self) -> dict[str, str]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "weights": self.weights}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model from somewhere, with what belongs to it.

    Attributes:
        source: as it was given.
        model: on the mesh.
        mesh: the devices.
        tokenizer_source: where its tokenizer is, as a value of `config.data.tokenizer`.
        run: the run's checkpoint that it comes from; None: a Hugging Face checkpoint.
        config: of that run.
        saved: the JSON part of that checkpoint.
        adam: the optimizer's state, where it was asked for and there is one.
    """

    source: str
    model: Model
    mesh: Mesh
    tokenizer_source: str
    run: RunStep | None = None
    config: ConfigDict | None = None
    saved: dict[str, Any] | None = None
    adam: AdamState | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to the model's token ids and back."""
        return load_tokenizer(self.tokenizer_source, texts=lambda: iter(()), cache_dir=self.tokenizer_source)


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
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"
    lora: LoraConfig | None = None
    trainable: tuple[str, ...] | None = None
    seed: int = 0

    @classmethod
    def of(cls, config: ConfigDict) -> "How":
        """As a run with this configuration would have it."""
        model = config.model
        run = {name: model[name] for name in ("dtype", "param_dtype", "remat", "attention", "trainable")}
        return cls(**run, lora=lora.lora_config(config.lora), seed=config.seed)


def locate(source: str | Path, option: str = "--checkpoint") -> RunStep | None:
    """The checkpoint of a run that `source` names: a run folder (its newest step) or the folder of one step.

    None for a Hugging Face checkpoint: a folder or a hub id.

    Raises:
        InputError: it is none of these.
    """
    path = Path(source).expanduser().absolute()
    if path.name.isdigit() and path.parent.name == FOLDER and path.is_dir():
        return RunStep(path.parent.parent, int(path.name))
    if (path / FOLDER).is_dir():
        with Checkpoints(path, writable=False) as checkpoints:
            step = checkpoints.latest()
        if step is None:
            raise InputError(f"no complete checkpoint in {path / FOLDER}", option=_name(option), value=str(path))
        return RunStep(path, step)
    if path.is_dir() and ((path / peft.CONFIG).is_file() or _is_model(path / folders.CONFIG)):
        return None
    if not path.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        return None
    raise InputError(
        f"neither a run folder (with {FOLDER}/), nor a step's folder in one, nor a Hugging Face folder or hub id",
        option=_name(option),
        value=str(path),
    )


def _name(option: str) -> str:
    return option.removeprefix("config.")


def _is_model(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


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
        frozen: False: leave out the parameters that were not trained.

    Raises:
        InputError: it cannot be read, or what it was trained on is missing or has changed since.
    """
    mesh = make_mesh({"fsdp": -1}) if mesh is None else mesh
    with jax.set_mesh(mesh):
        run = locate(source, option)
        if run is None:
            return _open_pretrained(str(source), mesh, option, how or How())
        return _open_run(str(source), run, mesh, optimizer=optimizer, frozen=frozen)


def tokenizer_of(source: str, option: str = "--checkpoint") -> str:
    """Where the tokenizer of a model is, as a value of `config.data.tokenizer`, without reading the model."""
    run = locate(source, option)
    return _pretrained_tokenizer(source, option) if run is None else str(run.folder / "tokenizer")


def _pretrained_tokenizer(source: str, option: str) -> str:
    """An adapter's own tokenizer, or else that of its base."""
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG, "tokenizer*", "*.jinja"], option)
    if (folder / peft.CONFIG).is_file() and not (folder / "tokenizer.json").is_file():
        return peft.read_lora_config(source, option)[1] or source
    return source


def _open_run(source: str, run: RunStep, mesh: Mesh, *, optimizer: bool, frozen: bool) -> Opened:
    config = run_config.read(run.folder)
    with Checkpoints(run.folder, writable=False) as checkpoints:
        saved = checkpoints.read_run(run.step)
        model = Model.shape(resume.saved_model(saved, config.model))
        trained = trained_of(model.config, resume.saved_trainable(saved))
        shapes = {"params": trained_shapes(model, trained)}
        if optimizer:
            made = optim.adamw(config.optim, optim.learning_rate(config.optim, config.train_step))
            shapes["opt_state"] = jax.eval_shape(made.init, shapes["params"])
        read = checkpoints.read_parts(run.step, **layout.placed(mesh, shapes))
    base = open_base(config, model.config, trained, mesh) if frozen else None
    resume.check_base(saved, base and base.identity())
    adam = None
    if optimizer:
        adam = AdamState(read["opt_state"], config.optim.b1, config.optim.b2, config.optim.eps)
    model = model.having(read["params"], base and base.params)
    return Opened(source, model, mesh, str(run.folder / "tokenizer"), run, config, saved, adam)


def _open_pretrained(source: str, mesh: Mesh, option: str, how: How) -> Opened:
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG], option)
    base, adapter = source, None
    if (folder / peft.CONFIG).is_file():
        dtype = how.lora.base_dtype if how.lora else how.param_dtype
        configured, named = peft.read_lora_config(source, option, dtype)
        if named is None:
            raise InputError(f"{folder / peft.CONFIG}: does not name its base")
        base, adapter, how = named, source, dataclasses.replace(how, lora=configured)
    shape = folders.read_config(folders.local_folder(base, [folders.CONFIG], option))
    run = {name: getattr(how, name) for name in ("dtype", "param_dtype", "remat", "attention", "lora")}
    config = hf_config.from_hf(shape, **run)
    trained = trained_of(config, how.trainable)
    frozen = None if trained is None else read_base(base, config, trained, mesh, option)
    shape = Model.shape(config)
    abstract = layout.placed(mesh, trained_shapes(shape, trained))
    params = starting_params(config, abstract, how.seed, base, adapter, frozen, option=option, adapter_option=option)
    model = shape.having(params, frozen and frozen.params)
    return Opened(source, model, mesh, _pretrained_tokenizer(source, option))


def trained_of(config: ModelConfig, patterns: Sequence[str] | None) -> Trained:
    """Which parameters of a model are trained, by path; None: all.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    return parts.trained_paths(_shapes(config), patterns)


def trained_shapes(model: Model, trained: Trained) -> PyTree:
    """Shapes and dtypes of the trained parameters."""
    shapes = _shapes(model.config)
    return shapes if trained is None else parts.split(shapes, trained)[1]


@functools.cache
def _shapes(config: ModelConfig) -> PyTree:
    return jax.eval_shape(lambda key: decoder.create(config, key)[1], jax.random.key(0))


def resolved_model(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model that a configuration asks for, with its adapters; `name_or_path` may be a run.

    Raises:
        InputError: no such model, or one that is incomplete, unsupported or too small for the tokenizer.
    """
    shape, named = None, config.model.name_or_path
    if named is not None and (run := locate(named, "config.model.name_or_path")) is not None:
        with Checkpoints(run.folder, writable=False) as checkpoints:
            saved = checkpoints.read_run(run.step)
        shape = hf_config.to_hf(dataclasses.replace(resume.saved_model(saved, config.model), lora=None))
    model = model_config(config.model, vocab_size, shape)
    return dataclasses.replace(model, lora=lora.lora_config(config.lora))


def open_base(config: ConfigDict, model: ModelConfig, trained: Trained, mesh: Mesh) -> Base | None:
    """The parameters that a run does not train: from `config.model.name_or_path`, or drawn from the seed.

    Drawn ones are those that a run which trains all of them starts from. None where all are trained.

    Raises:
        InputError: weights that cannot be read or do not fit `model`.
    """
    if trained is None:
        return None
    if not config.model.from_scratch:
        return read_base(config.model.name_or_path, model, trained, mesh, "config.model.name_or_path")
    dtype = _frozen_dtype(model)

    def draw(key):
        params = decoder.create(dataclasses.replace(model, lora=None), initial_keys(key)[0])[1]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), parts.split(params, trained)[0])

    key = jax.random.key(config.seed)
    abstract = layout.placed(mesh, jax.eval_shape(draw, key))
    return Base(jax.jit(draw, out_shardings=shardings(abstract))(key), "random weights", f"seed {config.seed}")


def read_base(name: str, model: ModelConfig, trained: Callable[[str], bool], mesh: Mesh, option: str) -> Base:
    """The parameters of a checkpoint that are not to be trained.

    Raises:
        InputError: weights that cannot be read or do not fit `model`.
    """
    dtype = _frozen_dtype(model)
    shapes, _ = parts.split(_shapes(dataclasses.replace(model, lora=None)), trained)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    params = read_weights(name, layout.placed(mesh, shapes), option, model=model)
    return Base(params, name, f"{dtype} {parts.fingerprint(params)}")


def _frozen_dtype(model: ModelConfig) -> jnp.dtype:
    return jnp.dtype(model.param_dtype if model.lora is None else model.lora.base_dtype)


def starting_params(
    model: ModelConfig,
    abstract: PyTree,
    seed: int,
    weights: str | None,
    adapter: str | None,
    base: Base | None,
    *,
    option: str = "config.model.name_or_path",
    adapter_option: str = "config.lora.name_or_path",
) -> PyTree | None:
    """The trained parameters that a fresh run starts from; None: all of them random.

    Args:
        model: with its adapters, if any.
        abstract: shapes, dtypes and shardings of the trained parameters.
        seed: of the run, from which fresh adapters are drawn.
        weights: the checkpoint of all others; None: random ones.
        adapter: a PEFT adapter to start from; None: a fresh one.
        base: the frozen parameters beside them.
        option: what the user set to `weights`, for messages.
        adapter_option: what the user set to `adapter`.

    Raises:
        InputError: they cannot be read or do not fit.
    """
    if weights is None and adapter is None:
        return None
    others, adapters = parts.split(abstract, parts.is_adapter)
    if adapter is not None:
        drawn = peft.load_adapter(adapter, model, adapter_option, base.name, base.weights)
        drawn = jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), drawn, adapters)
    elif adapters:
        # Under jit nothing but the adapters is drawn.
        draw = jax.jit(
            lambda key: parts.split(decoder.create(model, initial_keys(key)[0])[1], parts.is_adapter)[1],
            out_shardings=shardings(adapters),
        )
        drawn = draw(jax.random.key(seed))
    else:
        drawn = {}
    if not others:
        return drawn
    if weights is None:
        raise InputError(f"{adapter_option} = {adapter!r}: needs weights for the other parameters that are trained")
    return parts.combined(read_weights(weights, others, option, model=model), drawn)


def read_weights(name: str, abstract: PyTree, option: str, *, model: ModelConfig) -> PyTree[Array]:
    """Parameters of a checkpoint, a run's or Hugging Face's, in the shapes, dtypes and shardings of `abstract`.

    Of a run with adapters these are merged into it.

    Args:
        name: as for `open_model`.
        abstract: all parameters without adapters, or a part of them.
        option: what the user set to `name`, for messages.
        model: what they are for.

    Raises:
        InputError: they cannot be read, or do not fit.
    """
    if locate(name, option) is None:
        return load_params(name, abstract, option, part=len(jax.tree.leaves(abstract)) < _num_leaves(model))
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    whole = open_model(name, mesh, option=option).model.without_adapters().whole()
    wanted = set(parts.paths(abstract))
    _, found = parts.split(whole, lambda path: path in wanted)
    for path, leaf in parts.leaves(abstract):
        theirs = dict(parts.leaves(found)).get(path)
        if theirs is None or theirs.shape != leaf.shape:
            has = "does not have it" if theirs is None else f"has {list(theirs.shape)} there"
            reason = f"{path} is {list(leaf.shape)} in this run, and the model {has}"
            raise InputError(reason, option=_name(option), value=name)
    cast = jax.jit(
        lambda tree: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, abstract),
        out_shardings=shardings(abstract),
    )
    return cast(found)


def _num_leaves(model: ModelConfig) -> int:
    return len(jax.tree.leaves(_shapes(dataclasses.replace(model, lora=None))))
