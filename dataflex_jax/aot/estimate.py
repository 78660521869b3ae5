"""What a program takes of each device: bytes, and on a card that is not here also time, at least."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dataflex_jax.aot import hlo
from dataflex_jax.aot.cards import Card
from dataflex_jax.aot.compiler import compiled
from dataflex_jax.aot.cost import Cost, cost
from dataflex_jax.aot.programs import Program, program

# Of a card's memory, what XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 gives a program.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each device.

    Attributes:
        parameters: that are trained.
        optimizer: its state.
        frozen: the other parameters.
        batch: of rows.
        directions: that gradients are compared with.
        results: beside what takes the place of arguments.
        temporaries: activations and all else that the program needs while it runs.
    """

    parameters: int = 0
    optimizer: int = 0
    frozen: int = 0
    batch: int = 0
    directions: int = 0
    results: int = 0
    temporaries: int = 0

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(dataclasses.astuple(self))


def per_device(tree: PyTree) -> int:
    """Bytes of one device's shards of `jax.ShapeDtypeStruct`s with shardings; keys of random numbers do not count."""

    def shard(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(shard, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a program takes.

    Attributes:
        program: which.
        memory: of each device.
        card: that it was compiled for; None: for the devices that are here.
        cost: on that card, of each device.
    """

    program: Program
    memory: Memory
    card: Card | None = None
    cost: Cost | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the usable part of the card's memory is enough; None without a card."""
        return None if self.card is None else self.memory.peak <= USABLE * self.card.memory

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, at most: without launches, and with collectives where they are not hidden."""
        return None if self.cost is None else self.program.tokens / self.cost.seconds

    @property
    def mfu_ceiling(self) -> float | None:
        """The share of the peak that the model's FLOPs have of the roofline time; None where MFU is not counted."""
        if self.cost is None or self.program.model_flops is None:
            return None
        of_device = self.program.model_flops / self.program.mesh.size
        return of_device / (self.cost.roofline_seconds * self.card.peak_flops)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON's values; bytes, seconds and FLOPs of each device."""
        found = {
            "parameters_in_all": self.program.model.num_params(),
            "mesh": dict(self.program.mesh.shape),
            "tokens": self.program.tokens,
            **dataclasses.asdict(self.memory),
            "peak": self.memory.peak,
        }
        if self.cost is None:
            return found | {"platform": self.program.mesh.devices.flat[0].platform}
        return found | {
            "card": self.card.device_kind,
            "card_memory": self.card.memory,
            "fits": self.fits,
            "flops": self.cost.flops,
            "hbm_bytes": self.cost.hbm_bytes,
            "roofline_seconds": self.cost.roofline_seconds,
            "model_flops": self.program.model_flops and self.program.model_flops / self.program.mesh.size,
            "mfu_ceiling": self.mfu_ceiling,
            "collective_bytes": self.cost.collective_bytes,
            "communication_seconds": self.cost.communication_seconds,
            "exposed_seconds": self.cost.exposed_seconds,
            "tokens_per_second": self.tokens_per_second,
            "calls": self.cost.calls,
            "fusions": self.cost.fusions,
        }


def estimate(
    kind: str,
    config: ConfigDict,
    card: Card | None,
    devices: int,
    vocab_size: int = 2,
) -> Estimate:
    """Compiles a program of a configuration and says what it takes.

    Args:
        kind: as in `programs.program`.
        config: of the run.
        card: to compile for; None: for the devices that are here, whose bytes alone are found.
        devices: how many cards.
        vocab_size: the tokenizer's, where the model's shape does not say.

    Raises:
        InputError: a configuration that is refused.
    """
    made = program(kind, config, card.devices(devices) if card else jax.devices(), vocab_size)
    executable = compiled(made.function, made.arguments, made.mesh, card, made.options if card else None)
    return estimated(made, executable, card)


def estimated(made: Program, executable: jax.stages.Compiled, card: Card | None) -> Estimate:
    """What a compiled program takes; see `estimate`."""
    analysis = executable.memory_analysis()
    memory = Memory(
        **{name: per_device(tree) for name, tree in made.held.items()},
        results=max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        temporaries=analysis.temp_size_in_bytes,
    )
    if card is None:
        return Estimate(made, memory)
    module = hlo.parse(executable.as_text())
    return Estimate(made, memory, card, cost(module, card, devices=made.mesh.size, trips=made.trips))
