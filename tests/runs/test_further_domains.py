"""A domain that is added to a run, and one that is set to proportion 0: what of the others is drawn then."""

import logging

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.window import Sequences
from tests.helpers import policy_runs, tiny, tiny_chat

FEWER, ALL = ("digits", "vowels"), ("code", "digits", "vowels")


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """[(domain, row in it) of each step], and the lines of the log, of a run that was started twice."""
    folder = tmp_path_factory.mktemp("run")
    root = tiny.write_domains(folder / "domains", characters=400)
    steps, heard = [], Heard()
    logger = logging.getLogger("dataflex_jax.training.resume")
    logger.addHandler(heard)
    starts = ((FEWER, None, 6), (ALL, (0.5, 0.5, 0.0), 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "level", logging.INFO)
        for domains, proportions, train_step in starts:
            fields = {"data__domains": domains, "data__proportions": proportions, "train_step": train_step}
            config = policy_runs.config(root, "odm", **fields)
            run = tiny_chat.trained(config, folder / "run", patch)
            pool = Pool(open_domains(config.data, progress=False)[0])
            for ids in run.rows:
                numbers = pool.domain_of(ids)
                steps.append([(domains[k], int(i - pool.offsets[k])) for k, i in zip(numbers, ids, strict=True)])
    logger.removeHandler(heard)
    return steps, heard.lines, pool, config, folder / "run"


@pytest.mark.parametrize("number", range(3))
def test_no_row_of_a_domain_is_lost_or_repeated(history, number):
    steps, _, pool, config, _ = history
    drawn = [row for rows in steps for name, row in rows if name == ALL[number]]
    group = pool.groups(by_domain=True)[number]
    sequences = Sequences(pool.groups(by_domain=True), config.seed)
    coming = [sequences.id(number, position) - group.start for position in range(len(drawn))]
    assert sorted(drawn) == sorted(coming)
    assert len(drawn) > group.size / 2  # or the test says little


def test_the_new_domain_is_drawn_from_the_step_on_that_the_log_names(history):
    steps, lines, _, _, folder = history
    assert ["code" in dict(rows) for rows in steps] == [False] * 6 + [True] * 6
    share = tiny.records(folder, "policy.jsonl")[6]["observed"]["drawn_with"]["code"]
    assert [line for line in lines if "new" in line] == [
        f"Domain 'code' is new: {share:.4g} of the rows from step 7 on."
    ]


def test_the_domain_at_proportion_0_is_drawn_no_more(history):
    steps, _, _, _, folder = history
    assert ["vowels" in dict(rows) for rows in steps] == [True] * 6 + [False] * 6
    for line in tiny.records(folder, "policy.jsonl")[6:]:
        assert line["sampling_weights"]["vowels"] == line["observed"]["domain_rows"]["vowels"] == 0
        assert line["observed"]["drawn_with"]["vowels"] == 0
        np.testing.assert_allclose(sum(line["sampling_weights"].values()), 1, rtol=1e-6)
