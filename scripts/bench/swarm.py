"""Small models as one program against the same models one after another: models x tokens/s, and on a card launches.

    python scripts/bench/swarm.py [--models=1M,4M] [--counts=1,8,32] [--rounds=5] [--output=docs/benchmarks/swarm.json]
    JAX_PLATFORMS=cpu python scripts/bench/swarm.py --device=h100 [--models=4M,20M]

Steps of the recipe's train step on batches of random tokens, in turns in one process: *one after another*, each
model's step called by itself; *mapped*, one program in which a CPU takes them one after the other (`lax.map`) and an
accelerator side by side (`vmap`); *vmap*, the latter on any device. With --device nothing runs: XLA's GPU compiler
says how often the step of one model and that of all launches something, and the least that they take (roofline),
without launches; the extra `aot`. XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each of two cores its own
models in *mapped*.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import results
from absl import flags
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.data.batch import Batch
from dataflex_jax.errors import InputError
from dataflex_jax.mapped import programs
from dataflex_jax.mapped.states import over_members
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import active_policies
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import optim, run_config
from dataflex_jax.training.state import Fixed, Start, TrainState
from dataflex_jax.training.step import TrainStep
from dataflex_jax.training.weights import resolved_model

SHAPES = {
    "1M": {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 2048},
    "4M": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096},
    "20M": {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 8192},
}
DOMAINS = 7
WAYS = ("one after another", "mapped", "vmap")

_MODELS = flags.DEFINE_list("models", None, "Of 1M, 4M and 20M; by default 1M and 4M, with --device 4M and 20M.")
_COUNTS = flags.DEFINE_list("counts", ["1", "8", "32"], "Models at once.")
_WAYS = flags.DEFINE_list("ways", list(WAYS), "Which ways; the first one comes in any case.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; each one has a block of each way.", lower_bound=1)
_ROWS = flags.DEFINE_integer("batch_rows", 8, "Rows of a model's batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("seq_len", 128, "Tokens a row.", lower_bound=2)
_DEVICE = flags.DEFINE_enum("device", None, ["h100", "h200", "a100"], "A card to compile for; nothing runs.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/swarm.json", "The result.")


class Step(NamedTuple):
    """A model's train step.

    Attributes:
        start: of a state.
        step: (state, batch, Fixed) -> (state, metrics).
        config: of the run.
    """

    start: Start
    step: TrainStep
    config: ConfigDict


def train_step(shape: str, dtype: str) -> Step:
    """The step of a model of `SHAPES`, with ODM."""
    config = base.get_config("mixer=odm")
    fields = SHAPES[shape]
    config.model.update(fields, intermediate_size=3 * fields["hidden_size"], num_attention_heads=4)
    config.model.update(num_key_value_heads=2, tie_word_embeddings=True, dtype=dtype, remat="none")
    config.data.update(batch_size=_ROWS.value, seq_len=_LENGTH.value, tokenizer="bytes")
    model, mixer = resolved_model(config, fields["vocab_size"]), active_policies(config).mixer
    rate = optim.learning_rate(config.optim, config.train_step)
    adamw = optim.adamw(config.optim, rate)
    start = Start(Model.shape(model), None, adamw, mixer.policy.init(jnp.full(DOMAINS, 1 / DOMAINS)))
    return Step(start, TrainStep(start.model, adamw, rate, mixer), config)


def abstract_batch(count: int, mesh: Mesh) -> Batch:
    """Shapes of the batches of `count` models."""

    def of_rows(*shape: int, dtype: str = "int32"):
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=over_members(mesh))

    rows, length = _ROWS.value, _LENGTH.value
    return Batch(
        tokens=of_rows(rows, length + 1),
        mask=of_rows(rows, length, dtype="float32"),
        lengths=of_rows(rows),
        domain=of_rows(rows),
        drawn_with=of_rows(DOMAINS, dtype="float32"),
    )


def abstract_states(made: Step, count: int, mesh: Mesh) -> TrainState:
    """Shapes of the states of `count` models."""
    state = jax.eval_shape(made.start.state, jax.random.key(0), None)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=over_members(mesh)), state
    )


def random_batch(count: int, vocab: int, mesh: Mesh) -> Batch:
    """Batches of `count` models."""
    rng, like = np.random.default_rng(0), abstract_batch(count, mesh)
    values = Batch(
        tokens=rng.integers(0, vocab, like.tokens.shape, dtype=np.int32),
        mask=np.ones(like.mask.shape, np.float32),
        lengths=np.full(like.lengths.shape, _LENGTH.value + 1, np.int32),
        domain=rng.integers(0, DOMAINS, like.domain.shape, dtype=np.int32),
        drawn_with=np.full(like.drawn_with.shape, 1 / DOMAINS, np.float32),
    )
    return jax.device_put(values, over_members(mesh))


def program(made: Step, way: str, mesh: Mesh) -> Callable:
    """The step of all models in a way that is one program."""
    if way == "mapped":
        return jax.jit(programs.mapped(made.step, 2, mesh), donate_argnums=0)
    return jax.jit(jax.vmap(made.step, in_axes=(0, 0, None)), donate_argnums=0)


def blocks(made: Step, count: int, mesh: Mesh) -> dict[str, Callable[[], None]]:
    """A step of all models in each way, on states of its own; they are compiled."""
    fixed, batch = Fixed(None, None), random_batch(count, made.start.model.config.vocab_size, mesh)
    seeds = jax.vmap(jax.random.key)(jnp.arange(count))
    states = jax.jit(jax.vmap(lambda key: made.start.state(key, None)))
    alone = jax.jit(made.step, donate_argnums=0)
    each, batches = ([_member(tree, number) for number in range(count)] for tree in (states(seeds), batch))

    def one_after_another() -> None:
        for number, of_model in enumerate(batches):
            each[number], metrics = alone(each[number], of_model, fixed)
        jax.block_until_ready((each, metrics))

    def together(run: Callable, held: list[PyTree]) -> None:
        held[0], metrics = run(held[0], batch, fixed)
        jax.block_until_ready((held, metrics))

    found = {"one after another": one_after_another}
    for way in WAYS[1:]:
        if way not in _WAYS.value:
            continue
        placed = jax.device_put(states(seeds), over_members(mesh))
        found[way] = functools.partial(together, program(made, way, mesh), [placed])
    for block in found.values():
        block()
    return found


def _member(tree: PyTree, number: int) -> PyTree:
    """One model's part, on the first device."""
    return jax.device_put(jax.tree.map(lambda leaf: leaf[number], tree), jax.devices()[0])


def measured(shape: str, count: int, mesh: Mesh) -> dict[str, Any]:
    """Of each way: models x tokens/s, and CPU seconds of a model's step; and the ratio to one after another."""
    made = train_step(shape, "float32")
    found = blocks(made, count, mesh)
    wall: dict[str, list[float]] = {way: [] for way in found}
    cpu: dict[str, list[float]] = {way: [] for way in found}
    for number in range(_ROUNDS.value):
        for way in list(found)[:: 1 if number % 2 else -1]:
            started, used = time.perf_counter(), time.process_time()
            found[way]()
            wall[way].append(time.perf_counter() - started)
            cpu[way].append((time.process_time() - used) / count)
    tokens, base_way = count * _ROWS.value * _LENGTH.value, WAYS[0]
    return {
        way: {
            "models_times_tokens_per_second": results.spread([tokens / seconds for seconds in wall[way]]),
            "cpu_seconds_a_model_step": results.spread(cpu[way]),
            "over_one_after_another": results.spread(np.divide(wall[base_way], wall[way]).tolist()),
            "cpu_over_one_after_another": results.spread(np.divide(cpu[base_way], cpu[way]).tolist()),
        }
        for way in found
    }


def compiled_for(card_name: str, shape: str, count: int) -> dict[str, Any]:
    """Of the mapped step on a card that is not here: launches, roofline, and bytes."""
    from dataflex_jax.aot import cards, compiler, cost, hlo

    card = cards.CARDS[card_name]
    made = train_step(shape, "bfloat16")
    mesh = make_mesh({"data": -1}, card.devices(1))
    arguments = abstract_states(made, count, mesh), abstract_batch(count, mesh), Fixed(None, None)
    executable = compiler.compiled(program(made, "mapped", mesh), arguments, mesh, card)
    taken = cost.cost(hlo.parse(executable.as_text()), card)
    analysis = executable.memory_analysis()
    tokens = count * _ROWS.value * _LENGTH.value
    return {
        "launches": sum(each.times for each in taken.work),
        "launches_a_model": sum(each.times for each in taken.work) / count,
        "roofline_seconds": taken.roofline_seconds,
        "roofline_tokens_per_second": tokens / taken.roofline_seconds,
        "bytes": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
        "flops": dict(taken.flops),
        "hbm_bytes": taken.hbm_bytes,
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    shapes = _MODELS.value or (["1M", "4M"] if _DEVICE.value is None else ["4M", "20M"])
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise InputError(f"--models: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    if unknown := [way for way in _WAYS.value if way not in WAYS]:
        raise InputError(f"--ways: {unknown[0]!r} is not one of {', '.join(WAYS)}")
    counts = [int(count) for count in _COUNTS.value]
    if _DEVICE.value is not None:
        from dataflex_jax.aot import compiler

        compiler.check()
    found = {}
    for shape in shapes:
        found[shape] = {}
        for count in counts:
            if _DEVICE.value is None:
                sharing = jax.devices()[: math.gcd(count, jax.device_count())]  # as many as the models split over
                found[shape][str(count)] = measured(shape, count, make_mesh({"data": -1}, sharing))
            else:
                found[shape][str(count)] = compiled_for(_DEVICE.value, shape, count)
            print(shape, count, found[shape][str(count)], flush=True)
    made = train_step(shapes[0], "float32")
    result = results.describe(run_config.resolved(made.config)) | {
        "card": _DEVICE.value,
        "rounds": None if _DEVICE.value else _ROUNDS.value,
        "batch_rows": _ROWS.value,
        "seq_len": _LENGTH.value,
        "parameters": {shape: train_step(shape, "float32").start.model.config.num_params() for shape in shapes},
        "models": found,
    }
    results.write(_OUTPUT.value, result)


if __name__ == "__main__":
    cli.run(main)
