"""What each policy adds to a step: seconds a step over those of static, in one process, in alternating blocks.

    python scripts/bench/policies.py [--config=configs/static.py] [--rounds=10] [--output=docs/benchmarks/policies.json]

The recipe says which model and data. All runs train the same parameters in turns, with the project's loop as it is;
a ratio is of a policy's block and the mean of the static blocks right before and after it. Policies decide after every
step, but refreshes (`Weighter.refresh`, `Mixer.refresh`) are kept out of the blocks, and timed one by one in the end.
The reference model of DoReMi and RHO-LOSS is one of the same shape that this script trains for two steps.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import results
from absl import flags
from blocks import Contestant, run_block
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.training import run_config, setup
from dataflex_jax.training.state import TrainState

config_flags.DEFINE_config_file("config", "configs/static.py", "The recipe, with mixer static.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds; each one has a block of each policy.", lower_bound=1)
_BLOCK = flags.DEFINE_integer("block", 8, "Steps a block.", lower_bound=3)
_POLICIES = flags.DEFINE_list("policies", None, "Some of the policies; all by default.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/policies.json", "The result.")

STATIC = "static"
_NEVER = 10**6  # steps between two refreshes


class Policy(NamedTuple):
    """A policy to measure.

    Attributes:
        mixer: its name.
        weighter: its name, or None.
        selector: the name of one that chooses inside the step, or None.
        aim: what a step may cost in multiples of static's; None: no aim.
        fields: of the policy's section.
        refreshes: whether the mixer's updates are refreshes.
    """

    mixer: str = STATIC
    weighter: str | None = None
    selector: str | None = None
    aim: float | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012  nobody changes it
    refreshes: bool = False


POLICIES = {
    "loss": Policy(weighter="loss", aim=1.02),
    "adapt": Policy(weighter="adapt", aim=1.03, fields={"refresh_interval": _NEVER}),
    "joint_update_aware": Policy(weighter="joint_update_aware", aim=1.03, fields={"refresh_interval": _NEVER}),
    "doremi, cached losses": Policy("doremi", aim=1.03, fields={"reference_losses": "cached"}),
    "doremi, model of the same size": Policy("doremi", aim=1.40),
    "ado": Policy("ado", aim=1.02, refreshes=True),
    "loss_softmax": Policy("loss_softmax", aim=1.02),
    "doge": Policy("doge", refreshes=True),
    "greats": Policy(selector="greats"),
    "rho_loss, cached losses": Policy(selector="rho_loss", fields={"reference_losses": "cached"}),
    "rho_loss, model of the same size": Policy(selector="rho_loss"),
}


def recipe(config: ConfigDict, policy: Policy, steps: int, reference: Path | None) -> ConfigDict:
    """The recipe with a policy that decides after every step and never refreshes."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        update_step = _NEVER if policy.refreshes else 1
        config.update(train_step=steps, warmup_step=0, update_step=update_step, update_times=-1)
        config.update(tensorboard=False, wandb_project=None)
        config.data.lag = 1
        config.mixer = registry.policy_config("mixer", policy.mixer)
        section = config.mixer
        for kind, name in (("weighter", policy.weighter), ("selector", policy.selector)):
            if name is not None:
                section = config[kind] = registry.policy_config(kind, name)
        section.update(policy.fields)
        if "reference" in section:
            section.reference = str(reference)
    return config


def refresh_seconds(of: Contestant, state: TrainState) -> float | None:
    """Seconds of one refresh, the median of three after one that compiles; None where the policy has none."""
    state = state._replace(mixer=of.mixer, weighters=of.weighters)
    seconds = []
    # A mixer's refresh comes before the step that is due, a weighter's after it.
    for step in (_NEVER - 1, _NEVER):
        for _ in range(4):
            start = time.perf_counter()
            refreshed, _records = of.job.updates.between(step, state, of.sampler)
            if refreshed is state:
                break
            jax.block_until_ready(refreshed)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) if seconds else None


def measure(config: ConfigDict, chosen: dict[str, Policy], scratch: Path, stack: contextlib.ExitStack) -> dict:
    """The result, but for the machine."""
    rounds, length = _ROUNDS.value, _BLOCK.value
    steps = (rounds + 1) * (2 * len(chosen) + 1) * length + 1
    reference = scratch / "reference"
    setup.train_and_evaluate(recipe(config, Policy(), 2, None), reference)
    contestants = {}
    for number, (name, policy) in enumerate({STATIC: Policy(), **chosen}.items()):
        prepared = setup.prepared(recipe(config, policy, steps, reference), scratch / f"job-{number}")
        job, state, position = stack.enter_context(prepared)
        contestants[name] = Contestant(job, state.mixer, state.weighters, position.sampler)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    blocks = 0

    def block(name: str) -> float:
        nonlocal state, blocks
        blocks += 1
        measured, contestants[name], state = run_block(contestants[name], state, length, scratch / f"block-{blocks}")
        return job.draws.sampler.batch_size * max(job.draws.pool.buckets) / measured.tokens_per_second

    # The first round compiles and is not counted.
    for i in range(rounds + 1):
        before = block(STATIC)
        for name in list(chosen)[:: 1 if i % 2 else -1]:
            ours, after = block(name), block(STATIC)
            if i:
                seconds[name].append(ours)
                seconds[STATIC].append(after)
                ratios[name].append(2 * ours / (before + after))
            before = after
    return {
        "rounds": rounds,
        "block_steps": length,
        "batch_rows": job.draws.sampler.batch_size,
        "seq_len": config.data.seq_len,
        "model": config.model.to_dict(),
        "static_step_seconds": results.spread(seconds[STATIC]),
        "policies": {
            name: {
                "aim": policy.aim,
                "time_over_static": results.spread(ratios[name]),
                "step_seconds": results.spread(seconds[name]),
                "refresh_seconds": refresh_seconds(contestants[name], state),
            }
            for name, policy in chosen.items()
        },
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    config = cli.chosen_config()
    wanted = _POLICIES.value or list(POLICIES)
    if unknown := [name for name in wanted if name not in POLICIES]:
        raise InputError(f"--policies: {unknown[0]!r} is not one of {'; '.join(POLICIES)}")
    chosen = {name: POLICIES[name] for name in wanted}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        result = measure(config, chosen, Path(scratch), stack)
    results.write(_OUTPUT.value, results.describe(run_config.resolved(config)) | result)
    for name, policy in result["policies"].items():
        ratio = policy["time_over_static"]
        aim = f"aim {policy['aim']:.2f}" if policy["aim"] else "no aim"
        print(f"{name}: {ratio['median']:.3f} x static, quartiles {ratio['quartiles']}, {aim}")


if __name__ == "__main__":
    cli.run(main)
