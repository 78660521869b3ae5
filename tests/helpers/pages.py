"""The code and the commands of a page of docs/, as a user would copy them."""

import re
import shlex
from pathlib import Path

from tests.helpers.command import PROJECT, Trainer, in_forks


def code(page: str) -> list[str]:
    """The blocks of Python of docs/`page`."""
    return re.findall(r"```python\n(.*?)```", _text(page), re.DOTALL)


def trained(page: str, folder: Path, *overrides: str) -> list[Path]:
    """Runs each training command of docs/`page`.

    Args:
        page: its name.
        folder: where they run; has the page's code.
        overrides: what makes the runs short, after the page's arguments.

    Returns:
        The run folders, in the page's order.
    """
    commands = re.findall(r"^ +python -m (\S+\.train) (.*)$", _text(page).replace("\\\n", ""), re.MULTILINE)
    runs = [folder / f"run_{number}" for number in range(len(commands))]
    calls = [
        (module, *shlex.split(arguments), *overrides, f"--config.data.cache_dir={folder / 'cache'}", f"--workdir={run}")
        for (module, arguments), run in zip(commands, runs, strict=True)
    ]
    for done in in_forks(Trainer(folder), folder, calls):
        assert done.returncode == 0, done.stderr
    return runs


def _text(page: str) -> str:
    return (PROJECT / "docs" / page).read_text(encoding="utf-8")
