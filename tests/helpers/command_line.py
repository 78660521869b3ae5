"""Command lines, parsed in this process as the commands parse theirs."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

from absl import flags
from ml_collections import ConfigDict

from dataflex_jax import cli, train
from dataflex_jax import config as configuration


@contextlib.contextmanager
def parsed(*arguments: str, command: ModuleType = train) -> Iterator[flags.FlagValues]:
    """The flags of a command with their values; afterwards they are not defined any more."""
    before = set(flags.FLAGS)
    try:
        with mock.patch.object(sys, "argv", ["command", *arguments]):
            command.define_flags()
            cli.parse(sys.argv, command.main)
            yield flags.FLAGS
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def chosen(*arguments: str) -> ConfigDict:
    """The configuration that a command line of `train` chooses, validated."""
    with parsed(*arguments):
        config = cli.chosen_config()
    configuration.validate(config)
    return config
