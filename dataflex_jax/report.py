"""One self-contained HTML page that shows one run, or compares several.

    python -m dataflex_jax.report RUN_DIR [RUN_DIR ...] --output=report.html

Each RUN_DIR is the folder of a training run, finished or not.
"""

from absl import flags

from dataflex_jax import cli
from dataflex_jax.files import expanded
from dataflex_jax.reporting.page import write_report


def define_flags() -> None:
    """The command's flags."""
    cli.define_path("output", "report.html", "The page to write.")


def main(argv: list[str]) -> None:
    """The command; `argv[1:]` are the run folders."""
    print(write_report([expanded(folder) for folder in argv[1:]], flags.FLAGS.output))


if __name__ == "__main__":
    cli.run(main, define_flags)
