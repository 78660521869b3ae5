"""The picture of linear datamodeling scores."""

import numpy as np

from dataflex_jax.reporting.lds_plot import Scored, lds_figure


def test_it_has_every_file_random_scores_and_what_the_best_foretold():
    random = np.random.default_rng(0)
    losses = random.normal(size=(9, 2))
    files = {f"_$a$ {n}": Scored((n / 10, n / 10 - 0.1, n / 10 + 0.1), -losses * n) for n in range(1, 6)}
    figure = lds_figure(files, (0.0, -0.3, 0.3), losses, ["algebra", "law"])
    intervals, *scatters = figure.axes
    assert [text.get_text() for text in intervals.get_yticklabels()] == [*files, "random"]
    assert [ax.get_title(loc="left") for ax in scatters] == ["_$a$ 5: 0.50", "_$a$ 4: 0.40", "_$a$ 3: 0.30"]
    for ax in scatters:
        for line in ax.get_lines():
            np.testing.assert_allclose(line.get_xdata(), line.get_ydata())
    figure.canvas.draw()
