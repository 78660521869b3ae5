"""YAML files in the place of recipes: `--config=FILE.yaml[:devices=N,...]`."""

import functools
import logging
import tempfile
from pathlib import Path

from dataflex_jax.errors import InputError
from dataflex_jax.moving.conversion import converted

logger = logging.getLogger(__name__)

ENDINGS = (".yaml", ".yml")


def recipe_of(path: Path, variant: str) -> str:
    """Converts a file and says what is not as there; returns the recipe's path with the rest of the variant.

    Args:
        path: of the YAML file.
        variant: "devices=N", if it says how many there were, and what the recipe takes, such as "weighter=loss".

    Raises:
        InputError: the file cannot be converted.
    """
    parts = [part for part in variant.split(",") if part]
    counts = [part.partition("=")[2] for part in parts if part.startswith("devices=")]
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise InputError(f"--config={path}:{variant}: devices=N is a number of devices, 1 or more")
    recipe = converted(path, devices=int(counts[-1]) if counts else None)
    said = [note for note in recipe.notes if note.matters]
    for note in said:
        logger.warning("%s", note)
    if others := len(recipe.notes) - len(said):
        logger.info("%s: %d fields change nothing; python -m dataflex_jax.convert lists them.", path, others)
    # Each in a folder of its own: Python would take one of the same second and length for what it has compiled before.
    target = Path(tempfile.mkdtemp(dir=_folder().name)) / f"{path.stem}.py"
    target.write_text(recipe.text, encoding="utf-8")
    rest = ",".join(part for part in parts if not part.startswith("devices="))
    return f"{target}:{rest}" if rest else str(target)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the recipes are kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="dataflex_jax-")
