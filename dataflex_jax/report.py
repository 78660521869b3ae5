"""One self-contained HTML page that shows one run, or compares several.

python -m dataflex_jax.report RUN_DIR [RUN_DIR ...] --output=report.html
"""

from absl import flags

from dataflex_jax.cli import run
from dataflex_jax.reporting.page import write_report


def main(argv: list[str]) -> int:
    """Writes the page for the run folders in `argv[1:]` to `--output`."""
    print(write_report(argv[1:], flags.FLAGS.output))
    return 0


if __name__ == "__main__":
    # Not on import: other commands have an --output of their own, and absl holds all flags in one place.
    flags.DEFINE_string("output", "report.html", "The page to write.")
    run(main)
