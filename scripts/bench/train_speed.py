"""The train step's tokens/s, FLOP/s and peak memory beside those of a PyTorch trainer, on the same device in turns.

    python scripts/bench/train_speed.py [--rounds=5]                        # on a CPU: a tiny model, float32
    python scripts/bench/train_speed.py --shape=qwen2.5-1.5b --seq_len=2048 --batch=8,16,32 \\
        --remat=none,dots,attention --tile_tokens=2048,4096 --attention=auto,xla \\
        --peer_batch=8,16 --peer_checkpointing=false,true --peer_attention=cudnn,flash --peer_compile=false,true \\
        --output=docs/benchmarks/train_speed-qwen2.5-1.5b.json

Ours is `dataflex_jax.train`'s step as `setup.prepared` makes it; the peer is the `transformers` model as trainers run
it: float32 weights, bfloat16 autocast (on a CPU float32, on both sides), SDPA attention (cuDNN's or FlashAttention's
where asked for), fused AdamW, clipped gradients and, where asked for, gradient checkpointing and torch.compile. Both
have the same shape, random weights and random tokens. Each has a process of its own, so that memory is counted apart;
while one measures the other waits. Where several values of an option are given, every combination runs alone first, and
the fastest of each side go on to the rounds; those that run out of memory are written down. Environment variables such
as XLA_FLAGS reach the processes; of several GPUs choose one by CUDA_VISIBLE_DEVICES. --trace=DIR also writes a profile
of a block of ours.
"""

import contextlib
import itertools
import json
import math
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


def fastest(side: str, task: dict[str, Any], variants: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict]]:
    """The options with the most tokens/s, and what each variant did; a single one is not tried.

    Raises:
        Failed: none of them runs.
    """
    if len(variants) == 1:
        return variants[0], []
    tried = []
    for options in variants:
        entry = {"side": side, **options}
        try:
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


def measure(task: dict[str, Any], variants: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The result, but for the machine.

    Raises:
        Failed: a side cannot run.
    """
    from dataflex_jax.models.hf.config import from_hf

    chosen, tried = {}, []
    for side, of_side in variants.items():
        chosen[side], entries = fastest(side, task, of_side)
        tried += entries
    rates: dict[str, list[float]] = {side: [] for side in chosen}
    with contextlib.ExitStack() as stack:

        def started(side: str) -> Side:
            of_side = stack.enter_context(contextlib.closing(Side(side, task | {"options": chosen[side]})))
            of_side.rate(_WARM_UP_STEPS)
            return of_side

        sides = {side: started(side) for side in ([] if flags.FLAGS.restart else chosen)}
        for i in range(flags.FLAGS.rounds):
            for side in list(chosen)[:: -1 if i % 2 else 1]:
                if flags.FLAGS.restart:
                    sides[side] = started(side)
                rates[side].append(sides[side].rate(flags.FLAGS.block))
                if flags.FLAGS.restart:
                    sides[side].close()
        about = sides["ours"].about
        if flags.FLAGS.trace:
            (started("ours") if flags.FLAGS.restart else sides["ours"]).rate(3, flags.FLAGS.trace)

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
    return {
        **results.describe(about["resolved"]),
        "peer_versions": sides["peer"].about,
        "xla_flags": about["xla_flags"],
        "model": task["config"],
        "dtype": task["dtype"],
        "seq_len": task["seq_len"],
        "flops_per_token": flops,
        "rounds": flags.FLAGS.rounds,
        "block_steps": flags.FLAGS.block,
        **figures,
        "ours_over_peer": results.spread(np.divide(rates["ours"], rates["peer"])),
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
            tile_tokens=("tile_tokens", "integer"),
            attention=("attention", "name"),
        ),
        "peer": _options(
            batch=("peer_batch", "integer"),
            checkpointing=("peer_checkpointing", "truth"),
            attention=("peer_attention", "name"),
            compile=("peer_compile", "truth"),
        ),
    }
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError('the peer needs PyTorch: pip install -e ".[torch]"') from error
    try:
        result = measure(task, variants)
    except Failed as failure:
        raise TrainingError(str(failure)) from failure
    results.write(flags.FLAGS.output, {"shape": shape, **result})
    for side in variants:
        found = result[side]
        share = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
        print(
            f"{side}: {found['tokens_per_second']['median']:,.0f} tokens/s, {found['teraflops']:.3f} TFLOP/s{share}, "
            f"peak {(found['peak_memory']['bytes'] or math.nan) / 2**30:.2f} GiB ({found['peak_memory']['of']}), "
            f"{found['options']}"
        )
    ratio = result["ours_over_peer"]
    print(f"ours / peer: {ratio['median']:.3f}, quartiles {ratio['quartiles']}")


if __name__ == "__main__":
    from dataflex_jax import cli

    flags.DEFINE_enum("shape", None, list(SHAPES), "The model's; default: tiny on a CPU, else qwen2.5-1.5b.")
    flags.DEFINE_integer("seq_len", None, "Tokens a row; default: 256 on a CPU, else 2048.", lower_bound=2)
    flags.DEFINE_list("batch", ["8"], "Rows a step of ours; several values are tried.")
    flags.DEFINE_list("remat", ["none"], "What the backward pass recomputes: none, dots, attention, full.")
    flags.DEFINE_list("tile_tokens", ["2048"], "Tokens whose logits the cross-entropy holds at once.")
    flags.DEFINE_list("attention", ["auto"], "auto (cuDNN where it can be), cudnn, xla.")
    flags.DEFINE_list("peer_batch", None, "Rows a step of the peer's; default: as --batch.")
    flags.DEFINE_list("peer_checkpointing", ["false"], "Whether the peer recomputes activations: false, true.")
    flags.DEFINE_list("peer_attention", ["auto"], "The peer's SDPA kernel: auto (PyTorch's choice), cudnn, flash.")
    flags.DEFINE_list("peer_compile", ["false"], "Whether the peer's model goes through torch.compile: false, true.")
    flags.DEFINE_integer("rounds", 7, "Rounds; each has a block of each side.", lower_bound=1)
    flags.DEFINE_integer("block", 5, "Steps a block.", lower_bound=1)
    flags.DEFINE_integer("sweep_steps", 5, "Steps of a variant, where several are tried.", lower_bound=1)
    flags.DEFINE_bool("restart", False, "A new process for every block: where both sides do not fit in memory at once.")
    cli.define_path("trace", None, "A folder for a profile of three steps of ours.")
    cli.define_path("output", f"{results.FOLDER}/train_speed.json", "The result.")
    cli.run(main)
