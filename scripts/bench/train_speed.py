"""The train step's tokens/s, FLOP/s and peak memory beside those of a PyTorch trainer, on the same device in turns.

    python scripts/bench/train_speed.py [--rounds=5]                        # on a CPU: a tiny model, float32
    python scripts/bench/train_speed.py --shape=qwen2.5-1.5b --seq_len=2048 --batch=8,16,32 \\
        --remat=none,dots,attention --scan_layers=true,false --tile_tokens=2048,4096 --attention=auto,xla \\
        --peer_batch=8,16 --peer_checkpointing=false,true --peer_attention=cudnn,flash --peer_compile=false,true \\
        --output=docs/benchmarks/train_speed-qwen2.5-1.5b.json

Ours is `dataflex_jax.train`'s step as `setup.prepared` makes it; the peer is the `transformers` model as trainers run
it: float32 weights, bfloat16 autocast (on a CPU float32, on both sides), SDPA attention (cuDNN's or FlashAttention's
where asked for), fused AdamW, clipped gradients and, where asked for, gradient checkpointing and torch.compile (of each
layer and of the loss). Both have the same shape, random weights and random tokens. Each has a process of its own, so
that memory is counted apart; while one measures the other waits. Where several values of an option are given, every
combination runs alone first, and the fastest of each side go on to the rounds; those that run out of memory are written
down. Environment variables such as XLA_FLAGS reach the processes; of several GPUs choose one by CUDA_VISIBLE_DEVICES.
--trace=DIR also writes a profile of a block of ours. --nopeer measures ours alone. --seconds is how long all of it may
take: variants for which half of it leaves no time are named and not tried, and rounds end when one more would take too
long; the result is written after each of them.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import results
from absl import flags
from contestants import Contestant, Failed, Peak, platform
from train_speed_sides import SHAPES, SIDES

# JAX is imported in functions only, because the sides' processes import this module first.

_WARM_UP_STEPS = 2


class Side:
    """One side with its options, in a process of its own until it is closed.

    Raises:
        Failed: it cannot start.
    """

    def __init__(self, name: str, task: dict[str, Any]):
        self.options, self._tokens = task["options"], task["options"]["batch"] * task["seq_len"]
        self._process = Contestant(SIDES[name], task)
        self.about, self.close = self._process.about, self._process.stop

    @property
    def peak(self) -> Peak:
        """Its process's peak memory after the latest block."""
        return self._process.peak

    def rate(self, steps: int, trace: str | None = None) -> float:
        """Tokens/s over a block of steps.

        Raises:
            Failed: it ran out of memory, say.
        """
        return steps * self._tokens / self._process.seconds(steps, trace)


class Clock:
    """What is left of a number of seconds; of None there is always enough."""

    def __init__(self, seconds: float | None):
        self._ends = math.inf if seconds is None else time.monotonic() + seconds
        self._seconds = seconds or 0.0

    def has(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self._ends

    def first_half(self) -> bool:
        """So that the rest is for what is measured in the end."""
        return self.has(self._seconds / 2)


def fastest(
    side: str, task: dict[str, Any], variants: list[dict[str, Any]], clock: Clock
) -> tuple[dict[str, Any], list[dict]]:
    """The options with the most tokens/s, and what each variant did; a single one is not tried.

    Raises:
        Failed: none of them runs.
    """
    if len(variants) == 1:
        return variants[0], []
    tried: list[dict[str, Any]] = []
    for options in variants:
        entry = {"side": side, **options}
        one_runs = any("error" not in other for other in tried)
        try:
            if one_runs and not clock.first_half():
                raise Failed("not tried: no time was left")
            alone = Side(side, task | {"options": options})
            with contextlib.closing(alone):
                alone.rate(_WARM_UP_STEPS)
                entry |= {"tokens_per_second": alone.rate(flags.FLAGS.sweep_steps), "peak_memory": alone.peak[0]}
        except Failed as failure:
            entry["error"] = str(failure)
        print(json.dumps(entry), flush=True)
        tried.append(entry)
    running = [i for i, entry in enumerate(tried) if "error" not in entry]
    if not running:
        raise Failed(f"{side}: none of {len(variants)} variants runs; the first: {tried[0]['error']}")
    return variants[max(running, key=lambda i: tried[i]["tokens_per_second"])], tried


def measure(
    task: dict[str, Any], variants: dict[str, list[dict[str, Any]]], clock: Clock, keep: Callable[[dict], None]
) -> None:
    """Has the result so far, but for the shape's name, kept after each round.

    Raises:
        Failed: a side cannot run.
    """
    chosen, tried = {}, []
    for side, of_side in variants.items():
        chosen[side], entries = fastest(side, task, of_side, clock)
        tried += entries
    rates: dict[str, list[float]] = {side: [] for side in chosen}
    with contextlib.ExitStack() as stack:

        def started(side: str) -> Side:
            of_side = stack.enter_context(contextlib.closing(Side(side, task | {"options": chosen[side]})))
            of_side.rate(_WARM_UP_STEPS)
            return of_side

        sides = {side: started(side) for side in ([] if flags.FLAGS.restart else chosen)}
        longest = 0.0
        for i in range(flags.FLAGS.rounds):
            if i and not clock.has(longest):
                print(f"no time is left after {i} of {flags.FLAGS.rounds} rounds")
                break
            started_at = time.monotonic()
            for side in list(chosen)[:: -1 if i % 2 else 1]:
                if flags.FLAGS.restart:
                    sides[side] = started(side)
                rates[side].append(sides[side].rate(flags.FLAGS.block))
                if flags.FLAGS.restart:
                    sides[side].close()
            longest = max(longest, time.monotonic() - started_at)
            keep(summary(task, sides, rates, tried))
        if flags.FLAGS.trace:
            (started("ours") if flags.FLAGS.restart else sides["ours"]).rate(3, flags.FLAGS.trace)


def summary(
    task: dict[str, Any], sides: dict[str, Side], rates: dict[str, list[float]], tried: list[dict]
) -> dict[str, Any]:
    """Of the rounds so far."""
    from dataflex_jax.models.hf.config import from_hf

    about = sides["ours"].about
    flops = from_hf(task["config"]).flops_per_token(task["seq_len"])
    figures = {}
    for side, of_side in sides.items():
        median = float(np.median(rates[side]))
        memory, of_what = of_side.peak
        figures[side] = {
            "options": of_side.options,
            "tokens_per_second": results.spread(rates[side]),
            "teraflops": median * flops / 1e12,
            "mfu": median * flops / about["peak_flops"] if about["peak_flops"] else None,
            "peak_memory": {"bytes": memory, "of": of_what},
        }
    alone = "peer" not in sides
    return {
        **results.describe(about["resolved"]),
        "peer_versions": None if alone else sides["peer"].about,
        "xla_flags": about["xla_flags"],
        "model": task["config"],
        "dtype": task["dtype"],
        "seq_len": task["seq_len"],
        "flops_per_token": flops,
        "rounds": len(rates["ours"]),
        "block_steps": flags.FLAGS.block,
        "peer": None,
        **figures,
        "ours_over_peer": None if alone else results.spread(np.divide(rates["ours"], rates["peer"])),
        "sweep": tried,
    }


def _options(**lists: tuple[str, list[str]]) -> list[dict[str, Any]]:
    """All combinations of the values of some flags; those of numbers and truth values as such."""
    from dataflex_jax.errors import InputError

    def parsed(flag: str, value: str, kind: str) -> Any:
        if kind == "integer" and value.isdecimal() and int(value) > 0:
            return int(value)
        if kind == "truth" and value in ("true", "false"):
            return value == "true"
        if kind == "name":
            return value
        accepted = {"integer": "integers >= 1", "truth": "true and false"}[kind]
        raise InputError(f"--{flag}: {value!r} is not accepted; a list of {accepted} is")

    parts = []
    for name, (flag, kind) in lists.items():
        parts.append([(name, parsed(flag, value, kind)) for value in getattr(flags.FLAGS, flag)])
    return [dict(combination) for combination in itertools.product(*parts)]


def main(argv: list[str]) -> None:
    from dataflex_jax import cli
    from dataflex_jax.errors import InputError, TrainingError

    cli.no_positional(argv)
    clock = Clock(flags.FLAGS.seconds)
    on_cpu = platform() == "cpu"
    shape = flags.FLAGS.shape or ("tiny" if on_cpu else "qwen2.5-1.5b")
    task = {
        "config": SHAPES[shape],
        "seq_len": flags.FLAGS.seq_len or (256 if on_cpu else 2048),
        "dtype": "float32" if on_cpu else "bfloat16",
    }
    flags.FLAGS.peer_batch = flags.FLAGS.peer_batch or flags.FLAGS.batch
    variants = {
        "ours": _options(
            batch=("batch", "integer"),
            remat=("remat", "name"),
            scan_layers=("scan_layers", "truth"),
            tile_tokens=("tile_tokens", "integer"),
            attention=("attention", "name"),
        )
    }
    if flags.FLAGS.peer:
        variants["peer"] = _options(
            batch=("peer_batch", "integer"),
            checkpointing=("peer_checkpointing", "truth"),
            compile=("peer_compile", "truth"),
            attention=("peer_attention", "name"),
        )
        if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
            raise InputError(f'the peer needs {missing[0]}: pip install -e ".[torch]", or --nopeer')
    result: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        result.update(found)
        results.write(flags.FLAGS.output, {"shape": shape, **found})

    try:
        measure(task, variants, clock, keep)
    except Failed as failure:
        raise TrainingError(str(failure)) from failure
    for side in variants:
        found = result[side]
        share = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
        print(
            f"{side}: {found['tokens_per_second']['median']:,.0f} tokens/s, {found['teraflops']:.3f} TFLOP/s{share}, "
            f"peak {(found['peak_memory']['bytes'] or math.nan) / 2**30:.2f} GiB ({found['peak_memory']['of']}), "
            f"{found['options']}"
        )
    if ratio := result["ours_over_peer"]:
        print(f"ours / peer: {ratio['median']:.3f}, quartiles {ratio['quartiles']}")


if __name__ == "__main__":
    from dataflex_jax import cli

    flags.DEFINE_enum("shape", None, list(SHAPES), "The model's; default: tiny on a CPU, else qwen2.5-1.5b.")
    flags.DEFINE_integer("seq_len", None, "Tokens a row; default: 256 on a CPU, else 2048.", lower_bound=2)
    flags.DEFINE_list("batch", ["8"], "Rows a step of ours; several values are tried.")
    flags.DEFINE_list("remat", ["none"], "What the backward pass recomputes: none, dots, attention, full.")
    flags.DEFINE_list("scan_layers", ["true"], "Layers in a loop; false: written out one after the other.")
    flags.DEFINE_list("tile_tokens", ["2048"], "Tokens whose logits the cross-entropy holds at once.")
    flags.DEFINE_list("attention", ["auto"], "auto (cuDNN where it can be), cudnn, xla.")
    flags.DEFINE_bool("peer", True, "Whether there is one.")
    flags.DEFINE_list("peer_batch", None, "Rows a step of the peer's; default: as --batch.")
    flags.DEFINE_list("peer_checkpointing", ["false"], "Whether the peer recomputes activations: false, true.")
    flags.DEFINE_list("peer_attention", ["auto"], "The peer's SDPA kernel: auto (PyTorch's choice), cudnn, flash.")
    flags.DEFINE_list("peer_compile", ["false"], "Whether the peer's model goes through torch.compile: false, true.")
    flags.DEFINE_integer("rounds", 7, "Rounds; each has a block of each side.", lower_bound=1)
    flags.DEFINE_integer("block", 5, "Steps a block.", lower_bound=1)
    flags.DEFINE_integer("sweep_steps", 5, "Steps of a variant, where several are tried.", lower_bound=1)
    flags.DEFINE_float("seconds", None, "How long all of it may take; None: as long as it does.", lower_bound=0)
    flags.DEFINE_bool("restart", False, "A new process for every block: where both sides do not fit in memory at once.")
    cli.define_path("trace", None, "A folder for a profile of three steps of ours.")
    cli.define_path("output", f"{results.FOLDER}/train_speed.json", "The result.")
    cli.run(main)
