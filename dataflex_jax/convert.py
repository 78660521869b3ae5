"""Makes a recipe of a YAML file of LLaMA-Factory or DataFlex.

    python -m dataflex_jax.convert FILE.yaml [--output=recipe.py] [--devices=N]

What has no counterpart is listed field by field; what would give other results is refused. A batch
has rows of every device, so say how many there were. The recipe is then trained with

    python -m dataflex_jax.train --config=recipe.py

--config=FILE.yaml[:devices=N] does both at once, of every command that takes a recipe.
"""

from pathlib import Path

from absl import flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file, unwritable
from dataflex_jax.moving.conversion import converted


def define_flags() -> None:
    """The command's flags."""
    cli.define_path("output", None, "The recipe; by default FILE.py in the working directory.")
    flags.DEFINE_integer("devices", None, "On how many devices the file was used; by default what it says, or 1.", 1)


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) != 2:
        raise InputError("give one file: python -m dataflex_jax.convert FILE.yaml")
    source = Path(argv[1])
    output = Path(flags.FLAGS.output or f"{source.stem}.py")
    recipe = converted(source, str(output), flags.FLAGS.devices)
    if output.is_file() and output.read_bytes() != recipe.text.encode():
        raise InputError("exists already; remove it, or choose another", option="--output", value=output)
    if fault := unwritable(output):
        raise InputError(f"cannot be written ({fault}); choose another file", option="--output", value=output)
    replace_file(output, recipe.text.encode())
    for title, matters in (("Not as there:", True), ("Without effect here:", False)):
        lines = [f"  {note}" for note in recipe.notes if note.matters is matters]
        print("\n".join([title, *lines, ""]) if lines else "", end="")
    print(f"Written to {output}; python -m dataflex_jax.train --config={output} runs it.")


if __name__ == "__main__":
    cli.run(main, define_flags)
