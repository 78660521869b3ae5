"""What per-example gradients cost against training: one pass over one forward and backward pass of the same batch.

    python scripts/bench/per_example_gradients.py [--rounds=10] [--seq_len=512] [--batch=8] [--output=...json]
    python scripts/bench/per_example_gradients.py --small --output=FILE

Training is value_and_grad of the mean loss with respect to all parameters, without the optimizer. Every round runs
training and each kind of features once, in turn forwards and backwards; a ratio is of two runs of the same round.
"exact G" is G + 1 numbers a row, its products with G directions and its norm, of the blocks' kernels or of all
parameters. Peak memory is what XLA's buffer assignment needs beside the arguments (temporaries and outputs); its
allowance is that of training, one layer's per-example gradients and B x dim. The cost of an example is measured over
batch sizes, and that of a sweep over the number of examples with a small model.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from absl import flags

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.data.batch import Batch
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.directions import beside, no_directions
from dataflex_jax.signals.gradients import gradient_features
from dataflex_jax.signals.moments import adam_moments
from dataflex_jax.signals.rows import select_of, selected_paths
from dataflex_jax.training import run_config

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds that are counted.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 8, "Rows.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens a row.", lower_bound=1)
_DIM = flags.DEFINE_integer("dim", 8192, "Numbers an example has after the projection.", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the compute.")
_SMALL = flags.DEFINE_bool("small", False, "A tiny model, a few rows and rounds: shows that the script works.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/per_example_gradients.json", "The JSON file.")

# Proportions of Qwen2-0.5B, with a quarter of the parameters in the head.
MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    dtype="float32",
)
TINY = dataclasses.replace(
    MODEL,
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
KINDS = (("sketch", True), ("sketch", False), ("kronecker", False))
EXACT = ((1, "blocks"), (8, "blocks"), (57, "blocks"), (1, "all"), (8, "all"))  # directions, parameters


class Subject:
    """A model with random weights and Adam's state after a step."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.model = jax.jit(Model.random, static_argnums=0)(cfg, jax.random.key(0))
        optimizer = optax.adam(1e-3)
        gradients = self.training()(self.model.params, self.batch(1, 16))[1]
        _, state = jax.jit(optimizer.update)(gradients, optimizer.init(self.model.params))
        self.moments = adam_moments(state, b1=0.9, b2=0.999, eps=1e-8)

    def batch(self, rows: int, length: int) -> Batch:
        tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, self.cfg.vocab_size)
        lengths, domain = jnp.full(rows, length, jnp.int32), jnp.zeros(rows, jnp.int32)
        return Batch(tokens, jnp.ones((rows, length)), lengths, domain)

    def training(self) -> Callable:
        def loss(params, batch):
            losses = self.model.having(params).token_losses(batch).losses
            return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)

        return jax.jit(jax.value_and_grad(loss))

    def compiled(self, batch: Batch, method: str, adam: bool, dim: int) -> tuple[Any, tuple]:
        """(the compiled pass, its arguments)"""
        arguments = self.model, batch, self.moments if adam else None
        return jax.jit(gradient_features(Projection(method, dim))).lower(*arguments).compile(), arguments

    def exact(self, batch: Batch, count: int, parameters: str) -> tuple[Any, tuple]:
        """(the compiled pass beside directions, with Adam, its arguments)"""
        params = self.model.params
        paths = selected_paths(params, select_of(parameters))
        mesh = make_mesh({}, jax.devices()[:1])
        directions = no_directions(mesh, params, paths, count)

        def influences(model, batch, directions, moments):
            return beside(model, batch, paths, directions, moments).influences

        arguments = self.model, batch, directions, self.moments
        return jax.jit(influences).lower(*arguments).compile(), arguments


def name_of(method: str, adam: bool) -> str:
    return f"{method} {'adam' if adam else 'sgd'}"


def seconds(function: Callable, arguments: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def in_turn(functions: Mapping[str, tuple[Callable, tuple]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each; the first round warms up and is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            taken[name] += [seconds(*functions[name])]
    return {name: np.array(values[1:]) for name, values in taken.items()}


def peak_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def against_training(subject: Subject, rows: int, length: int, dim: int, rounds: int, dense_dim: int) -> dict[str, Any]:
    """Times, FLOPs-free ratios and memory of every kind; the dense map at a dimension of its own, as it is slow."""
    batch = subject.batch(rows, length)
    arguments = subject.model.params, batch
    functions = {"training": (subject.training().lower(*arguments).compile(), arguments)}
    for method, adam in KINDS:
        functions[name_of(method, adam)] = subject.compiled(batch, method, adam, dim)
    for count, parameters in EXACT:
        functions[f"exact {count} adam {parameters}"] = subject.exact(batch, count, parameters)
    functions["rademacher adam"] = subject.compiled(batch, "rademacher", True, dense_dim)
    taken = in_turn(functions, rounds)
    layer = 4 * rows * sum(i * o for i, o in subject.cfg.linear_widths().values())
    training = peak_bytes(functions["training"][0])
    return {
        "seconds": {name: results.spread(values) for name, values in taken.items()},
        "over_training": {
            name: results.spread(values / taken["training"]) for name, values in taken.items() if name != "training"
        },
        "peak_bytes": {name: peak_bytes(function) for name, (function, _) in functions.items()},
        "allowance_bytes": training + layer + 4 * rows * dim,
        "one_layers_gradients_bytes": layer,
    }


def over_batch_sizes(subject: Subject, sizes: tuple[int, ...], length: int, dim: int, rounds: int) -> dict[str, Any]:
    """Seconds an example of the sketch with Adam at several batch sizes, in turn."""
    passes = {str(rows): subject.compiled(subject.batch(rows, length), "sketch", True, dim) for rows in sizes}
    return {rows: results.spread(values / int(rows)) for rows, values in in_turn(passes, rounds).items()}


def over_examples(subject: Subject, numbers: tuple[int, ...], rows: int, length: int, dim: int) -> dict[str, float]:
    """Seconds an example of sweeps in batches of `rows`."""
    function, arguments = subject.compiled(subject.batch(rows, length), "sketch", True, dim)
    seconds(function, arguments)
    sweep = {}
    for number in numbers:
        start = time.perf_counter()
        for _ in range(-(-number // rows)):
            jax.block_until_ready(function(*arguments))
        sweep[str(number)] = (time.perf_counter() - start) / number
    return sweep


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    small = _SMALL.value
    cfg = dataclasses.replace(TINY if small else MODEL, dtype=_DTYPE.value)
    rows, length, dim = (4, 16, 64) if small else (_BATCH.value, _SEQ_LEN.value, _DIM.value)
    rounds, dense_dim = (2, 16) if small else (_ROUNDS.value, 64)
    subject = Subject(cfg)
    tiny = Subject(dataclasses.replace(TINY, dtype=_DTYPE.value))
    result = results.describe(run_config.resolved(base.get_config())) | {
        "model": dataclasses.asdict(cfg),
        "parameters": cfg.num_params(),
        "batch_rows": rows,
        "seq_len": length,
        "dim": dim,
        "rademacher_dim": dense_dim,
        "rounds": rounds,
        **against_training(subject, rows, length, dim, rounds, dense_dim),
        "seconds_an_example_by_batch": over_batch_sizes(
            subject, (1, 2) if small else (1, 2, 4, 8, 16), length, dim, max(1, rounds // 3)
        ),
        "seconds_an_example_by_number": over_examples(
            tiny, (8, 16) if small else (100, 1000, 10_000), 8 if small else 50, 64, 64
        ),
    }
    results.write(_OUTPUT.value, result)
    for name, ratio in result["over_training"].items():
        peak = result["peak_bytes"][name] / result["allowance_bytes"]
        print(f"{name} / training: {ratio['median']:.3f}, quartiles {ratio['quartiles']}; peak / allowance {peak:.2f}")


if __name__ == "__main__":
    cli.run(main)
