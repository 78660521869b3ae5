"""Evaluators: what is measured of the model on the way. The held-out loss by domain is one; plugins register others.

    @register_evaluator("accuracy")
    def accuracy(context):
        def run(model):
            ...
            return {"split": "accuracy", "domains": {"algebra": {"accuracy": 0.4}}, "overall": {"accuracy": 0.4}}

        return Evaluator("accuracy", context.config.eval_every, run)

`config.evaluators` names those that a run uses.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.loader import held_out_batches
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError, shown
from dataflex_jax.harness import tasks as harness
from dataflex_jax.harness.results import evaluation
from dataflex_jax.models.model import Model
from dataflex_jax.policies.contract import check_fields, takes
from dataflex_jax.policies.user_code import user_code
from dataflex_jax.training.step import domain_statistics

Evaluation = dict[str, Any]


class Evaluator(NamedTuple):
    """Something that is measured of a model.

    Attributes:
        name: of what is measured.
        every: optimizer steps between two times; 0: only after the last step, when all evaluators run.
        run: model -> a line of eval.jsonl without the step: "split" (the name of what was measured), "domains" ({group:
            {metric: number}}, may be empty) and "overall" ({metric: number}, or None).
    """

    name: str
    every: int
    run: Callable[[Model], Evaluation]


class EvaluationContext(NamedTuple):
    """What an evaluator may use.

    Attributes:
        config: of the run.
        domains: its data.
        tokenizer: of them.
        mesh: the devices.
    """

    config: ConfigDict
    domains: Sequence[Domain]
    tokenizer: Tokenizer
    mesh: Mesh

    @property
    def rows_a_batch(self) -> int:
        """Rows that the devices take at a time while training."""
        return self.config.data.batch_size // self.config.data.grad_accumulation


MakeEvaluator = Callable[[EvaluationContext], Evaluator]
_EVALUATORS: dict[str, MakeEvaluator] = {}


def register_evaluator(name: str) -> Callable[[MakeEvaluator], MakeEvaluator]:
    """Registers the function that makes an evaluator of a run.

    Raises:
        InputError: another one has the name, or the function takes no single argument.
    """

    def add(make: MakeEvaluator) -> MakeEvaluator:
        if not takes(make, 1):
            raise InputError(f"evaluator {name!r}: what makes it must be a function of an EvaluationContext")
        known = _EVALUATORS.get(name)
        if known is not None and known.__module__ != make.__module__:
            raise InputError(f"evaluator {name!r} of {make.__module__} is already registered by {known.__module__}")
        _EVALUATORS[name] = make
        return make

    return add


def check_evaluators(config: ConfigDict) -> None:
    """Refuses `config.evaluators` and `config.eval_tasks` before anything is read.

    Raises:
        InputError: an unknown name, or tasks that cannot be asked here.
    """
    for name in config.evaluators:
        if name not in _EVALUATORS:
            raise InputError(
                f"unknown evaluator {name!r}; known: {', '.join(sorted(_EVALUATORS))} (config.plugins adds your own)",
                option="evaluators",
            )
    if config.eval_tasks:
        harness.check(_task_settings(config))


def evaluators(context: EvaluationContext) -> tuple[Evaluator, ...]:
    """Those that `config.evaluators` names, and one for each of `config.eval_tasks`.

    `check_evaluators` has found them known.

    Raises:
        InputError: one of them is no evaluator, raises something, or, when it runs, measures what no line can hold; or
            a task whose data cannot be read.
    """
    named = (_checked(f"evaluator {name!r}", _EVALUATORS[name], context) for name in context.config.evaluators)
    return (*named, *(_of_tasks(context) if context.config.eval_tasks else ()))


def _of_tasks(context: EvaluationContext) -> Iterator[Evaluator]:
    tasks = harness.Tasks(_task_settings(context.config), context.tokenizer, context.mesh)

    def run(name: str, model: Model) -> Evaluation:
        return evaluation(name, tasks.results(name, model))

    for name in context.config.eval_tasks:
        yield Evaluator(name, context.config.eval_tasks_every, functools.partial(run, name))


def _task_settings(config: ConfigDict) -> harness.Settings:
    fields = (field.name for field in dataclasses.fields(harness.Settings))
    given = {field: config[f"eval_{field}"] for field in fields if f"eval_{field}" in config}
    return harness.Settings(**given, prefix="eval_")


def _checked(who: str, make: MakeEvaluator, context: EvaluationContext) -> Evaluator:
    with user_code(f"{who}: its factory"):
        made = make(context)
    if not isinstance(made, Evaluator):
        raise InputError(f"{who}: its factory returned a {type(made).__name__}; an Evaluator is expected")
    check_fields(who, made)

    def run(model: Model) -> Evaluation:
        with user_code(f"{who}: run"):
            record = made.run(model)
        if wanted := _wanted(record):
            raise InputError(f"{who}: run returned {shown(record)}; expected {wanted}")
        return record

    return made._replace(run=run)


def _wanted(record: Any) -> str | None:
    """What an evaluation should be where it is not."""
    if not isinstance(record, Mapping) or not {"split", "domains", "overall"} <= record.keys() or "step" in record:
        return 'a mapping with "split", "domains" and "overall", and without "step"'
    if not isinstance(record["split"], str):
        return '"split" to be a string'
    domains, overall = record["domains"], record["overall"]
    if not isinstance(domains, Mapping) or not all(map(_are_metrics, domains.values())):
        return '"domains" to be {group: {metric: number}}'
    return None if overall is None or _are_metrics(overall) else '"overall" to be {metric: number}, or None'


def _are_metrics(metrics: Any) -> bool:
    return isinstance(metrics, Mapping) and all(
        isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
        and np.ndim(value) == 0
        and np.asarray(value).dtype.kind in "biuf"
        for value in metrics.values()
    )


@register_evaluator("held_out")
def held_out(context: EvaluationContext) -> Evaluator:
    """Held-out loss per domain and overall, on at most `config.eval_rows` rows a domain.

    nll [nats a token], perplexity = exp(nll), bits_per_byte (of UTF-8 text), tokens (that count in the loss). Domains
    without held-out rows are left out.
    """
    domains, max_rows = context.domains, context.config.eval_rows

    @jax.jit
    def sums(model: Model, batch: Batch) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
        statistics = domain_statistics(model.token_losses(batch).losses, batch, len(domains))
        return statistics.loss * statistics.tokens, statistics.tokens

    def run(model: Model) -> Evaluation:
        batches = held_out_batches(domains, context.rows_a_batch, max_rows, context.mesh)
        found = jax.device_get([sums(model, batch) for batch in batches])
        nll, tokens = (sum((pair[i] for pair in found), start=np.zeros(len(domains))) for i in range(2))
        return held_out_record(domains, nll, tokens)

    return Evaluator("held_out", context.config.eval_every, run)


def held_out_record(
    domains: Sequence[Domain], nll_sums: Float[np.ndarray, " K"], tokens: Float[np.ndarray, " K"]
) -> Evaluation:
    """What `held_out` found.

    Args:
        domains: of the run.
        nll_sums: summed losses of each [nats].
        tokens: of these; of a domain with 0 nothing is said.
    """
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
