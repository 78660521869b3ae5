"""The faults that a run reports in one line instead of a traceback."""

import errno


class InputError(Exception):
    """A bad configuration or input: the commands print this one line and exit with code 2.

    The message names the culprit (file and line, record field or option) and what would be accepted.
    """


class TrainingError(Exception):
    """A run that cannot go on (a non-finite loss, a full disk): one line naming what is safe, exit code 1."""


def is_disk_full(error: OSError) -> bool:
    """Whether there was no room to write: a full disk, a quota, a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
