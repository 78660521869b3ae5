"""The picture of a swarm."""

import numpy as np

from dataflex_jax.reporting.mixture_plot import Predictions, mixture_figure


def figure(metrics):
    random = np.random.default_rng(0)
    made = {
        f"_$m$ {n}": Predictions(random.normal(size=9), random.normal(size=9), 0.5, random.normal(size=3))
        for n in range(metrics)
    }
    return made, mixture_figure(
        made, ["$a", "_b", "c"], {"prior": np.full(3, 1 / 3), "proposal": np.array([0.5, 0.5, 0])}
    )


def test_it_has_every_run_domain_and_mixture():
    metrics, drawn = figure(2)
    runs, mixtures, sensitivity = drawn.axes
    for line, each in zip(runs.get_lines(), metrics.values(), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), each.measured)
        np.testing.assert_array_equal(line.get_ydata(), each.predicted)
    widths = [bar.get_width() for bar in mixtures.patches]
    np.testing.assert_allclose(widths, [1 / 3, 1 / 3, 1 / 3, 0.5, 0.5, 0])
    for ax in (mixtures, sensitivity):
        assert [text.get_text() for text in ax.get_yticklabels()] == ["$a", "_b", "c"]
    mean = np.mean([each.sensitivity for each in metrics.values()], axis=0) / 100
    np.testing.assert_allclose(sensitivity.get_lines()[2].get_xdata(), mean)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["_$m$ 0, R² 0.50", "_$m$ 1, R² 0.50"]
    drawn.canvas.draw()


def test_many_metrics_have_no_legend():
    _, drawn = figure(11)
    assert drawn.legends == []
    drawn.canvas.draw()
