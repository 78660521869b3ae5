"""The train step of a mixture of experts beside that of a dense model with the same active parameters.

    python scripts/bench/moe.py [--experts=64] [--top_k=8] [--rounds=7]
    python scripts/bench/moe.py --small                                   # seconds, to see that it runs
    python scripts/bench/moe.py --device=h100 [--devices=8] --output=docs/benchmarks/moe-h100.json

Both are Qwen3-shaped and differ in the MLP alone: the dense one is as wide as the experts that a token goes to are
together, so that they multiply the same numbers but for the router, and nothing is dropped. They train on the same
random tokens, on which a random router's load is uneven, in one process and in turns. What more the mixture takes is
sorting and moving the slots, padding, and reading weights that fewer tokens share.

With --device nothing runs: XLA's GPU compiler says what the steps of Qwen3-30B-A3B and of the dense model with its
active parameters take on cards that are not here (the extra "aot"), bfloat16 over float32 parameters. Flags of sizes
change that shape; --rows is of each card then.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import results
from absl import flags

from dataflex_jax import cli
from dataflex_jax.aot import cards, compiler, estimate, programs
from dataflex_jax.configs import base
from dataflex_jax.data.batch import Batch
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import REMAT_POLICIES, ModelConfig
from dataflex_jax.models.model import Model
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.training import run_config
from dataflex_jax.training.state import Start
from dataflex_jax.training.step import TrainStep

# With the heads that it has.
QWEN3_30B_A3B = {"hidden": 2048, "layers": 48, "experts": 128, "top_k": 8, "width": 768, "vocab": 151936}
ON_A_CARD = QWEN3_30B_A3B | {"rows": 4, "seq_len": 2048}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}

_HIDDEN = flags.DEFINE_integer("hidden", 512, "Width of the hidden states.", lower_bound=16)
_LAYERS = flags.DEFINE_integer("layers", 2, "Blocks.", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("experts", 64, "Experts of a block.", lower_bound=1)
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts that a token goes to.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 128, "Of each expert.", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab", 4096, "Entries of the vocabulary.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 8, "Of a batch.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens of a row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; each has a block of steps of each model.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 2, "Steps of a block.", lower_bound=1)
_SMALL = flags.DEFINE_boolean("small", False, "A tiny size, whatever the other flags of sizes say.")
_DEVICE = flags.DEFINE_enum("device", None, ["h100", "h200", "a100"], "A card to compile for; nothing runs.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Of these cards.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "full", list(REMAT_POLICIES), "What is recomputed on these cards.")
_MEMORY_LIMIT = flags.DEFINE_integer(
    "memory_limit",
    None,
    "Per cent of the card's memory that XLA thinks it has (--xla_gpu_memory_limit_slop_factor): where it foresees that "
    "this does not do, it computes things twice, whatever --remat says. None: its own 95.",
    lower_bound=1,
)
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/moe.json", "The result.")

SMALL = {"hidden": 32, "layers": 1, "experts": 8, "top_k": 2, "width": 16, "vocab": 64, "rows": 2, "seq_len": 16}


def models(sizes: dict[str, int], heads: dict[str, int] | None = None, **fields: str) -> dict[str, ModelConfig]:
    """The mixture and the dense model with the same active parameters; `fields` are further ones of both."""
    heads = heads or {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": max(2, sizes["hidden"] // 8)}
    common = {
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["top_k"] * sizes["width"],
        "num_hidden_layers": sizes["layers"],
        **heads,
        **fields,
    }
    experts = {
        "num_experts": sizes["experts"],
        "num_experts_per_tok": sizes["top_k"],
        "moe_intermediate_size": sizes["width"],
        "norm_topk_prob": True,
    }
    return {
        "mixture": ModelConfig(architecture="qwen3_moe", **common, **experts),
        "dense": ModelConfig(architecture="qwen3", **common),
    }


def stepping(model: ModelConfig, rows: int, length: int) -> Callable[[int], float]:
    """The function that trains a random model for so many steps and says how many seconds they took."""
    rate, mixer = optax.constant_schedule(1e-4), Scheduled("static", static(), Schedule(0, 1, -1))
    start = Start(Model.shape(model), None, optax.adamw(rate), mixer.policy.init(np.ones(1)))
    step = jax.jit(TrainStep(start.model, start.optimizer, rate, mixer), donate_argnums=0)
    state = start.state(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = Batch(
        tokens=rng.integers(0, model.vocab_size, (rows, length + 1), np.int32),
        mask=np.ones((rows, length), np.float32),
        lengths=np.full(rows, length, np.int32),
        domain=np.zeros(rows, np.int32),
        drawn_with=np.ones(1, np.float32),
    )

    def block(steps: int) -> float:
        nonlocal state
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begun

    return block


def measure(sizes: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """The result, but for the machine."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sides = models(sizes, dtype=dtype)
    blocks = {name: stepping(model, sizes["rows"], sizes["seq_len"]) for name, model in sides.items()}
    for block in blocks.values():
        block(1)  # compiles
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for i in range(rounds):
        for name in list(blocks)[:: -1 if i % 2 else 1]:
            seconds[name].append(blocks[name](steps) / steps)
    tokens = sizes["rows"] * sizes["seq_len"]
    return {
        "sizes": sizes,
        "dtype": dtype,
        "rounds": rounds,
        "block_steps": steps,
        "load_average": load,
        "parameters": {name: model.num_params() for name, model in sides.items()},
        "step_flops": {name: tokens * model.flops_per_token(sizes["seq_len"]) for name, model in sides.items()},
        "step_seconds": {name: results.spread(of_side) for name, of_side in seconds.items()},
        "mixture_over_dense": results.spread(np.divide(seconds["mixture"], seconds["dense"])),
    }


def compiled_for(card_name: str, devices: int, remat: str, sizes: dict[str, int]) -> dict[str, Any]:
    """What the step takes of each of so many cards that are not here, by model."""
    card, found = cards.CARDS[card_name], {}
    options = {"xla_gpu_memory_limit_slop_factor": _MEMORY_LIMIT.value} if _MEMORY_LIMIT.value else {}
    for name, model in models(sizes, _HEADS, remat=remat).items():
        config = base.get_config("mixer=static")
        shape = dataclasses.asdict(model)
        config.model.update({field: shape[field] for field in config.model if shape.get(field) is not None})
        config.data.update(seq_len=sizes["seq_len"], batch_size=devices * sizes["rows"])
        made = programs.program("train", config, card.devices(devices))
        executable = compiler.compiled(made.function, made.arguments, made.mesh, card, options)
        found[name] = estimate.estimated(made, executable, card).to_json()
    mixture, dense = (sum(of_side["flops"].values()) for of_side in found.values())
    return {
        "sizes": sizes,
        "remat": remat,
        "memory_limit": _MEMORY_LIMIT.value,
        "card": card_name,
        "cards": devices,
        "flops_mixture_over_dense": mixture / dense,
        "models": found,
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    sizes = {name: flags.FLAGS[name].value for name in SMALL}
    if _DEVICE.value:
        sizes = {name: flags.FLAGS[name].value if flags.FLAGS[name].present else ON_A_CARD[name] for name in SMALL}
    if _SMALL.value:
        sizes = SMALL
    if sizes["top_k"] > sizes["experts"]:
        raise InputError(f"--top_k={sizes['top_k']}: must be at most --experts={sizes['experts']}")
    if _DEVICE.value:
        jax.config.update("jax_platforms", "cpu")  # the card is not here, and JAX must not look for it
        compiler.check(f"--device={_DEVICE.value}")
        result = compiled_for(_DEVICE.value, _DEVICES.value, _REMAT.value, sizes)
        results.write(_OUTPUT.value, results.describe(run_config.resolved(base.get_config())) | result)
        print(f"FLOPs mixture / dense: {result['flops_mixture_over_dense']:.3f}")
        return
    result = measure(sizes, _ROUNDS.value, _STEPS.value)
    results.write(_OUTPUT.value, results.describe(run_config.resolved(base.get_config())) | result)
    for name, of_side in result["step_seconds"].items():
        print(f"{name}: {of_side['median']:.3f} s a step, {result['parameters'][name]:,} parameters")
    ratio = result["mixture_over_dense"]
    print(f"mixture / dense: {ratio['median']:.3f}, quartiles {ratio['quartiles']}")


if __name__ == "__main__":
    cli.run(main)
