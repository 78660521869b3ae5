"""What the commands share: flags, exit codes and one-line errors.

Exit codes: 0 done, 2 bad configuration or input, 1 anything else.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dataflex_jax.errors import InputError, TrainingError

_PROJECT = Path(__file__).parent.parent


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits with its code; faults of the user's print one line."""
    _log_to_stderr()
    app.run(lambda argv: _reporting(main, argv), flags_parser=lambda argv: _reporting(_parse, argv))


def chosen_config(holder: flags.FlagHolder) -> ConfigDict:
    """The configuration of a `config_flags.DEFINE_config_file` flag.

    Raises:
        InputError: it is missing, or a policy was changed by overriding its name alone.
    """
    config = holder.value
    if config is None:
        raise InputError(f"--{holder.name} is missing, e.g. --{holder.name}=configs/odm.py")
    for name, value in config_flags.get_override_values(flags.FLAGS[holder.name]).items():
        kind, _, field = name.partition(".")
        if field == "name":
            raise InputError(
                f"--{holder.name}.{name}={value}: another {kind} has other fields; choose it by variant, "
                f"--{holder.name}=configs/base.py:{kind}={value}"
            )
    return config


def no_positional(argv: list[str]) -> None:
    """Refuses arguments that are no flags.

    Raises:
        InputError: names the first one.
    """
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}; options are written --name=value")


def default_run_folder(holder: flags.FlagHolder) -> str:
    """runs/RECIPE or runs/RECIPE-VARIANT, from a config flag."""
    path, _, variant = flags.FLAGS[holder.name].config_filename.partition(":")
    name = "-".join(filter(None, [Path(path).stem, variant]))
    return "runs/" + re.sub(r"[^\w.-]+", "-", name)


def initialize_distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a multi-host run: those of the flags, or what SLURM or Open MPI says; else alone.

    Raises:
        InputError: some of the flags without the others.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise InputError("--coordinator, --num_processes and --process_id: give all three or none")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        jax.distributed.initialize()


def _log_to_stderr() -> None:
    """One line a message for this package's own messages; the libraries' only from warnings on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("dataflex_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False


def _reporting(call: Callable, argv: list[str]):
    try:
        return call(argv)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except TrainingError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
    argv[:] = [_found_recipe(arg) for arg in argv]
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        raise InputError(e) from e
    except AttributeError as e:
        raise _unknown_field(argv, e) or e from e
    except ValueError as e:
        if match := re.match(r'Override (\S+) can not be applied because field "(\w+)" is None', str(e)):
            raise InputError(
                f"--config.{match[1]}: no {match[2]} is chosen; choose it by variant, "
                f"--config=configs/base.py:{match[2]}=NAME, then its fields exist"
            ) from e
        raise


def _found_recipe(arg: str) -> str:
    """Recipes are looked for in the working directory, then beside the package."""
    match = re.fullmatch(r"(--?config=)([^:]+)(:.*)?", arg)
    if not match or Path(match[2]).exists():
        return arg
    if not (_PROJECT / match[2]).is_file():
        raise InputError(f"--config={match[2]}: no such file; recipes are in {_PROJECT / 'configs'}")
    return f"{match[1]}{_PROJECT / match[2]}{match[3] or ''}"


def _unknown_field(argv: list[str], error: AttributeError) -> InputError | None:
    """The error for an override that the recipe has no field for; None where `error` is about something else."""
    field = re.search(r"\w+", str(error))
    for arg in argv:
        match = re.match(rf"--?config\.((?:\w+\.)*){field and field[0]}(=|$)", arg)
        if match:
            section = _recipe_alone(argv)
            for name in filter(None, match[1].split(".")):
                section = section[name]
            return InputError(f"{arg}: no such field; this recipe has {', '.join(section.keys())}")
    return None


def _recipe_alone(argv: list[str]) -> ConfigDict:
    """The recipe's configuration without the command line's overrides, which config_flags reads from sys.argv."""
    sys.argv = [arg for arg in argv if not re.match(r"--?config\.", arg)]
    flags.FLAGS.unparse_flags()
    flags.FLAGS(sys.argv)
    return flags.FLAGS.config
