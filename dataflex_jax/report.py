"""One self-contained HTML page that shows one run, or compares several.

    python -m dataflex_jax.report RUN_DIR [RUN_DIR ...] --output=report.html
        [--group-by=mixer.name]

Each RUN_DIR is the folder of a training run, finished or not. Runs that differ in nothing but the
seed are shown as one group, with its spread and its differences to the first group. Beside the
page, report_files/ has every figure as PNG, PDF and CSV and every table as LaTeX and Markdown.
"""

from pathlib import Path

from absl import flags

from dataflex_jax import cli
from dataflex_jax.files import expanded
from dataflex_jax.reporting.page import write_report


def define_flags() -> None:
    """The command's flags."""
    cli.define_path("output", "report.html", "The page to write; OUTPUT_files/ beside it has figures and tables.")
    flags.DEFINE_list(
        "group-by",
        [],
        "Fields of the configuration, with commas between, such as mixer.name,optim.learning_rate: runs with the same "
        "values are one group. By default those that differ in nothing but the seed.",
    )


def main(argv: list[str]) -> None:
    """The command; `argv[1:]` are the run folders."""
    output = Path(flags.FLAGS.output)
    files = output.with_name(f"{output.stem}_files")
    folders = [expanded(folder) for folder in argv[1:]]
    print(write_report(folders, output, group_by=flags.FLAGS["group-by"].value, files=files))
    print(f"Figures and tables: {files}")


if __name__ == "__main__":
    cli.run(main, define_flags)
