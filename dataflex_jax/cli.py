"""What the commands share: flags, exit codes and one-line errors.

Exit codes: 0 done, or stopped on request and saved; 2 bad configuration or input; 1 anything else, also interrupted.
"""

import ast
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from dataflex_jax import ending, gpu_compiler
from dataflex_jax.errors import InputError, TrainingError, is_disk_full, is_out_of_memory, one_line
from dataflex_jax.files import expanded
from dataflex_jax.moving.direct import ENDINGS, recipe_of
from dataflex_jax.policies.registry import KINDS
from dataflex_jax.preemption import StopRequested
from dataflex_jax.processes import group
from dataflex_jax.processes.launch import find

_RECIPES = (Path(__file__).parent / "configs").resolve()
_NOTHING = ("", "None", "null")

# A flag belongs to the module that has it defined here.
flags.disclaim_key_flags()


def run(
    main: Callable[[list[str]], int | None],
    define_flags: Callable[[], None] | None = None,
    *,
    unknown_flags: str = "",
) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits with its code; faults of the user's print one line.

    Args:
        main: the command; `--help` shows its module's docstring and the flags that its module defines.
        define_flags: defines them. absl holds all flags in one place, so commands that share names define theirs here;
            None: they were defined on import.
        unknown_flags: what to say to who gives one that there is not.
    """
    _log_to_stderr()
    _silence_what_is_reported_elsewhere()
    gpu_compiler.tell()
    if define_flags is not None:
        define_flags()
    ending.at_interrupts()
    try:
        app.run(
            lambda argv: _done(main, argv),
            flags_parser=lambda argv: _reporting(parse, argv, main, unknown_flags),
        )
    except KeyboardInterrupt:
        _exit(1, ending.STOPPED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def define_path(name: str, default: str | None, text: str) -> flags.FlagHolder:
    """Defines a flag whose value is a path, in which `~` and environment variables are expanded."""
    return flags.DEFINE(_Path(), name, default, text, serializer=flags.ArgumentSerializer())


def define_paths(name: str, text: str) -> flags.FlagHolder:
    """Defines a flag whose value is several paths with commas between; without it there are none."""
    return flags.DEFINE(_Paths(), name, [], text, serializer=flags.ListSerializer(","))


class _Path(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        try:
            return expanded(argument)
        except InputError as error:
            raise ValueError(str(error)) from error


class _Paths(flags.ListParser):
    def parse(self, argument: str) -> list[str]:
        return [_Path().parse(path) for path in super().parse(argument)]


class _Field(flags.ArgumentParser):
    """A value of a field of the configuration, as `parse_text` reads it; None, null and nothing are None."""

    def __init__(self, parse_text: Callable[[str], Any]):
        self._parse_text = parse_text

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # the recipe's
        return None if argument in _NOTHING else self._parse_text(argument)


def _literal(text: str) -> Any:
    """A Python literal, or else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it raises of bad text
        return text


def _tuple(text: str) -> tuple:
    value = _literal(text)
    if isinstance(value, str):
        if value[:1] in ("(", "["):
            raise ValueError("not a tuple, such as a,b or ('a', 'b')")
        value = [part.strip() for part in value.split(",") if part.strip()] if value == text else [value]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _any_value(text: str) -> Any:
    value = _literal(text)
    # As pairs: the names in a ConfigDict have no dots.
    return tuple(value.items()) if isinstance(value, dict) else value


def _section(text: str) -> NoReturn:
    raise ValueError("not one field")


for _type, _parse_text in {
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    bool: flags.BooleanParser().parse,
    str: str,
    tuple: _tuple,
    object: _any_value,
    ConfigDict: _section,
}.items():
    config_flags.register_flag_parser_for_type(_type, _Field(_parse_text))


def chosen_config(default: str | None = None, example: str = "configs/odm.py") -> ConfigDict:
    """The configuration of the flag `--config`, which `config_flags.DEFINE_config_file` defines.

    Args:
        default: the recipe where none is given, such as "configs/base.py"; None: one must be.
        example: a recipe that suits the command, for who gives none.

    Raises:
        InputError: it is missing, or a policy was changed by overriding its name alone.
    """
    flag = flags.FLAGS["config"]
    if default is not None and not flag.present:
        flag.parse(_found_recipe(default))
    if flag.value is None and flag.present:
        raise InputError(f"--config={flag.config_filename}: its get_config() returns nothing")
    if flag.value is None:
        raise InputError(f"--config is missing, e.g. --config={example}")
    overrides = config_flags.get_override_values(flag)
    for given, other in (("train_step", "epochs"), ("epochs", "train_step")):
        if overrides.get(given) is not None and other not in overrides:
            flag.value[other] = None  # the recipe's, in whose place it is given
    for name, value in overrides.items():
        kind, _, field = name.partition(".")
        if value is None and not field and flag.value.get_type(name) is types.NoneType:
            raise InputError(f"--config.{name}: cannot be None")  # it had a value, and may have been a section
        if field == "name":
            raise InputError(
                f"--config.{name}={value}: another {kind} has other fields; choose it by variant, "
                f"--config=configs/base.py:{kind}={value}"
            )
    return flag.value


def no_positional(argv: list[str]) -> None:
    """Refuses arguments that are no flags.

    Raises:
        InputError: names the first one.
    """
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}; options are written --name=value")


def default_run_folder() -> str:
    """runs/RECIPE or runs/RECIPE-VARIANT, from the flag `--config`."""
    return f"runs/{recipe_name()}"


def recipe_name() -> str:
    """RECIPE or RECIPE-VARIANT, from the flag `--config`, as a part of a path."""
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    name = "-".join(filter(None, [Path(path).stem, variant]))
    return re.sub(r"[^\w.-]+", "-", name)


def initialize_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None, start_timeout: int
) -> None:
    """Joins the other processes of a run: those of the flags, or what SLURM or Open MPI says; else alone.

    Raises:
        InputError: flags or variables that cannot be.
        TrainingError: not all came within `start_timeout` seconds.
    """
    launch = find(coordinator, num_processes, process_id)
    if launch is not None:
        group.join(launch, start_timeout)


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
    # Memory that XLA could not use again: nothing that a user could do anything about.
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            ending.now(1, ending.STOPPED)  # where nothing can be raised, such as in a finalizer
        # Of a restore's other reads, which nobody waits for any more once one has failed.
        frames = traceback.extract_tb(unraisable.exc_traceback)
        if not any(library in frame.filename for frame in frames for library in ("orbax", "asyncio")):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _done(main: Callable, argv: list[str]) -> int | None:
    code = _reporting(main, argv)
    group.done()
    return code


def _reporting(call: Callable, *arguments):
    try:
        return call(*arguments)
    except InputError as error:
        _exit(2, str(error))
    except TrainingError as error:
        _exit(1, str(error))
    except (StopRequested, KeyboardInterrupt):
        _exit(1, ending.STOPPED)
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            place = f": {error.filename}" if error.filename else ""
            _exit(1, f"{error.strerror}{place}; make room and run the same command again")
        if is_out_of_memory(error):
            how = (
                "lower config.data.batch_size or raise config.data.grad_accumulation, split the model over more devices"
            )
            short = one_line(error, 120)
            _exit(1, f"out of memory ({short}); {how} (config.mesh), or take shorter rows or a smaller model")
        group.wait_for_loss()
        if group.failed(1, f"{type(error).__name__}, see its own output"):
            traceback.print_exc()
            _end_now(1)
        raise


def _exit(code: int, message: str) -> NoReturn:
    ending.last_line(message)
    if group.failed(code, message):
        _end_now(code)
    sys.exit(code)


def _end_now(code: int) -> NoReturn:
    """Without what JAX does at the end: it would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(argv: list[str], main: Callable, unknown_flags: str = "") -> list[str]:
    """Parses the flags of `sys.argv`; with --help, prints it and exits.

    Args:
        argv: `sys.argv`; returned are the arguments that are no flags, after the program's name.
        main: the command.
        unknown_flags: what to say to who gives one that there is not.

    Raises:
        InputError: a flag that there is not, or a value that it does not take.
    """
    if not {"--help", "--helpshort", "-help", "-h", "-?"}.isdisjoint(argv[1:]):
        print(_help(main))
        sys.exit(0)
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                argv[i] = f"{flag}={_found_recipe(value)}"
            elif argv[i + 1 :]:
                argv[i + 1] = _found_recipe(argv[i + 1])
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise InputError("; ".join(filter(None, [str(error), unknown_flags]))) from error
    except flags.DuplicateFlagError as error:
        raise InputError(
            "--config is given twice; a run has one recipe, and --config.FIELD=VALUE sets a field"
        ) from error
    except flags.Error as error:
        if match := re.match(r"flag --config\.(\w+)=(\S*): not one field", str(error)):
            how = _how_to_set(match[1], match[2])
            raise InputError(f"--config.{match[1]}={match[2]}: not one field; {how}") from error
        raise InputError(str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:
        if str(error).endswith("has no attribute 'get_config'"):
            raise InputError("--config: not a recipe, the file has no function get_config()") from error
        if unknown := _unknown_field(argv):
            raise unknown from error
        raise
    except ValueError as error:
        if match := re.match(r'Override (\S+) can not be applied because field "(\w+)" is None', str(error)):
            raise InputError(f"--config.{match[1]}: {match[2]} is None; {_how_to_set(match[2], 'NAME')}") from error
        raise


def _help(main: Callable) -> str:
    own = flags.FLAGS.get_flags_for_module(main.__module__)
    width = max((len(flag.name) for flag in own), default=0)
    lines = [main.__globals__["__doc__"]]
    for flag in own:
        has_default = isinstance(flag.default, int | float | str) and not flag.boolean
        # The first line: absl appends one to the help of flags that may be repeated.
        text = f"{flag.help.splitlines()[0].rstrip(';')}{f' Default: {flag.default}.' if has_default else ''}"
        lines.append(textwrap.fill(f"  --{flag.name:{width}}  {text}", 100, subsequent_indent=" " * (width + 6)))
    return "\n".join(lines)


def _how_to_set(section: str, value: str) -> str:
    if section in KINDS:
        return f"choose it by variant, --config=configs/base.py:{section}={value}, then its fields exist"
    return "give it whole, or its fields one by one"


def _found_recipe(value: str) -> str:
    """Recipes are looked for in the working directory, then, those in configs/, among the package's."""
    path, colon, variant = value.partition(":")
    path = expanded(path)
    places = [Path(path)]
    if Path(path).parts[:1] == ("configs",):
        places.append(_RECIPES.parent / path)
    for found in places:
        if found.is_file():
            return recipe_of(found, variant) if found.suffix in ENDINGS else f"{found}{colon}{variant}"
    raise InputError(f"--config={path}: no such file; recipes are in {_RECIPES}")


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
