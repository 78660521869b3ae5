"""Scores and selects training examples with checkpoints, without training.

    python -m dataflex_jax.select --config=configs/less.py --checkpoint=RUN_DIR
        --output=selected.npz [--num=1000] [--records=selected.jsonl]

The configuration says the selector, the candidates (data) and the target set (targets);
--checkpoint is a run folder (its newest step) or one step's folder. Several, with commas between,
are LESS's sum over checkpoints, weighted by --checkpoint_weights or else by their learning rates;
other selectors take the last one. The file has ids and scores (the best first), their domains, the
numbers of their records, and all_scores. --records writes the chosen records themselves, JSONL or
Parquet, for configs/sft.py to train on.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax import config as configuration
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import open_targets
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.base import Request
from dataflex_jax.selection.choosing import Chooser, Chosen, write_selection
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.model import ModelSignals, SignalFunctions
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import optim
from dataflex_jax.training.checkpoint import Checkpoints, locate
from dataflex_jax.training.weights import read_trained

DEFAULT_SHARE = 0.05  # of the pool, as in LESS


class OpenedCheckpoints(Sequence):
    """(weight, signals) of each checkpoint; these are read when they are used, and one is in memory at a time.

    Args:
        places: run folder and step of each.
        weights: of each.
        mesh: the devices.
        sweeper: runs the sweeps.
        data: the candidates and the target set, as `ModelSignals` wants them.
    """

    def __init__(
        self, places: Sequence[tuple[Path, int]], weights: Sequence[float], mesh: Mesh, sweeper: Sweeper, data: tuple
    ):
        self._places, self._weights, self._mesh, self._sweeper, self._data = places, weights, mesh, sweeper, data
        self._functions: dict[Path, SignalFunctions] = {}
        self._opened: tuple[int, ModelSignals] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> tuple[float, "CheckpointSignals"]:
        return self._weights[number], CheckpointSignals(self, range(len(self))[number])

    def signals(self, number: int) -> ModelSignals:
        """Those of one checkpoint, to be let go of before another one is asked for."""
        if self._opened is None or self._opened[0] != number:
            self._opened = None
            self._opened = number, self._read(*self._places[number])
        return self._opened[1]

    def _read(self, run_folder: Path, step: int) -> ModelSignals:
        trained = configuration.read(run_folder)
        with Checkpoints(run_folder, writable=False) as checkpoints:
            model = read_trained(checkpoints, step, trained, self._mesh)
        if run_folder not in self._functions:
            self._functions[run_folder] = SignalFunctions(model.graphdef, trained.optim)
        functions = self._functions[run_folder]
        return ModelSignals(functions, self._sweeper, model.params, model.frozen, model.opt_state, *self._data)


class CheckpointSignals:
    """The signals of one checkpoint, and all checkpoints as `checkpoints`; see `policies.base.Signals`."""

    def __init__(self, checkpoints: OpenedCheckpoints, number: int):
        self.checkpoints, self._number = checkpoints, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoints.signals(self._number), name)


def select(
    config: ConfigDict,
    places: Sequence[tuple[Path, int]],
    weights: Sequence[float] | None,
    num: int | None,
    *,
    records: bool = False,
) -> tuple[Pool, Chosen]:
    """The selector's choice of `num` rows of the whole pool.

    Args:
        config: whose selector, data, targets and mesh to use; in the first checkpoint's tokens.
        places: run folder and step of each checkpoint.
        weights: of the checkpoints; None: their learning rates, normalised.
        num: how many; None: `DEFAULT_SHARE` of the pool.
        records: whether `chosen_records` will be asked for.

    Raises:
        InputError: a selector that scores nothing, input that cannot be read, or records that no one file can hold.
    """
    config.data.tokenizer = str(places[0][0] / "tokenizer")
    configuration.validate(config)
    registry.load_plugins(config.plugins)
    policies = active_policies(config)
    if policies.selecting is None:
        raise InputError("--config: needs a selector that scores, such as configs/base.py:selector=less")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        domains, _ = open_domains(config.data)
        pool = Pool(domains)
        if records:
            check_records(pool)
        targets = None
        if policies.want_targets:
            target_set = open_targets(config, domains, config.data.tokenizer)
            targets = target_set, source(target_set.pool, mesh)
        sweeper = Sweeper(mesh, rows=config.sweep.batch_rows)
        checkpoints = OpenedCheckpoints(
            places, weights or learning_rates(places), mesh, sweeper, (source(pool, mesh), targets)
        )
        signals = checkpoints[-1][1]
        selector = policies.selecting.selector
        state = selector.init(checkpoints[0][1]) if selector.init else {}
        chooser = Chooser(policies.selecting, pool, pool.groups(by_domain=False))
        request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(config.seed))
        count = num or max(1, round(DEFAULT_SHARE * pool.num_rows))
        chosen, _ = chooser.choose(state, signals, request, [count])
    return pool, chosen


def learning_rates(places: Sequence[tuple[Path, int]]) -> list[float]:
    """The learning rate of each checkpoint's last step, as shares of their sum; equal where all are 0."""
    rates = []
    for run_folder, step in places:
        trained = configuration.read(run_folder)
        rates.append(float(optim.learning_rate(trained.optim, trained.train_step)(max(step - 1, 0))))
    total = sum(rates)
    return [rate / total for rate in rates] if total else [1 / len(rates)] * len(rates)


def check_records(pool: Pool) -> None:
    """Refuses rows whose records no one file can hold.

    Raises:
        InputError: rows of documents, or of datasets that are read in different ways.
    """
    if pool.records() is None:
        raise InputError("--records: rows of documents are no records; instruction data are (config.data.formatting)")
    first, *others = pool.domains
    for other in others:
        if other.store.record_format != first.store.record_format:
            raise InputError(
                f"--records: {first.name!r} and {other.name!r} have other formats or columns, which one file cannot "
                "hold; leave it out, or choose datasets of one format by --config.data.domains"
            )


def chosen_records(pool: Pool, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """The source records of rows of examples, in the order of `ids`."""
    wanted, found, place = set(ids.tolist()), {}, 0
    for domain in pool.domains:
        for record in domain.store.records("train"):
            if place in wanted:
                found[place] = dict(record)
            place += 1
    return (found[i] for i in ids.tolist())


def write_records(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """Writes records as JSONL or Parquet, by the file's name; in Parquet a field that some lack is null there.

    Raises:
        InputError: neither .jsonl nor .parquet.
    """
    check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        rows = list(records)
        fields = dict.fromkeys(field for row in rows for field in row)
        # A table has the fields of its first row otherwise.
        complete = [{field: row.get(field) for field in fields} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(complete), path)
    else:
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def check_path(path: Path) -> None:
    """Refuses a file that `write_records` cannot write.

    Raises:
        InputError: neither .jsonl nor .parquet.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--records={path}: must end in .jsonl or .parquet")


def _numbers(values: Sequence[str], count: int) -> list[float] | None:
    if not values:
        return None
    try:
        weights = [float(value) for value in values]
    except ValueError as error:
        raise InputError(f"--checkpoint_weights={','.join(values)}: must be numbers") from error
    if len(weights) != count:
        raise InputError(f"--checkpoint_weights={','.join(values)}: one for each of the {count} checkpoints is needed")
    return weights


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe whose selector, data and targets to use.")
    flags.DEFINE_list("checkpoint", [], "Run folders or folders of one step in them, comma-separated.")
    flags.DEFINE_list("checkpoint_weights", [], "Their weights; by default their learning rates.")
    flags.DEFINE_string("output", None, "An .npz file.")
    flags.DEFINE_integer("num", None, "How many examples; by default 5 % of the pool.", lower_bound=1)
    flags.DEFINE_string("records", None, "A .jsonl or .parquet file for the chosen records.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options, config = flags.FLAGS, cli.chosen_config()
    if not options.checkpoint:
        raise InputError("--checkpoint is missing: a run folder, or the folder of one step in it")
    if options.output is None or not options.output.endswith(".npz"):
        raise InputError(f"--output={options.output}: must be a file that ends in .npz")
    output, records = Path(options.output), options.records and Path(options.records)
    if records:
        check_path(records)
    places = [locate(path) for path in options.checkpoint]
    weights = _numbers(options.checkpoint_weights, len(places))
    pool, chosen = select(config, places, weights, options.num, records=records is not None)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_selection(output, pool, chosen, all_scores=True)
    print(
        f"{len(chosen.ids)} of {pool.num_rows} examples, scores {chosen.scores.max():.4g} to "
        f"{chosen.scores.min():.4g}; {chosen.not_finite} were not finite. Written to {output}."
    )
    if records:
        write_records(records, chosen_records(pool, chosen.ids))
        print(f"Their records are in {records}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
