"""Any number of models: trained so many at a time as the devices hold, measured, and gone on with after a stop."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax import preemption
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.record_numbers import record_numbers
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.mapped import states as mapped_states
from dataflex_jax.mapped.book import FILE, Book, identity
from dataflex_jax.mapped.draws import Draws
from dataflex_jax.mapped.loop import Standing, Together, train
from dataflex_jax.mapped.measuring import Measure
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.programs import MappedStep
from dataflex_jax.mapped.refreshing import Refreshes
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import active_policies
from dataflex_jax.reporting.progress import Progress, Throughput
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.training import duration, fits, run_config
from dataflex_jax.training.assembly import Experiment, compared_with, open_inputs, run_signals
from dataflex_jax.training.checkpoint import Checkpoints, Contents
from dataflex_jax.training.locate import choose_tokenizer
from dataflex_jax.training.run_signals import RunSignals
from dataflex_jax.training.setup import make_experiment


class Shared(NamedTuple):
    """What the models have in common, and where they are trained.

    Attributes:
        experiment: their configuration, data, policies and shape.
        mesh: the devices, all along "data".
        folder: what is kept of them.
        checkpoints: in it, of those in training.
        loader: gathers rows of the pool.
        reference: the policies' reference model, where the step runs it.
        signals: what policies may ask of a model.
        stop_requested: whether to save and stop after a step.
    """

    experiment: Experiment
    mesh: Mesh
    folder: Path
    checkpoints: Checkpoints
    loader: Loader
    reference: Model | None
    signals: RunSignals
    stop_requested: Callable[[int], bool]


@contextlib.contextmanager
def opened(config: ConfigDict, folder: Path, *, whole_pool: bool = False) -> Iterator[Shared]:
    """What models of a configuration share, with the mesh set.

    Args:
        config: of each of them; `epochs` are passes over the whole pool, also for members that see a part of it. A mesh
            of all devices along "data" takes the place of the configuration's.
        folder: for what is kept of them.
        whole_pool: whether rows are drawn from the pool as a whole, not domain by domain.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
    """
    configuration.validate(config)
    if config.selector or config.order:
        kind = "selector" if config.selector else "order"
        raise InputError("models that are trained as one program draw without one; leave it None", option=kind)
    if config.data.max_epochs is not None:
        reason = "models that are trained as one program draw without limits; leave it None"
        raise InputError(reason, option="data.max_epochs")
    if config.data.tokenizer is None:
        choose_tokenizer(config)
    mesh = make_mesh({"data": -1})
    active_policies(config)  # refuses what it can before any data is read
    fits.check_tokenizer(config)
    with Checkpoints(folder, keep=1) as checkpoints, jax.set_mesh(mesh):
        inputs = open_inputs(config.data, folder, checkpoints.newest_sound())
        duration.settle(config, inputs.pool.num_rows)
        experiment = make_experiment(config, inputs, mesh, whole_pool=whole_pool)
        with preemption.watch() as stop_requested:
            sweeper = Sweeper(mesh, rows=config.sweep.batch_rows, poll=preemption.polling(stop_requested))
            signals = run_signals(experiment, mesh, sweeper)
            reference, cached = compared_with(experiment, signals.candidates, sweeper)
            of_rows = cached | record_numbers(experiment.policies.records(), inputs.pool, config.data)
            loader = Loader(inputs.pool, mesh, of_rows)
            yield Shared(experiment, mesh, folder, checkpoints, loader, reference, signals, stop_requested)


def train_and_measure(
    shared: Shared, members: Sequence[Member], targets: Sequence[TargetSet], *, at_once: int | None = None
) -> Float64[np.ndarray, "S G"] | None:
    """The token-mean loss of each member on each group of `targets` once it is trained; None: asked to stop, saved.

    What the folder has of them already is not trained again.

    Args:
        shared: what they have in common.
        members: the models.
        targets: what is measured; the groups of the first set come first.
        at_once: how many are trained as one program; None: as many as fit into the devices' memory.

    Raises:
        InputError: the folder is of other models, or a member has no rows of a domain.
        TrainingError: a model that cannot go on.
    """
    experiment = shared.experiment
    groups = experiment.inputs.pool.groups(by_domain=experiment.policies.by_domain)
    for member in members:
        member.rows_by_group(groups)
    names = [name for each in targets for name in each.names]
    book = Book(shared.folder / FILE, identity(experiment, targets), names)
    run_config.write(experiment.config, shared.folder / "config.json")
    measures = [Measure(each, _rows_a_batch(experiment.config), shared.mesh) for each in targets]
    if not book.missing(members):
        return book.losses(members)
    while remaining := book.missing(members):
        chunk, standing, before = _next(shared, book, remaining, at_once)
        title = f"{len(remaining)} models to train, {len(chunk.members)} as one program."
        standing = _trained(shared, chunk, standing, before, title)
        if standing.step < experiment.config.train_step:
            return None
        params, model = standing.states.params, experiment.learner.model
        book.add(chunk.members, np.concatenate([each.losses(params, model) for each in measures], axis=1))
    shared.checkpoints.clear()  # nobody is in training any more
    return book.losses(members)


def _rows_a_batch(config: ConfigDict) -> int:
    return config.data.batch_size // config.data.grad_accumulation


def _together(shared: Shared, members: Sequence[Member]) -> Together:
    """The members as one program; of a number that the devices cannot share equally the last one comes again."""
    shards = shared.mesh.shape["data"]
    members = [*members, *[members[-1]] * (-len(members) % shards)]
    experiment, drawn = shared.experiment, mapped_states.drawn_domains(shared.experiment, members)
    return Together(
        experiment,
        members,
        Draws(experiment, members, shared.loader, shared.mesh),
        MappedStep(experiment, shared.reference, drawn, shared.mesh),
        Refreshes(experiment, members, shared.signals),
        shared.checkpoints.last_good,
    )


def _fitting(shared: Shared, members: Sequence[Member]) -> Together:
    """As many of the first members as fit into the devices' memory, or one a device."""
    count = len(members)
    while True:
        chunk = _together(shared, members[:count])
        states = mapped_states.abstract(shared.experiment.learner, len(chunk.members), shared.mesh)
        plans = [plan for plan, _ in chunk.draws.plans([p.sampler for p in _beginnings(chunk)])]
        batch = chunk.draws.load(chunk.draws.rows(plans), plans, max(shared.experiment.inputs.pool.buckets))
        if len(chunk.members) <= shared.mesh.shape["data"] or chunk.step.fits(states, batch):
            return chunk
        count = math.ceil(len(chunk.members) / 2)


def _beginnings(chunk: Together) -> list:
    weights_of = chunk.experiment.policies.mixer.policy.sampling_weights
    weights = [weights_of(mapped_states.starting_mixer(chunk.experiment, member)) for member in chunk.members]
    return chunk.draws.beginnings(np.asarray(weights, np.float64))


def _next(
    shared: Shared, book: Book, remaining: Sequence[Member], at_once: int | None
) -> tuple[Together, Standing, int]:
    """Who is trained next, where they stand, and how many steps were saved in the folder before their first.

    Raises:
        InputError: others are in training.
    """
    latest = shared.checkpoints.latest() or 0
    if latest and (begun := _begun(shared, book, remaining, latest)):
        return begun
    chunk = _fitting(shared, remaining) if at_once is None else _together(shared, remaining[:at_once])
    states = mapped_states.fresh(shared.experiment, chunk.members, shared.mesh)
    return chunk, Standing(0, states, _beginnings(chunk)), latest


def _begun(
    shared: Shared, book: Book, remaining: Sequence[Member], latest: int
) -> tuple[Together, Standing, int] | None:
    """Those that the newest checkpoint has in training; None: they are done.

    Raises:
        InputError: they are not among the remaining, or too many or too few for the devices.
    """
    saved = shared.checkpoints.read_run(latest)
    if book.has(saved["members"]):
        return None
    by_identity = [(member.identity(), member) for member in remaining]
    members = [next((member for known, member in by_identity if known == one), None) for one in saved["members"]]
    if None in members:
        name = saved["members"][members.index(None)]["name"]
        raise InputError(f"{shared.folder}: other models are in training there ({name}); choose another folder")
    if len(members) % shared.mesh.shape["data"]:
        raise InputError(
            f"{shared.folder}: {len(members)} models are in training there as one program, which "
            f"{shared.mesh.shape['data']} devices cannot share equally; go on with as many as before"
        )
    chunk = _together(shared, members)
    states = mapped_states.abstract(shared.experiment.learner, len(members), shared.mesh)
    positions = [chunk.draws.from_json(position) for position in saved["positions"]]
    standing = Standing(latest - saved["before"], shared.checkpoints.read_state(latest, states), positions)
    return chunk, standing, saved["before"]


def _trained(shared: Shared, chunk: Together, standing: Standing, before: int, title: str) -> Standing:
    """The members of a chunk at their end, or where they stood when they were asked to stop."""
    throughput = Throughput()

    def save(now: Standing) -> None:
        members = [member.identity() for member in chunk.members]
        positions = [chunk.draws.to_json(position) for position in now.positions]
        run = {"before": before, "members": members, "positions": positions}
        shared.checkpoints.save(before + now.step, Contents(now.states, run))

    with Progress(shared.experiment.config.train_step, standing.step) as progress:
        progress.message(title)

        def stepped(step: int, loss: float, tokens: int) -> None:
            throughput.update(tokens)
            progress.update(step, loss=loss, tokens_per_second=throughput.tokens_per_second)

        standing = train(chunk, standing, save, shared.stop_requested, stepped)
    shared.checkpoints.wait()
    return standing
