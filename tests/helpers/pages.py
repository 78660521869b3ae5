"""The code and the commands of a page, README.md, one of docs/ or all "recipes", as a user would copy them."""

import re
import shlex
from pathlib import Path

from tests.helpers.command import PROJECT, Trainer, in_forks


def code(page: str) -> list[str]:
    """The blocks of Python of docs/`page`."""
    return re.findall(r"```python\n(.*?)```", _text(page), re.DOTALL)


def write_code(page: str, folder: Path) -> None:
    """Writes the blocks of Python and YAML that begin with the name of their file, "# my_package/mine.py"."""
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", _text(page), re.DOTALL):
        if match := re.match(r"# (\S+\.(?:py|yaml))\n", block):
            path = folder / match[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block, encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """The arguments of each training command of a page without its remarks, options in brackets among them."""
    text = re.sub(r"\[:[^]]*\]", "", _text(page).replace("\\\n", ""))  # variants in brackets
    found = re.findall(r"python -m dataflex_jax\.train ([^`\n]*)", text)
    return [[a.strip("[]") for a in shlex.split(line, comments=True) if a not in ("...", "[...]")] for line in found]


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
    if page == "recipes":
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted((PROJECT / "configs").glob("*.py")))
    folder = PROJECT if page == "README.md" else PROJECT / "docs"
    return (folder / page).read_text(encoding="utf-8")
