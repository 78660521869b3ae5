"""The boundary to code that users bring: an error inside it is one line, and the lines of theirs that led to it."""

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dataflex_jax.errors import InputError, TrainingError, one_line
from dataflex_jax.policies import options

_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = (sysconfig.get_path("stdlib"), "<frozen")
_NOT_THEIRS = (str(Path(__file__).parents[1]), *jax.__path__, *np.__path__)


class UserCodeError(InputError):
    """An error inside the user's own code: what was called and what it raised, then where.

    Args:
        reason: the first, in one line.
        places: lines of a traceback.
    """

    def __init__(self, reason: str, places: str):
        super().__init__(reason)
        self.places = places

    def __str__(self) -> str:
        return f"{self.reason}\n{self.places}".rstrip()


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Shortens what is raised inside to the lines of code that is neither this package's nor JAX's.

    One-line errors and refused hyperparameters pass, as does what has no such lines: a fault of this package.

    Args:
        what: is called, such as "mixer 'mine': update".

    Raises:
        UserCodeError: in place of what the user's code raises.
    """
    try:
        yield
    except (InputError, TrainingError):
        raise
    except Exception as error:
        if options.is_refusal(error):
            raise
        theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)]
        if not theirs and not isinstance(error, SyntaxError):
            raise
        raise UserCodeError(f"{what} raised {_described(error)}", "".join(traceback.format_list(theirs))) from error


def _is_theirs(file: str) -> bool:
    installed = any(f"/{folder}/" in file for folder in _INSTALLED)
    return not file.startswith(_NOT_THEIRS) and (installed or not file.startswith(_STANDARD))


def _described(error: Exception) -> str:
    # JAX explains its errors over many lines.
    text = str(error).partition("\n")[0]
    described = f"{type(error).__name__}: {one_line(text)}" if text else type(error).__name__
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        described += " (it is traced: jnp.where or jax.lax.cond in place of a branch on values, jnp in place of np)"
    return described
