"""Data-centric dynamic training of language models: policies decide what a model trains on.

    dataflex-jax COMMAND [--option=value ...]      also: python -m dataflex_jax.COMMAND ...

    train       trains a model, or goes on with a run
    select      scores and selects training examples with checkpoints, without training
    validate    how good scores of training examples are, by models trained on subsets
    swarm       which mixture of the domains to train on, by a swarm of small models
    evaluate    held-out loss of a checkpoint, per domain
    generate    what a checkpoint writes when it is prompted
    export      checkpoints to and from Hugging Face's format
    report      one HTML page that shows one run, or compares several
    convert     a YAML file of LLaMA-Factory or DataFlex as a recipe

`dataflex-jax COMMAND --help` explains one of them; `dataflex-jax --version` says the version.
"""

import importlib
import sys

from dataflex_jax import __version__, ending

COMMANDS = ("train", "select", "validate", "swarm", "evaluate", "generate", "export", "report", "convert")


def main() -> int:
    """The console command `dataflex-jax`."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    if command == "--version":
        print(f"dataflex-jax {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    ending.at_interrupts_while_importing()
    # Not above: what says the version need not wait for JAX.
    from dataflex_jax import cli

    module = importlib.import_module(f"dataflex_jax.{command}")
    sys.argv = [f"dataflex-jax {command}", *arguments]
    cli.run(module.main, module.define_flags)


if __name__ == "__main__":
    sys.exit(main())
