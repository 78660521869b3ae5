"""What a policy costs: tokens/s of a recipe's mixer against a static one, in one process, in alternating blocks.

    python scripts/bench/step.py --config=configs/odm.py [--rounds=10] [--output=docs/benchmarks/step.json]
    python scripts/bench/step.py --config=configs/odm.py:slimpajama-6b --output=docs/benchmarks/step-gpu.json

The recipe runs with update_step=1, warmup_step=0 and lag=1: a decision after every step. Each round has a block of the
baseline mixer, a block of the recipe's and a block of bare steps on one batch that stays on the device, in turn
forwards and backwards, so that drift cancels; all three train the same parameters. The first two are the project's loop
as it is, with its loader, its files and its progress bar; what is reported is the rate that it reports. Ratios are of
blocks of the same round. Also: the loader alone, and how much of a step the host's main thread works.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from absl import flags
from blocks import Block, Clocked, Contestant, run_block
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.reporting.progress import Throughput
from dataflex_jax.training import run_config, setup
from dataflex_jax.training.state import TrainState

config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/odm.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds; each one has a block of each kind.", lower_bound=1)
_BLOCK = flags.DEFINE_integer("block", 22, "Steps a block; the rate is that of the last 20 or fewer.", lower_bound=3)
_BASELINE = flags.DEFINE_string("baseline", "static", "The mixer to compare with.")
_LOADER_STEPS = flags.DEFINE_integer("loader_steps", 200, "Batches in each measurement of the loader.", lower_bound=1)
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/step.json", "The result.")

BARE = "one batch on the device"


def recipe(config: ConfigDict, steps: int, mixer: str | None) -> ConfigDict:
    """The recipe with a decision after every step, and with another mixer where one is named."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(train_step=steps, warmup_step=0, update_step=1, update_times=-1, wandb_project=None)
        config.data.lag = 1
        if mixer is not None:
            config.mixer = registry.policy_config("mixer", mixer)
    return config


def bare_block(of: Contestant, state: TrainState, steps: int, batch: PyTree) -> tuple[Block, Contestant, TrainState]:
    """`steps` steps on one batch, the host doing nothing but dispatching and waiting for the step before."""
    throughput, step = Throughput(), Clocked(of.job.step)
    state, before = step(state._replace(mixer=of.mixer), batch)
    for _ in range(steps - 1):
        state, metrics = step(state, batch)
        throughput.update(int(before["tokens"]))
        before = metrics
    throughput.update(int(before["tokens"]))
    block = Block(throughput.tokens_per_second, *step.seconds_a_step().tolist())
    return block, of._replace(mixer=state.mixer), state


def loader_rate(of: Contestant, steps: int) -> float:
    """Rows/s of planning and loading alone, until the batch is on the devices."""
    draws, planned = of.job.draws, of.sampler
    start = time.perf_counter()
    for _ in range(steps):
        plan, planned = draws.sampler.plan(planned)
        jax.block_until_ready(of.job.load(plan, draws.sequences.ids(plan), plan.drawn_with))
    return steps * draws.sampler.batch_size / (time.perf_counter() - start)


def measure(config: ConfigDict, scratch: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The result, but for the machine.

    Raises:
        InputError: the recipe has no mixer, or the baseline's.
    """
    if config.mixer is None or config.mixer.name == _BASELINE.value:
        raise InputError(f"--config: needs a recipe with another mixer than --baseline={_BASELINE.value}")
    ours = config.mixer.name
    steps = 3 * (_ROUNDS.value + 1) * _BLOCK.value
    contestants = {}
    for name, mixer in ((_BASELINE.value, _BASELINE.value), (ours, None)):
        prepared = setup.prepared(recipe(config, steps, mixer), scratch / f"job-{name}")
        job, state, position = stack.enter_context(prepared)
        contestants[name] = Contestant(job, state.mixer, state.weighters, position.sampler)
    # A copy: the step's state is donated.
    contestants[BARE] = contestants[ours]._replace(mixer=jax.tree.map(jnp.copy, contestants[ours].mixer))
    plan, _ = job.draws.sampler.plan(position.sampler)
    batch = job.load(plan, job.draws.sequences.ids(plan), plan.drawn_with)

    blocks: dict[str, list[Block]] = {name: [] for name in contestants}
    # The first round compiles and is not counted.
    for i in range(_ROUNDS.value + 1):
        length = _BLOCK.value if i else 3
        for name in list(contestants)[:: 1 if i % 2 else -1]:
            if name == BARE:
                block, contestants[name], state = bare_block(contestants[name], state, length, batch)
            else:
                folder = scratch / f"{name}-{i}"
                block, contestants[name], state = run_block(contestants[name], state, length, folder)
            blocks[name] += [block] if i else []
    rates = {name: np.array([block.tokens_per_second for block in of_kind]) for name, of_kind in blocks.items()}
    loader = [loader_rate(contestants[ours], _LOADER_STEPS.value) for _ in range(5)]
    wall, busy = np.median([[b.step_seconds, b.main_thread_seconds] for b in blocks[ours]], axis=0).tolist()
    return {
        "mixer": ours,
        "baseline": _BASELINE.value,
        "rounds": _ROUNDS.value,
        "block_steps": _BLOCK.value,
        "batch_rows": job.draws.sampler.batch_size,
        "seq_len": config.data.seq_len,
        "model": config.model.to_dict(),
        "tokens_per_second": {name: results.spread(of_kind) for name, of_kind in rates.items()},
        "mixer_over_baseline": results.spread(rates[ours] / rates[_BASELINE.value]),
        # 1 - this is the share of its time that the device waits for the host, or, on a CPU, shares its cores with it.
        "mixer_over_bare": results.spread(rates[ours] / rates[BARE]),
        "loader_rows_per_second": results.spread(loader),
        "loader_over_step": float(np.median(loader)) * wall / job.draws.sampler.batch_size,
        "host": {"step_seconds": wall, "main_thread_busy_seconds": busy, "main_thread_idle_share": 1 - busy / wall},
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    config = cli.chosen_config()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        result = measure(config, Path(scratch), stack)
    results.write(_OUTPUT.value, results.describe(run_config.resolved(config)) | result)
    ratio, bare = result["mixer_over_baseline"], result["mixer_over_bare"]
    print(f"{result['mixer']} / {result['baseline']}: {ratio['median']:.4f}, quartiles {ratio['quartiles']}")
    print(f"{result['mixer']} / {BARE}: {bare['median']:.4f}, quartiles {bare['quartiles']}")
    print(f"loader / step: {result['loader_over_step']:.0f}")
    print(f"main thread idle: {result['host']['main_thread_idle_share']:.1%}")


if __name__ == "__main__":
    cli.run(main)
