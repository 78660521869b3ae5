"""The parameters of a run: those it does not train, and those of a checkpoint, which holds only what is trained."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, lora
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf import peft
from dataflex_jax.models.hf.weights import load_params
from dataflex_jax.models.layout import placed
from dataflex_jax.sharding import shardings
from dataflex_jax.training import optim, resume
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.step import initial_keys


class Base(NamedTuple):
    """The frozen parameters of a LoRA run, and what tells them from others.

    Attributes:
        params: in `config.lora.base_dtype`, on the mesh.
        name: hub id or folder, or "random weights".
        weights: their dtype and fingerprint; the seed where they are random, as devices round these differently.
    """

    params: PyTree
    name: str
    weights: str

    def identity(self) -> dict[str, str]:
        """What a checkpoint remembers of it."""
        return {"name": self.name, "weights": self.weights}


def open_base(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Base | None:
    """The frozen base of a run with adapters: read from `config.model.name_or_path`, or drawn from the seed.

    Drawn ones are those that the run without adapters starts from. None where all parameters are trained.

    Raises:
        InputError: weights that cannot be read or do not fit `model`.
    """
    if model.lora is None:
        return None
    dtype = jnp.dtype(model.lora.base_dtype)
    plain = dataclasses.replace(model, lora=None)

    def draw(key):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), decoder.create(plain, initial_keys(key)[0])[1])

    key = jax.random.key(config.seed)
    abstract = placed(mesh, jax.eval_shape(draw, key))
    if config.model.from_scratch:
        return Base(jax.jit(draw, out_shardings=shardings(abstract))(key), "random weights", f"seed {config.seed}")
    params = load_params(config.model.name_or_path, abstract)
    return Base(params, config.model.name_or_path, f"{dtype} {lora.fingerprint(params)}")


def starting_params(config: ConfigDict, model: ModelConfig, base: Base | None, abstract: PyTree) -> PyTree | None:
    """What a fresh run starts to train from: weights or an adapter that the configuration names; None: random ones.

    Args:
        config: of the run.
        model: as the configuration resolves it.
        base: of the run.
        abstract: shapes, dtypes and shardings of the parameters that are trained.

    Raises:
        InputError: they cannot be read or do not fit.
    """
    if base is not None:
        adapter, option = config.lora.name_or_path, "config.lora.name_or_path"
        return None if adapter is None else peft.load_adapter(adapter, model, option, base.name, base.weights)
    return None if config.model.from_scratch else load_params(config.model.name_or_path, abstract)


def read_checkpoint(
    checkpoints: Checkpoints, step: int, trained: ConfigDict, mesh: Mesh
) -> tuple[ModelConfig, nnx.GraphDef, PyTree]:
    """The model of a checkpoint with all its parameters, adapters beside their base, on the mesh.

    Args:
        checkpoints: of the run.
        step: which one.
        trained: the run's own configuration.
        mesh: the devices.

    Raises:
        InputError: a checkpoint that cannot be read, or a base that is missing or has changed since.
    """
    saved = checkpoints.read_run(step)
    model = resume.saved_model(saved, trained.model)
    graphdef, shapes = jax.eval_shape(lambda key: decoder.create(model, key), jax.random.key(0))
    if model.lora is None:
        return model, graphdef, checkpoints.read_parts(step, params=placed(mesh, shapes))["params"]
    base = open_base(trained, model, mesh)
    resume.check_base(saved, base.identity())
    _, adapters, _ = read_adapters(checkpoints, step, trained, mesh)
    return model, graphdef, lora.combine(base.params, adapters)


class Trained(NamedTuple):
    """A checkpoint's model as it was being trained.

    Attributes:
        graphdef: its static part.
        params: the trained parameters.
        frozen: those beside them; None where all are trained.
        opt_state: the optimizer's state.
    """

    graphdef: nnx.GraphDef
    params: PyTree
    frozen: PyTree | None
    opt_state: PyTree


def read_trained(
    checkpoints: Checkpoints, step: int, trained: ConfigDict, mesh: Mesh, base: Base | None = None
) -> Trained:
    """The trained parameters of a checkpoint apart from the frozen ones, with the optimizer's state, on the mesh.

    Args:
        checkpoints: of the run.
        step: which one.
        trained: the run's own configuration.
        mesh: the devices.
        base: the run's, where it is open already.

    Raises:
        InputError: a checkpoint that cannot be read, or a base that is missing or has changed since.
    """
    saved = checkpoints.read_run(step)
    model = resume.saved_model(saved, trained.model)
    base = base or open_base(trained, model, mesh)
    resume.check_base(saved, base and base.identity())
    optimizer = optim.adamw(trained.optim, optim.learning_rate(trained.optim, trained.train_step))

    def shapes(key):
        params = decoder.create(model, key)[1]
        params = params if model.lora is None else lora.split(params)[1]
        return {"params": params, "opt_state": optimizer.init(params)}

    abstract = placed(mesh, jax.eval_shape(shapes, jax.random.key(0)))
    graphdef, _ = jax.eval_shape(lambda key: decoder.create(model, key), jax.random.key(0))
    parts = checkpoints.read_parts(step, **abstract)
    return Trained(graphdef, parts["params"], base and base.params, parts["opt_state"])


def read_adapters(
    checkpoints: Checkpoints, step: int, trained: ConfigDict, mesh: Mesh
) -> tuple[ModelConfig, PyTree, dict[str, str]]:
    """The model of a LoRA run's checkpoint, its adapters on the mesh, and the identity of the base (`Base.identity`).

    Args:
        checkpoints: of the run.
        step: which one.
        trained: the run's own configuration.
        mesh: the devices.

    Raises:
        InputError: a checkpoint that cannot be read, or has no adapters.
    """
    saved = checkpoints.read_run(step)
    model = resume.saved_model(saved, trained.model)
    if model.lora is None:
        raise InputError(f"{checkpoints.folder / str(step)}: has no adapters, all parameters were trained")
    shapes = jax.eval_shape(lambda key: lora.init(model, model.lora, key), jax.random.key(0))
    return model, checkpoints.read_parts(step, params=placed(mesh, shapes))["params"], saved["base"]
