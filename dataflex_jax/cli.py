"""What the commands share: flags, exit codes and one-line errors.

Exit codes: 0 done, 2 bad configuration or input, 1 anything else.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dataflex_jax.errors import InputError, TrainingError, is_disk_full
from dataflex_jax.policies.registry import KINDS
from dataflex_jax.preemption import StopRequested

_PROJECT = Path(__file__).parent.parent


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits with its code; faults of the user's print one line."""
    _log_to_stderr()
    _silence_what_is_reported_elsewhere()
    app.run(lambda argv: _reporting(main, argv), flags_parser=lambda argv: _reporting(_parse, argv))


def chosen_config(holder: flags.FlagHolder) -> ConfigDict:
    """The configuration of a `config_flags.DEFINE_config_file` flag.

    Raises:
        InputError: it is missing, or a policy was changed by overriding its name alone.
    """
    config = holder.value
    if config is None and holder.present:
        recipe = flags.FLAGS[holder.name].config_filename
        raise InputError(f"--{holder.name}={recipe}: its get_config() returns nothing")
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


def _silence_what_is_reported_elsewhere() -> None:
    """What fails in the threads of a save or a restore is raised where these are waited for, and reported there."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or not record.exc_info)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def hook(unraisable):
        # Of a restore's other reads, which nobody waits for any more once one has failed.
        frames = traceback.extract_tb(unraisable.exc_traceback)
        if not any(library in frame.filename for frame in frames for library in ("orbax", "asyncio")):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _reporting(call: Callable, argv: list[str]):
    try:
        return call(argv)
    except InputError as e:
        _exit(2, str(e))
    except TrainingError as e:
        _exit(1, str(e))
    except StopRequested:
        _exit(1, "stopped on request, before it was done")
    except OSError as e:
        if not is_disk_full(e):
            raise
        _exit(1, f"{e.strerror}{f': {e.filename}' if e.filename else ''}; make room and run the same command again")


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                argv[i] = f"{flag}={_found_recipe(value)}"
            elif argv[i + 1 :]:
                argv[i + 1] = _found_recipe(argv[i + 1])
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        if match := re.match(r"flag --config\.(\w+)=(\S*): Failed to parse .* as a ConfigDict", str(e)):
            raise InputError(f"--config.{match[1]}={match[2]}: not one field; {_how_to_set(match[1], match[2])}") from e
        raise InputError(e) from e
    except (AttributeError, KeyError, TypeError) as e:
        if str(e).endswith("has no attribute 'get_config'"):
            raise InputError("--config: not a recipe, the file has no function get_config()") from e
        if error := _unknown_field(argv):
            raise error from e
        raise
    except ValueError as e:
        if match := re.match(r'Override (\S+) can not be applied because field "(\w+)" is None', str(e)):
            raise InputError(f"--config.{match[1]}: {match[2]} is None; {_how_to_set(match[2], 'NAME')}") from e
        raise


def _how_to_set(section: str, value: str) -> str:
    if section in KINDS:
        return f"choose it by variant, --config=configs/base.py:{section}={value}, then its fields exist"
    return "give it whole, or its fields one by one"


def _found_recipe(value: str) -> str:
    """Recipes are looked for in the working directory, then beside the package."""
    path, colon, variant = value.partition(":")
    for found in (Path(path), _PROJECT / path):
        if found.is_file():
            return f"{found}{colon}{variant}"
    raise InputError(f"--config={path}: no such file; recipes are in {_PROJECT / 'configs'}")


def _unknown_field(argv: list[str]) -> InputError | None:
    """The error for the first override that the recipe has no field for; None if it has them all."""
    overrides = [match for arg in argv if (match := re.match(r"--?config\.([\w.]+)", arg))]
    recipe = _recipe_alone(argv) if overrides else None
    for override in overrides:
        section = recipe
        for name in override[1].split("."):
            known = tuple(section.keys()) if isinstance(section, ConfigDict) else ()
            if name not in known:
                return InputError(f"{override[0]}: no such field; accepted here: {', '.join(known) or 'none'}")
            section = section[name]
    return None


def _recipe_alone(argv: list[str]) -> ConfigDict:
    """The recipe's configuration without the command line's overrides, which config_flags reads from sys.argv."""
    sys.argv = [arg for arg in argv if not re.match(r"--?config\.", arg)]
    flags.FLAGS.unparse_flags()
    flags.FLAGS(sys.argv)
    return flags.FLAGS.config
