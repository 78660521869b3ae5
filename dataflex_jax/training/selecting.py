"""Scoring and selecting training examples with checkpoints, without training."""

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.texts import row_texts
from dataflex_jax.errors import InputError
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.base import Request
from dataflex_jax.policies.signals import TARGETS, TEXTS
from dataflex_jax.selection.choosing import Chooser, Chosen, share_of
from dataflex_jax.selection.records import check_records
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import optim, run_config
from dataflex_jax.training.assembly import Inputs, asked_for
from dataflex_jax.training.fits import check_vocabulary
from dataflex_jax.training.locate import CHECKPOINTS, choose_tokenizer, locate, use_tokenizer_of
from dataflex_jax.training.weights import How, open_model

DEFAULT_SHARE = 0.05  # of the pool, as in LESS


class OpenedCheckpoints(Sequence):
    """(weight, signals) of each checkpoint; these are read when they are used, and one is in memory at a time.

    Args:
        sources: as for `open_model`.
        weights: of each.
        how: what becomes of Hugging Face checkpoints.
        sweeper: runs the sweeps.
        data: the candidates, the target set and what else `ModelSignals` wants, by name.
    """

    def __init__(self, sources: Sequence[str], weights: Sequence[float], how: How, sweeper: Sweeper, data: dict):
        self._sources, self._weights, self._how = sources, weights, how
        self._sweeper, self._data = sweeper, data
        self._opened: tuple[int, ModelSignals] | None = None

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, number: int) -> tuple[float, "CheckpointSignals"]:
        return self._weights[number], CheckpointSignals(self, range(len(self))[number])

    def signals(self, number: int) -> ModelSignals:
        """Those of one checkpoint, to be let go of before another one is asked for."""
        if self._opened is None or self._opened[0] != number:
            self._opened = None
            opened = open_model(self._sources[number], self._sweeper.mesh, how=self._how, optimizer=True)
            signals = ModelSignals(Subject(opened.model, opened.adam), self._sweeper, **self._data)
            self._opened = number, signals
        return self._opened[1]


class CheckpointSignals:
    """The signals of one checkpoint, and all checkpoints as `checkpoints`; see `policies.signals.Signals`."""

    def __init__(self, checkpoints: OpenedCheckpoints, number: int):
        self.checkpoints, self._number = checkpoints, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoints.signals(self._number), name)


def select(
    config: ConfigDict,
    sources: Sequence[str],
    weights: Sequence[float] | None,
    num: int | None,
    *,
    records: bool = False,
    by_group: bool = False,
) -> tuple[Pool, Chosen]:
    """The selector's choice of `num` rows of the whole pool.

    Args:
        config: whose selector, data, targets and mesh to use; in the first checkpoint's tokens, or without one in those
            that a run with this configuration would have.
        sources: the checkpoints, as for `open_model`; none for a selector that asks for fixed embeddings or texts.
        weights: of the checkpoints; None: their learning rates, normalised.
        num: how many; None: the share `config.selector.keep` of the pool, by default `DEFAULT_SHARE`.
        records: whether `chosen_records` will be asked for.
        by_group: whether the scores for each target group are wanted too, which takes another pass.

    Raises:
        InputError: a selector that scores nothing or lacks a checkpoint, input that cannot be read, or rows without
            records.
    """
    if sources:
        use_tokenizer_of(config.data, sources[0])
    configuration.validate(config)
    policies = active_policies(config)
    if policies.online is not None:
        reason = "chooses inside training steps; a selector that scores the pool is needed here, such as less"
        raise InputError(reason, option="selector.name", value=policies.online.name)
    if policies.selector is None:
        raise InputError("--config: needs a selector that scores, such as configs/base.py:selector=less")
    if num is not None and policies.keep is not None:
        raise InputError(f"not together with --num={num}; leave one out", option="selector.keep", value=policies.keep)
    if not (sources or policies.fixed_embeddings() or policies.needs(TEXTS)):
        raise InputError(f"--checkpoint is missing: {CHECKPOINTS}")
    if config.data.tokenizer is None:
        choose_tokenizer(config)
    selector = policies.selector.policy
    if by_group and (selector.by_group is None or not policies.needs(TARGETS)):
        raise InputError(
            f"selector {policies.selector.name!r} has one score for all target groups", option="--group_scores"
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        domains, tokenizer = open_domains(config.data)
        for each in sources:
            check_vocabulary(each, tokenizer)
        pool = Pool(domains)
        if records:
            check_records(pool)
        sweeper = Sweeper(mesh, rows=config.sweep.batch_rows)
        spec = config.data.tokenizer
        if spec.startswith("train:"):  # on the candidates, which the targets must not change
            tokenizer.save(folder)
            spec = folder
        inputs = Inputs(domains, tokenizer, spec, pool)
        targets, fixed = asked_for(config, policies, inputs, sweeper)
        data = {"candidates": source(pool, mesh), "targets": targets, "fixed": fixed}
        data |= {"read": functools.partial(row_texts, tokenizer=tokenizer), "codec": tokenizer}
        if sources:
            weights = weights or learning_rates(sources)
            checkpoints = OpenedCheckpoints(sources, weights, How.of(config), sweeper, data)
        else:
            checkpoints = ModelSignals(None, sweeper, **data).checkpoints
        state = selector.init(checkpoints[0][1]) if selector.init else {}
        chooser = Chooser(policies.selector, pool, pool.groups(by_domain=False))
        request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(config.seed))
        count = num or share_of(policies.keep or DEFAULT_SHARE, pool.num_rows)
        chosen, _ = chooser.choose(state, checkpoints[-1][1], request, [count])
        if by_group:
            columns = selector.by_group(checkpoints[-1][1]).T
            chosen = chosen._replace(by_group=dict(zip(targets[0].names, columns, strict=True)))
    return pool, chosen


def learning_rates(sources: Sequence[str]) -> list[float]:
    """The learning rate of each checkpoint's last step, as shares of their sum; equal where all are 0.

    Raises:
        InputError: several checkpoints, one of which is no run's.
    """
    if len(sources) == 1:
        return [1.0]
    rates = []
    for each in sources:
        run = locate(each)
        if run is None:
            raise InputError(f"--checkpoint_weights is missing: {each} is no run's checkpoint and has no learning rate")
        trained = run_config.read(run.folder)
        rates.append(float(optim.learning_rate(trained.optim, trained.train_step)(max(run.step - 1, 0))))
    total = sum(rates)
    return [rate / total for rate in rates] if total else [1 / len(rates)] * len(rates)
