"""A table as LaTeX and Markdown."""

from dataflex_jax.reporting.table import Cell, Table, to_latex, to_markdown

TABLE = Table(
    "Results of a & b",
    ["runs", "nll"],
    [
        ("static_1", [Cell("3"), Cell("2.31 ± 0.02")]),
        ("50 % | {x}", [Cell("—"), Cell("-0.5 [-1.0, 0.1]", best=True)]),
        ("all\n#1", [Cell("a-1\\~^$"), Cell("<0>", worse=True)]),
    ],
    "group",
    spans=[("", 1), ("held out", 1)],
    last=1,
    notes=["Mind 5 %."],
)


def test_latex_is_escaped_and_set_with_or_without_booktabs():
    assert to_latex(TABLE) == (
        "% Results of a & b\n"
        "% Mind 5 %.\n"
        "\\providecommand{\\toprule}{\\hline}\n"
        "\\providecommand{\\midrule}{\\hline}\n"
        "\\providecommand{\\bottomrule}{\\hline}\n"
        "\\begin{tabular}{lrr}\n"
        "\\toprule\n"
        " & \\multicolumn{1}{c}{} & \\multicolumn{1}{c}{held out} \\\\\n"
        "group & runs & nll \\\\\n"
        "\\midrule\n"
        "static\\_1 & 3 & 2.31 $\\pm$ 0.02 \\\\\n"
        "50 \\% | \\{x\\} & --- & \\textbf{$-$0.5 [$-$1.0, 0.1]} \\\\\n"
        "\\midrule\n"
        "all \\#1 & a-1\\textbackslash{}\\textasciitilde{}\\textasciicircum{}\\$ & \\textless{}0\\textgreater{} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_markdown_has_one_line_a_row_whatever_the_texts():
    assert to_markdown(TABLE) == (
        "### Results of a & b\n"
        "\n"
        "| group | runs | held out nll |\n"
        "| --- | ---: | ---: |\n"
        "| static\\_1 | 3 | 2.31 ± 0.02 |\n"
        "| 50 % \\| {x} | — | **-0.5 \\[-1.0, 0.1\\]** |\n"
        "| all #1 | a-1\\\\~^$ | \\<0\\> |\n"
        "\n"
        "Mind 5 %.\n"
    )


def test_texts_are_columns_that_are_wrapped_and_no_character_ends_the_paper():
    table = Table("Texts", ["text"], [("1", [Cell("a\x00\x1b[31mb\u2028c")])], words=True)
    assert "\\begin{tabular}{lp{" in to_latex(table)
    assert "1 & a[31mb c \\\\" in to_latex(table)
    assert "| 1 | a\\[31mb c |" in to_markdown(table)


def test_spans_begin_at_their_edges():
    assert TABLE.edges == {0, 1}
    assert Table("", ["a"], []).edges == set()
