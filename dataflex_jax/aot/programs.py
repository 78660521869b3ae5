"""The programs of a configuration with the shapes and shardings of what they are given; no data is read, no weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax import gpu_compiler
from dataflex_jax.data.batch import Batch
from dataflex_jax.data.domains import buckets
from dataflex_jax.data.loader import check_rows, segment_slots
from dataflex_jax.data.sources.table import is_instruction
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig, check_experts
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.models.layout import placed
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.signals import (
    Alignments,
    GradientNorms,
    Gradients,
    Influences,
    Losses,
    Preconditioner,
    Projection,
)
from dataflex_jax.sharding import batch_sharding, make_mesh, replicated, shardings
from dataflex_jax.signals import model_signals  # noqa: F401 - registers how they are computed
from dataflex_jax.signals.directions import abstract_directions
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.rows import select_of, selected_paths
from dataflex_jax.training import optim
from dataflex_jax.training.state import Fixed, Start, TrainState
from dataflex_jax.training.step import TrainStep
from dataflex_jax.training.weights import resolved_model, trained_of

NEW_TOKENS = 128
_DIRECTIONS = 8
_EXAMPLE = 128  # tokens of the examples in a packed row, on average
_ADAM = Preconditioner()
# What sweeps ask of each row, as selectors do by default.
_SIGNALS = {
    "losses": Losses(),
    "norms": GradientNorms(),
    "gradients": Gradients(Projection("sketch", 8192), adam=_ADAM),
    "kronecker": Gradients(Projection("kronecker", 8192)),
    "rademacher": Gradients(Projection("rademacher", 1024), adam=_ADAM),
    "influences": Influences(adam=_ADAM),
    "alignments": Alignments(),
}
KINDS = ("train", *_SIGNALS, "generate")


class Program(NamedTuple):
    """A program, ready to be compiled.

    Attributes:
        function: jitted, and not lowered yet.
        arguments: `jax.ShapeDtypeStruct`s with shardings.
        held: the same by what they are: parameters, optimizer, frozen, batch, directions.
        mesh: the devices.
        model: the model's shape.
        tokens: that a run reads, or makes, on all devices.
        model_flops: of a run on all devices, as MFU counts them; None: of this kind it does not count.
        options: of XLA's GPU compiler, as in `gpu_compiler.options`.
        trips: at most, of loops that end by what they compute.
    """

    function: Any
    arguments: tuple
    held: dict[str, PyTree]
    mesh: Mesh
    model: ModelConfig
    tokens: int
    model_flops: float | None = None
    options: Mapping[str, str] = {}  # nobody changes it
    trips: int = 1


class _Run(NamedTuple):
    """What all programs of a configuration share."""

    config: ConfigDict
    mesh: Mesh
    model: ModelConfig
    start: Start
    rate: Callable
    mixer: Any
    state: TrainState
    frozen: PyTree | None
    rows: int
    length: int
    packed: bool

    def batch(self, num_domains: int | None = None) -> Batch:
        """Of the longest rows."""

        def of_rows(*shape, dtype="int32"):
            return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=batch_sharding(self.mesh))

        in_example = of_rows(self.length) if self.packed else None
        whole = replicated(self.mesh)
        return Batch(
            tokens=of_rows(self.length + 1),
            mask=of_rows(self.length, dtype="float32"),
            lengths=of_rows(),
            domain=of_rows(),
            drawn_with=num_domains and jax.ShapeDtypeStruct((num_domains,), "float32", sharding=whole),
            segment_ids=in_example,
            positions=in_example,
            most_segments=segment_slots(self.length // _EXAMPLE) if self.packed else None,
        )

    def held(self, **others: PyTree) -> dict[str, PyTree]:
        """What a device holds."""
        return {"parameters": self.state.params, "optimizer": None, "frozen": self.frozen, "batch": None} | others


def program(kind: str, config: ConfigDict, devices: list[jax.Device], vocab_size: int = 2) -> Program:
    """A program of a configuration on these devices.

    "train" is the step with its mixer, with adapters where the configuration has them; weighters and what selectors do
    inside the step are left out. "losses", "norms", "gradients" (LESS's: 8,192 sketched numbers of what Adam makes of
    them), "kronecker" (8,192), "rademacher" (1,024), "influences" (along 8 directions) and "alignments" (along one)
    are sweeps over a batch of rows, beside the state of a run; "generate" continues as many prompts, of the rows'
    length, greedily by 128 tokens.

    Args:
        kind: one of `KINDS`.
        config: of the run.
        devices: that its mesh is made of.
        vocab_size: the tokenizer's, where the model's shape does not say.

    Raises:
        InputError: a configuration that is refused.
    """
    if kind not in KINDS:
        raise InputError(f"--program={kind}: must be one of {', '.join(KINDS)}")
    configuration.validate(config)
    mesh = make_mesh(config.mesh, devices)
    check_rows(mesh, config.data.batch_size, config.data.grad_accumulation)
    # The mesh is not set: what is computed here would run on its devices.
    run = _run(config, mesh, vocab_size)
    if kind == "train":
        return _training(run)
    return _generation(run) if kind == "generate" else _sweep(run, kind)


def _run(config: ConfigDict, mesh: Mesh, vocab_size: int) -> _Run:
    model = resolved_model(config, vocab_size)
    check_experts(model, mesh.shape["expert"])
    trained, mixer = trained_of(model, config.model.trainable), active_policies(config).mixer
    rate = optim.learning_rate(config.optim, config.train_step)
    proportions = jnp.ones(_domains(config)) / _domains(config)
    start = Start(Model.shape(model), trained, optim.adamw(config.optim, rate), mixer.policy.init(proportions))
    frozen = None
    if trained is not None:
        whole = jax.eval_shape(lambda: Model.random(model, jax.random.key(0)).training(trained))
        dtype = jnp.dtype(model.param_dtype if model.lora is None else model.lora.base_dtype)
        frozen = placed(mesh, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), whole.frozen))
    instruction = is_instruction(config.data)
    length = max(buckets(config.data)) if instruction else config.data.seq_len
    packed = instruction and config.data.packing
    state = start.abstract(mesh)
    return _Run(config, mesh, model, start, rate, mixer, state, frozen, config.data.batch_size, length, packed)


def _domains(config: ConfigDict) -> int:
    """K, or as many as SlimPajama has where the data says."""
    return len(config.data.domains or "1234567")


def _training(run: _Run) -> Program:
    state, batch = run.state, run.batch(_domains(run.config))
    accumulation = run.config.data.grad_accumulation
    step = TrainStep(run.start.model, run.start.optimizer, run.rate, run.mixer, grad_accumulation=accumulation)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), replicated(run.mesh)))
    tokens = run.rows * run.length
    return Program(
        function=jitted,
        arguments=(state, batch, Fixed(run.frozen)),
        held=run.held(optimizer=state.opt_state, batch=batch),
        mesh=run.mesh,
        model=run.model,
        tokens=tokens,
        model_flops=tokens * run.model.flops_per_token(run.length),
        options=gpu_compiler.options(run.model.scan_layers),
    )


def _sweep(run: _Run, kind: str) -> Program:
    signal, batch, adam = _SIGNALS[kind], run.batch(), run.config.optim
    model = run.start.model.having(run.state.params, run.frozen)
    subject = Subject(model, AdamState(run.state.opt_state, adam.b1, adam.b2, adam.eps))
    directions = None
    if kind == "influences":
        paths = selected_paths(model.params, select_of("blocks"))
        directions = abstract_directions(run.mesh, model.params, paths, _DIRECTIONS)
    elif kind == "alignments":
        directions = jax.tree.map(_stacked, model.params)
    # As `signals.sweep` compiles it.
    function = jax.jit(row_function(signal), out_shardings=replicated(run.mesh))
    return Program(
        function=function,
        arguments=((subject, directions), batch),
        held=run.held(optimizer=run.state.opt_state, batch=batch, directions=directions),
        mesh=run.mesh,
        model=run.model,
        tokens=run.rows * run.length,
    )


def _stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One direction."""
    split = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec(None, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((1, *leaf.shape), jnp.float32, sharding=split)


def _generation(run: _Run) -> Program:
    def continued(model, prompts, lengths):
        return generate(model, prompts, lengths, max_new_tokens=NEW_TOKENS, stop_tokens=jnp.zeros(1, jnp.int32))

    batch = run.batch()
    prompts = jax.ShapeDtypeStruct((run.rows, run.length), "int32", sharding=batch_sharding(run.mesh))
    return Program(
        function=jax.jit(continued),
        arguments=(run.start.model.having(run.state.params, run.frozen), prompts, batch.lengths),
        held=run.held(batch=(prompts, batch.lengths)),
        mesh=run.mesh,
        model=run.model,
        tokens=run.rows * NEW_TOKENS,
        trips=NEW_TOKENS - 1,
    )
