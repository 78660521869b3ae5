"""What a checkpoint remembers of its run, and how a run goes on from it with what the user may have changed.

Allowed: other proportions, more steps, further domains, other hyperparameters. Refused by name: whatever would make the
parameters or the cursors mean something else.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dataflex_jax.data import sampler
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.hf.resolve import describe, described_config
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import Mixer
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.training.changes import Changed, other_state
from dataflex_jax.training.checkpoint import Checkpoints, shapes_by_path
from dataflex_jax.training.ledger import Position
from dataflex_jax.training.state import Start, TrainState

logger = logging.getLogger(__name__)


POOL = ("pool",)  # the one group of rows, where a selector or an order has the whole pool
_TRAINABLE = "model.trainable"
_TOKENIZER = "data.tokenizer"


class Identity(NamedTuple):
    """What a checkpoint must agree with.

    Attributes:
        fields: configuration fields (dotted, without "config.") and their values.
        stores: the content key of each domain's rows store, in the order of the domains; none of imported weights,
            which any run may go on from.
        initial_weights: what the mixer draws with before its first update, by domain.
        base: "name" and "weights" (a fingerprint) of the frozen parameters; None where all are trained.
        by_domain: whether the sampler draws domain by domain; otherwise from the pool as a whole.
    """

    fields: dict[str, Any]
    stores: dict[str, str]
    initial_weights: dict[str, float]
    base: dict[str, str] | None = None
    by_domain: bool = True

    def groups(self) -> tuple[str, ...]:
        """Names of what the sampler draws from."""
        return tuple(self.stores) if self.by_domain else POOL


def identify(
    config: ConfigDict,
    model: ModelConfig,
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    policies: ActivePolicies,
    initial_weights: Float[Array, " K"],
    base: dict[str, str] | None = None,
) -> Identity:
    """The identity of the run as it is configured now.

    Args:
        config: of the run.
        model: its model.
        tokenizer: of its data.
        domains: its data.
        policies: of the run.
        initial_weights: what the mixer draws with before its first update.
        base: identity of the frozen parameters, if there are any.
    """
    names = [domain.name for domain in domains]
    return Identity(
        fields={
            **model_fields(model, config.model.trainable, tokenizer),
            "data.seq_len": config.data.seq_len,
            "seed": config.seed,
            **policies.names(),
        },
        stores={domain.name: domain.key for domain in domains},
        initial_weights=dict(zip(names, np.asarray(initial_weights, np.float64).tolist(), strict=True)),
        base=base,
        by_domain=policies.by_domain,
    )


def model_fields(model: ModelConfig, trainable: Sequence[str] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of an identity that say what the parameters are."""
    return {
        **{f"model.{name}": value for name, value in describe(model).items()},
        **({} if trainable is None else {_TRAINABLE: list(trainable)}),
        **_lora_fields(model.lora),
        _TOKENIZER: tokenizer.fingerprint,
    }


def _lora_fields(lora: LoraConfig | None) -> dict[str, Any]:
    if lora is None:
        return {}
    fields = {f"lora.{name}": value for name, value in dataclasses.asdict(lora).items() if name != "dropout"}
    return fields | {"lora.target_modules": list(lora.target_modules)}  # as JSON gives it back


def saved_model(saved: dict[str, Any], model: ConfigDict) -> ModelConfig:
    """The model of a checkpoint, from its JSON part; `model` (`config.model`) says how to run it."""

    def section(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): v for name, v in saved["fields"].items() if name.startswith(prefix)}

    lora, shape = section("lora."), section("model.")
    shape.pop("trainable", None)
    return dataclasses.replace(described_config(shape, model), lora=LoraConfig(**lora) if lora else None)


def saved_trainable(saved: dict[str, Any]) -> tuple[str, ...] | None:
    """The patterns of the parameters that a checkpoint's run trains, from its JSON part; None: all, or adapters."""
    patterns = saved["fields"].get(_TRAINABLE)
    return None if patterns is None else tuple(patterns)


def beginning(identity: Identity) -> Position:
    """The position before the first step."""
    weights = np.array(list(identity.initial_weights.values())) if identity.by_domain else np.ones(1)
    cursors, rows_seen = np.zeros(len(weights), np.int64), np.zeros(len(identity.stores), np.int64)
    return Position(SamplerState(0, cursors, weights / weights.sum()), 0, rows_seen)


def to_json(identity: Identity, position: Position) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        **identity._asdict(),
        "sampler": sampler.to_json(position.sampler, identity.groups()),
        "tokens_seen": position.tokens_seen,
        "rows_seen": dict(zip(identity.stores, position.rows_seen.tolist(), strict=True)),
    }


def check(saved: dict[str, Any], identity: Identity) -> None:
    """Refuses to go on from a checkpoint that belongs to another model, tokenizer or data.

    Raises:
        InputError: names the first mismatch.
    """
    for name in saved["fields"] if is_imported(saved) else saved["fields"] | identity.fields:
        before, now = saved["fields"].get(name), identity.fields.get(name)
        if before != now:
            if name == _TOKENIZER:
                reason = "its tokens are not those that the checkpoint was trained with; use a new --workdir"
                raise InputError(reason, option=name)
            reason = f"the checkpoint was trained with {before!r}; use a new --workdir"
            raise InputError(reason, option=name, value=now)
    for name, key in saved["stores"].items():
        if identity.stores.get(name, key) != key:
            raise InputError(
                f"domain {name!r}: its text, tokenizer, data.begin_of_text or held-out split is not what the "
                "checkpoint was trained on; use a new --workdir"
            )


def is_imported(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint holds weights alone, brought in from elsewhere, by its JSON part."""
    return not saved["stores"]


def check_base(saved: dict[str, Any], base: dict[str, str] | None) -> None:
    """Refuses adapters that were trained on other frozen parameters.

    Raises:
        InputError: names both.
    """
    before = saved.get("base")
    if before is not None and base is not None and before["weights"] != base["weights"]:
        raise InputError(
            f"the checkpoint's adapters belong to another base, {before['name']} ({before['weights']}), not to "
            f"{base['name']} ({base['weights']}); use that one, or a new --workdir",
            option="model.name_or_path",
        )


def restore(
    checkpoints: Checkpoints,
    step: int,
    identity: Identity,
    mixer: Scheduled[Mixer],
    start: Start,
    abstract: TrainState,
    changed: Changed,
) -> tuple[TrainState, Position]:
    """The state and position to go on from.

    Args:
        checkpoints: of the run.
        step: which one.
        identity: of the run as it is configured now.
        mixer: the mixer as configured now.
        start: what the run would start from.
        abstract: shapes, dtypes and shardings of its state.
        changed: what the user has changed since the last start.

    Raises:
        InputError: the checkpoint belongs to another model, tokenizer or data, or its state has other shapes.
    """
    saved = checkpoints.read_run(step)
    check(saved, identity)
    check_base(saved, identity.base)
    if is_imported(saved):
        params = checkpoints.read_parts(step, params=abstract.params)["params"]
        return start.placed(jax.random.key(identity.fields["seed"]), abstract, params), beginning(identity)
    names, saved_names = tuple(identity.stores), tuple(saved["stores"])
    if saved_names != names and any(identity.fields.get(f"{kind}.name") for kind in ("selector", "order")):
        raise InputError(
            f"the checkpoint's are {saved_names}; with a selector or an order they must stay, or use a new --workdir",
            option="data.domains",
            value=names,
        )
    rows_seen = np.array([saved["rows_seen"].get(name, 0) for name in names], np.int64)
    position = Position(sampler.from_json(saved["sampler"], identity.groups()), saved["tokens_seen"], rows_seen)
    saved_mixer = jax.tree.map(lambda leaf: _with_domains(leaf, len(names), len(saved_names)), abstract.mixer)
    state = _read(checkpoints, step, abstract._replace(mixer=saved_mixer), changed)
    if saved["initial_weights"] == identity.initial_weights and saved_names == names:
        return state, position

    logger.info("Proportions before: %s; now: %s.", saved["initial_weights"], identity.initial_weights)
    source = np.array([saved_names.index(name) if name in saved_names else -1 for name in names])
    policy, fresh = mixer.policy, start.mixer
    aligned = jax.tree.map(lambda old, new: _aligned(old, new, source), state.mixer, fresh)
    adapted = policy.on_resume(aligned, fresh) if policy.on_resume is not None else fresh
    state = state._replace(mixer=jax.tree.map(_placed, adapted, abstract.mixer))
    if not identity.by_domain:
        return state, position
    in_effect = adapted if step >= mixer.schedule.warmup_step else fresh
    weights = np.asarray(policy.sampling_weights(in_effect), np.float64)
    weights = weights / weights.sum()
    position = position._replace(sampler=position.sampler._replace(weights=weights, pending=()))
    for name, weight in zip(names, weights, strict=True):
        if name not in saved_names:
            share = f"{weight:.4g} of the rows" if weight else "not drawn (weight 0)"
            logger.info("Domain %r is new: %s from step %d on.", name, share, step + 1)
    return state, position


def _read(checkpoints: Checkpoints, step: int, abstract: TrainState, changed: Changed) -> TrainState:
    try:
        return checkpoints.read_state(step, abstract)
    except InputError as error:
        raise other_state(checkpoints.read_shapes(step), shapes_by_path(abstract), changed) or error from error


def _with_domains(leaf: jax.ShapeDtypeStruct, num_domains: int, saved_domains: int) -> jax.ShapeDtypeStruct:
    """The leaf as it was with `saved_domains` domains: a leading axis of size K is the domains'."""
    if leaf.ndim == 0 or leaf.shape[0] != num_domains:
        return leaf
    return jax.ShapeDtypeStruct((saved_domains, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)


def _aligned(old: jax.Array, new: jax.Array, source: np.ndarray) -> jax.Array:
    """`old` by the new domains: entry i is old[source[i]], or new[i] where source[i] is -1."""
    if new.ndim == 0 or new.shape[0] != len(source):
        return old
    known = (source >= 0).reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(known, jnp.asarray(old)[source], new)


def _placed(value: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(value, like.sharding)
