"""Time and memory of the tiled cross-entropy's loss and gradients against logits that are held in float32 all at once.

    python scripts/bench/cross_entropy.py [--tile_tokens=512,1024,2048] [--rounds=3]
    python scripts/bench/cross_entropy.py --tokens=16384 --hidden=896 --tile_tokens=1024,2048,4096   # a GPU's defaults

Each form runs in a process of its own, in turns. Memory is given twice: what XLA's buffer assignment needs beside the
arguments and the results, and by how much the process's peak (on a GPU the device's) rises over what it is before the
first call. The first is also given for --full_tokens, a whole batch, which is compiled and not run. Hidden states are
bfloat16 on a GPU and float32 on a CPU; the weight is float32.
"""

import contextlib
import resource
import time
from typing import Any

import numpy as np
import results
from absl import flags
from contestants import Contestant, Failed, Peak, platform

# JAX is imported in functions only, because every form's process imports this module first.

MATERIALISED = "materialised"


def _loss_and_gradients(form: str | int):
    """The jitted function of a form: (hidden [1, N, D], weight [D, V], labels [1, N]) -> (mean loss, gradients)."""
    import jax
    import jax.numpy as jnp

    from dataflex_jax.models import loss

    def materialised(hidden, weight, labels):
        logits = loss.next_token_logits(hidden, weight.astype(hidden.dtype))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0])

    def tiled(hidden, weight, labels):
        return jnp.mean(loss.cross_entropy(hidden, weight, labels, tile_tokens=form))

    return jax.jit(jax.value_and_grad(materialised if form == MATERIALISED else tiled, argnums=(0, 1)))


@contextlib.contextmanager
def form_in_process(task: dict[str, Any]):
    """A block of calls of one form; its peak is the rise over what was used before the first call."""
    import jax
    import jax.numpy as jnp

    from dataflex_jax.configs import base
    from dataflex_jax.reporting import hardware
    from dataflex_jax.training import run_config

    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype("float32" if on_cpu else "bfloat16")
    function = _loss_and_gradients(task["form"])

    def compiled(tokens: int):
        shapes = (((1, tokens, task["hidden"]), dtype), ((task["hidden"], task["vocab"]), "float32"))
        shapes = (*shapes, ((1, tokens), "int32"))
        return function.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()

    whole = compiled(task["full_tokens"]).memory_analysis().temp_size_in_bytes
    call = compiled(task["tokens"])
    task["about"] = {
        "resolved": run_config.resolved(base.get_config()),
        "dtype": dtype.name,
        "temporaries": call.memory_analysis().temp_size_in_bytes,
        "full_temporaries": whole,
    }
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, task["tokens"], task["hidden"]), np.float32), dtype)
    weight = jnp.asarray(rng.standard_normal((task["hidden"], task["vocab"]), np.float32) / task["hidden"] ** 0.5)
    labels = jnp.asarray(rng.integers(0, task["vocab"], (1, task["tokens"]), np.int32))
    jax.block_until_ready((hidden, weight, labels))
    before = _resident() if on_cpu else hardware.peak_memory_bytes().bytes

    def block() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call(hidden, weight, labels))
        return time.perf_counter() - start

    def peak() -> Peak:
        measured = hardware.peak_memory_bytes()
        return None if measured.bytes is None else measured.bytes - before, measured.measure

    yield block, peak


def _resident() -> int:
    """Bytes of this process that are in memory now; where the system does not tell, at most so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        from dataflex_jax.reporting.hardware import peak_memory_bytes

        return peak_memory_bytes().bytes


def measure(task: dict[str, Any], tiles: list[int]) -> dict[str, Any]:
    """The result, but for the machine.

    Raises:
        Failed: a form cannot run.
    """
    seconds: dict[str | int, list[float]] = {form: [] for form in (MATERIALISED, *tiles)}
    with contextlib.ExitStack() as stack:
        forms = {}
        for form in seconds:
            forms[form] = Contestant(form_in_process, task | {"form": form})
            stack.callback(forms[form].stop)
            forms[form].seconds()
        for i in range(flags.FLAGS.rounds):
            for form in list(forms)[:: -1 if i % 2 else 1]:
                seconds[form].append(forms[form].seconds())
    rows = []
    for form, process in forms.items():
        rows.append(
            {
                "form": form,
                "seconds": results.spread(seconds[form]),
                "time_over_materialised": results.spread(np.divide(seconds[form], seconds[MATERIALISED])),
                "compiled_bytes": process.about["temporaries"],
                "full_compiled_bytes": process.about["full_temporaries"],
                "measured_bytes": process.peak[0],
                "measured_of": process.peak[1],
            }
        )
    about = forms[MATERIALISED].about
    described = results.describe(about["resolved"])
    return {**described, **task, "dtype": about["dtype"], "rounds": flags.FLAGS.rounds, "forms": rows}


def main(argv: list[str]) -> None:
    from dataflex_jax import cli
    from dataflex_jax.errors import InputError, TrainingError

    cli.no_positional(argv)
    on_cpu = platform() == "cpu"
    task = {
        "vocab": flags.FLAGS.vocab,
        "tokens": flags.FLAGS.tokens or (4096 if on_cpu else 16384),
        "hidden": flags.FLAGS.hidden or (128 if on_cpu else 896),
        "full_tokens": flags.FLAGS.full_tokens,
    }
    if not all(tile.isdecimal() and int(tile) > 0 for tile in flags.FLAGS.tile_tokens):
        raise InputError(f"--tile_tokens={','.join(flags.FLAGS.tile_tokens)}: must be a list of integers >= 1")
    try:
        result = measure(task, [int(tile) for tile in flags.FLAGS.tile_tokens])
    except Failed as failure:
        raise TrainingError(str(failure)) from failure
    results.write(flags.FLAGS.output, result)
    for row in result["forms"]:
        print(
            f"{row['form']}: {row['seconds']['median']:.3f} s ({row['time_over_materialised']['median']:.2f} x), "
            f"compiled {row['compiled_bytes'] / 2**30:.2f} GiB, of {task['full_tokens']} tokens "
            f"{row['full_compiled_bytes'] / 2**30:.2f} GiB, measured {(row['measured_bytes'] or 0) / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    from dataflex_jax import cli

    flags.DEFINE_integer("vocab", 151936, "Entries of the vocabulary.", lower_bound=2)
    flags.DEFINE_integer("tokens", None, "Positions; default: 4096 on a CPU, else 16384.", lower_bound=1)
    flags.DEFINE_integer("hidden", None, "Width of the hidden states; default: 128 on a CPU, else 896.", lower_bound=1)
    flags.DEFINE_integer("full_tokens", 16384, "Positions of the batch that is only compiled.", lower_bound=1)
    flags.DEFINE_list("tile_tokens", ["512", "1024", "2048"], "Positions whose logits are held at once.")
    flags.DEFINE_integer("rounds", 3, "Rounds; each has one call of each form.", lower_bound=1)
    cli.define_path("output", f"{results.FOLDER}/cross_entropy.json", "The result.")
    cli.run(main)
