"""Which mixture of the domains to train on, found with a swarm of small models before the big run.

    python -m dataflex_jax.swarm --config=configs/swarm.py --output=DIR [--runs=64] [--seeds=1]
        [--natural] [--deletions] [--target_tokens=N] [--verify=5]
    python -m dataflex_jax.swarm --config=configs/odm.py --output=DIR
        --vary=mixer.alpha=0.5,0.9 [--vary=...] [--seeds=4]
    python -m dataflex_jax.swarm --ratios=ratios.csv --metrics=metrics.csv --output=DIR
        [--prior=domain_weights.json] [--tokens=tokens.json --target_tokens=N]

Trains small models, each on a mixture of its own, all as one program, and measures the held-out
losses of the domains and the target groups (ratios.csv, metrics.csv). A log-linear law is fitted to
them, checked by cross-validation, and minimised near the natural mixture, which proposes one:
domain_weights.json, for --config.data.proportions of any run. --target_tokens, the tokens of that
run, limits a domain to four epochs. --verify trains the proposal, the natural mixture and uniform
weights, and says with an interval whether it helped. With --vary the models differ by fields of the
configuration, all combinations, in place of mixtures: settings.csv, metrics.csv, and how far each
is from the first with an interval; the seeds of a setting are one program. With --ratios and
--metrics, tables of this or another tool, nothing is trained. The same command again goes on where
it was stopped.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded, unwritable
from dataflex_jax.foreign import read_object
from dataflex_jax.mixtures import fitting, proposal, results, settings, swarm, tables
from dataflex_jax.mixtures.swarm import Design
from dataflex_jax.policies.options import is_number
from dataflex_jax.training.domain_weights import read_weights

_OF_TABLES = ("ratios", "metrics", "prior", "tokens")
_OF_MIXTURES = ("runs", "natural", "deletions", "target_tokens", "verify")
_FEWEST_SEEDS = 2  # of an interval
_STOPPED = "Stopped on request, saved; the same command goes on from there."


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe whose model and data to use.")
    cli.define_path("output", None, "A folder.")
    flags.DEFINE_integer("runs", 64, "Random mixtures.", lower_bound=1)
    flags.DEFINE_integer("seeds", 1, "Models of each mixture, whose metrics are averaged.", lower_bound=1)
    flags.DEFINE_bool("natural", False, "Also train on the natural mixture.")
    flags.DEFINE_bool("deletions", False, "Also train on the natural mixture without a domain, for each of them.")
    flags.DEFINE_multi_string("vary", [], "FIELD=VALUE,VALUE,...: what models differ by, in place of mixtures.")
    flags.DEFINE_integer("at_once", None, "Models in one program; by default as many as fit.", lower_bound=1)
    flags.DEFINE_string("fit", None, "Pattern of the metrics that count, such as 'nll/*'; default: bits per byte.")
    flags.DEFINE_float("target_tokens", None, "Tokens of the run that the proposal is for; by default no limits.")
    flags.DEFINE_integer("verify", 0, "Seeds of models that verify the proposal; 0: none.", lower_bound=0)
    cli.define_path("ratios", None, "A table of mixtures that were trained elsewhere, with --metrics.")
    cli.define_path("metrics", None, "The table of their metrics, of which less is better.")
    cli.define_path("prior", None, "With --ratios: a weights file that the proposal stays near; by default the mean.")
    cli.define_path("tokens", None, 'With --ratios: {"domains": {NAME: TOKENS}}, for --target_tokens.')


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if options.output is None:
        raise InputError("--output is missing: a folder")
    if fault := unwritable(Path(options.output) / results.JSON):
        raise InputError(f"cannot be written ({fault}); choose another folder", option="--output", value=options.output)
    if options.target_tokens is not None and not options.target_tokens > 0:
        raise InputError("must be a number > 0", option="--target_tokens", value=options.target_tokens)
    if any(options[name].present for name in _OF_TABLES):
        _from_tables(Path(options.output))
    elif options.vary:
        _varied(Path(options.output))
    else:
        _trained(Path(options.output))


def _trained(folder: Path) -> None:
    options, config = flags.FLAGS, cli.chosen_config(example="configs/swarm.py")
    if options.runs < tables.FEWEST:
        raise InputError(f"{tables.FEWEST} or more are needed for a law", option="--runs", value=options.runs)
    if 0 < options.verify < _FEWEST_SEEDS:
        raise InputError("an interval needs 2 seeds or more", option="--verify", value=options.verify)
    _keep_compilations(config)
    design = Design(options.runs, options.seeds, options.natural, options.deletions, options.at_once)
    with swarm.opened_swarm(config, folder) as models:
        most = proposal.caps(models.tokens, options.target_tokens)
        if not swarm.train(models, design):
            print(_STOPPED)
            return
        runs = tables.read(folder / tables.RATIOS, folder / tables.METRICS, options.fit)
        found = fitting.found(runs, models.natural, most, config.seed)
        _show(folder, found, None)
        if options.verify:
            first = config.seed + design.seeds
            verified = fitting.verified(models, found, range(first, first + options.verify), options.at_once)
            if verified is None:
                print(_STOPPED)
                return
            results.write(folder, found, verified)
            print(results.verdict(verified))


def _varied(folder: Path) -> None:
    options = flags.FLAGS
    for name in _OF_MIXTURES:
        if options[name].present:
            raise InputError("is for a swarm of mixtures, without --vary", option=f"--{name}")
    config = cli.chosen_config(example="configs/odm.py")
    chosen = settings.settings(options.vary)
    _keep_compilations(config)
    seeds = range(config.seed, config.seed + options.seeds)
    found = settings.compared(config, folder, chosen, seeds, options.fit, options.at_once)
    if found is None:
        print(_STOPPED)
        return
    print(settings.table(found))
    names = ", ".join((settings.SETTINGS, tables.METRICS, settings.JSON))
    print(f"\n{len(chosen)} settings of {options.seeds} seeds. Written to {folder}: {names}.")


def _keep_compilations(config: ConfigDict) -> None:
    if jax.config.jax_compilation_cache_dir is None:
        # So that a restart compiles nothing.
        jax.config.update("jax_compilation_cache_dir", str(Path(expanded(config.data.cache_dir)) / "compilations"))


def _from_tables(folder: Path) -> None:
    options = flags.FLAGS
    for name in ("ratios", "metrics"):
        if options[name].value is None:
            raise InputError(f"--{name} is missing: both tables are needed, {tables.RATIOS} and {tables.METRICS}")
    for name in ("config", "verify", "vary"):
        if options[name].present:
            raise InputError("is for a swarm that is trained here, without --ratios", option=f"--{name}")
    runs = tables.read(Path(options.ratios), Path(options.metrics), options.fit)
    prior = runs.weights.mean(axis=0)
    if options.prior is not None:
        prior = np.array(read_weights(options.prior, runs.domains))
    if (options.tokens is None) != (options.target_tokens is None):
        raise InputError("--tokens and --target_tokens: give both or none")
    most = np.ones(len(prior))
    if options.tokens is not None:
        most = proposal.caps(_tokens(options.tokens, runs.domains), options.target_tokens)
    _show(folder, fitting.found(runs, prior, most, seed=0), None)


def _tokens(path: str, domains: tuple[str, ...]) -> np.ndarray:
    tokens = read_object(path).get("domains")
    wrong = not isinstance(tokens, dict) or [n for n in domains if not is_number(tokens.get(n)) or tokens[n] < 0]
    if wrong:
        name = "" if wrong is True else f", and {wrong[0]!r} has none"
        raise InputError(f'{path}: must hold {{"domains": {{NAME: TOKENS, ...}}}} with a number for each domain{name}')
    return np.array([float(tokens[name]) for name in domains])


def _show(folder: Path, found: fitting.Found, verified: fitting.Verified | None) -> None:
    results.write(folder, found, verified)
    print(results.table(found))
    names = ", ".join((results.JSON, results.PICTURE, results.WEIGHTS_FILE))
    print(f"\n{len(found.runs.names)} runs. Written to {folder}: {names}.")
    print(f"--config.data.proportions={folder / results.WEIGHTS_FILE} trains on the proposal.")


if __name__ == "__main__":
    cli.run(main, define_flags)
