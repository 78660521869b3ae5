"""The faults that a run reports in one line instead of a traceback."""

import errno
import re
from typing import Any


class InputError(Exception):
    """A bad configuration or input: the commands print this one line and exit with code 2.

    The message names the culprit (file and line, record field or option) and what would be accepted.

    Args:
        reason: what is wrong, in one line, or an error that says so; it names the culprit where no option is at fault.
        option: the option at fault: "data.root" of `config.data.root`, "--checkpoint" of that flag; None: none is.
        value: what the option is set to; left out where that says nothing.
    """

    def __init__(self, reason: str | Exception, *, option: str | None = None, value: Any = ...):
        super().__init__(reason)
        self.reason, self.option, self.value = str(reason), option, value

    def __str__(self) -> str:
        if self.option is None:
            return self.reason
        flag = self.option.startswith("--")
        name = self.option if flag else f"config.{self.option}"
        if self.value is not ...:
            name += f"={self.value}" if flag else f" = {shown(self.value)}"
        return f"{name}: {self.reason}"

    def renamed(self, option: str) -> "InputError":
        """The same fault of an option that is called otherwise."""
        return InputError(self.reason, option=option, value=self.value)


class TrainingError(Exception):
    """A run that cannot go on (a non-finite loss, a full disk): one line naming what is safe, exit code 1."""


def is_disk_full(error: OSError) -> bool:
    """Whether there was no room to write: a full disk, a quota, a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or, as JAX says it, a device had too little memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)) is not None


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on one line, shortened to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: Any, limit: int = 200) -> str:
    """A value as messages show it: its `repr` on one line, shortened to `limit` characters."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= limit else text[: limit - 3] + "..."
