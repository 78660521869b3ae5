"""Whether a run fits: compiles its train step for a mesh of any size, without running it, and prints bytes per device.

    python scripts/bench/memory.py --config=configs/odm.py:slimpajama-6b --devices=8 [--shape=DIR_WITH_config.json] \\
        [--config.mesh.tensor=2 --config.model.remat=dots ...]

Parameters, optimizer state and batch are exact: they follow from shapes and shardings. Activations and temporaries are
what XLA's buffer assignment for this platform (the CPU where there is no GPU) needs beside them: for GPUs an estimate,
from above where attention is fused there. Instruction data is counted at its longest rows. --shape takes the model's
shape from a folder, so that no hub is needed. No data is read.
"""

import dataclasses
import json
import os

from absl import flags
from ml_collections import config_flags

from dataflex_jax import cli

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int
    optimizer: int
    frozen: int
    batch: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.frozen + self.batch + self.temporaries


def per_device(tree) -> int:
    """Bytes of one device's shards of `jax.ShapeDtypeStruct`s with shardings."""
    import jax
    import numpy as np

    def shard(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(shard, jax.tree.leaves(tree)))


def measure(config, vocab_size: int) -> tuple[Memory, dict]:
    """Compiles the step of a configuration on the devices that are there."""
    import jax
    import jax.numpy as jnp

    from dataflex_jax import config as configuration
    from dataflex_jax.data.batch import Batch
    from dataflex_jax.data.domains import buckets
    from dataflex_jax.data.sources.table import is_instruction
    from dataflex_jax.models.layout import placed
    from dataflex_jax.models.model import Model
    from dataflex_jax.policies.active import active_policies
    from dataflex_jax.sharding import batch_sharding, make_mesh, replicated, shardings
    from dataflex_jax.training import optim
    from dataflex_jax.training.state import Fixed, Start
    from dataflex_jax.training.step import TrainStep
    from dataflex_jax.training.weights import resolved_model, trained_of

    configuration.validate(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        cfg = resolved_model(config, vocab_size)
        trained, mixer = trained_of(cfg, config.model.trainable), active_policies(config).mixer
        rate = optim.learning_rate(config.optim, config.train_step)
        num_domains = len(config.data.domains or "1234567")
        proportions = jnp.ones(num_domains) / num_domains
        start = Start(Model.shape(cfg), trained, optim.adamw(config.optim, rate), mixer.policy.init(proportions))
        state, frozen = start.abstract(mesh), None
        if trained is not None:
            whole = jax.eval_shape(lambda key: Model.random(cfg, key).training(trained), jax.random.key(0))
            dtype = jnp.dtype(cfg.param_dtype if cfg.lora is None else cfg.lora.base_dtype)
            frozen = placed(mesh, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), whole.frozen))
        rows, instruction = config.data.batch_size, is_instruction(config.data)
        length = max(buckets(config.data)) if instruction else config.data.seq_len

        def of_rows(*shape, dtype="int32"):
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

        packed = of_rows(length) if instruction and config.data.packing else None
        batch = Batch(
            tokens=of_rows(length + 1),
            mask=of_rows(length, dtype="float32"),
            lengths=of_rows(),
            domain=of_rows(),
            drawn_with=jax.ShapeDtypeStruct((num_domains,), "float32", sharding=replicated(mesh)),
            segment_ids=packed,
            positions=packed,
        )
        step = TrainStep(start.model, start.optimizer, rate, mixer, grad_accumulation=config.data.grad_accumulation)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), replicated(mesh)))
        compiled = jitted.lower(state, batch, Fixed(frozen)).compile().memory_analysis()
    memory = Memory(
        parameters=per_device(state.params),
        optimizer=per_device(state.opt_state),
        frozen=per_device(frozen),
        batch=per_device(batch),
        temporaries=compiled.temp_size_in_bytes,
    )
    return memory, {
        "parameters_in_all": cfg.num_params(),
        "mesh": dict(mesh.shape),
        "platform": jax.default_backend(),
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    config = cli.chosen_config()
    if flags.FLAGS.shape:
        config.model.name_or_path = flags.FLAGS.shape
    # Before JAX starts: where there is no accelerator, the mesh is made of virtual CPU devices.
    count = f"--xla_force_host_platform_device_count={flags.FLAGS.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    memory, about = measure(config, flags.FLAGS.vocab_size)
    print(f"{about['parameters_in_all']:,} parameters on {about['mesh']} ({about['platform']}); GiB per device:")
    for name, value in {**dataclasses.asdict(memory), "peak": memory.peak}.items():
        print(f"  {name:12} {value / GIB:9.3f}")
    if flags.FLAGS.output:
        with open(flags.FLAGS.output, "w") as file:
            json.dump({**about, **dataclasses.asdict(memory), "peak": memory.peak}, file, indent=1)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The recipe.")
    flags.DEFINE_integer("devices", 8, "How many devices the mesh has, where there is no accelerator.", lower_bound=1)
    cli.define_path("shape", None, "A folder with config.json in place of config.model.name_or_path.")
    flags.DEFINE_integer("vocab_size", 2, "The tokenizer's, where the model's shape does not say.", lower_bound=2)
    cli.define_path("output", None, "A JSON file for the figures.")
    cli.run(main)
