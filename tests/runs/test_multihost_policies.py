"""Two processes with policies that look at the whole pool, at a target set and at gradients: what one does."""

import numpy as np
import pytest

from tests.helpers import embedding_model, tiny_chat
from tests.runs.test_multihost import Hosts, assert_same_run

_RECIPE = """
from pathlib import Path
from tests.helpers import tiny

MODEL = {model!r}

def get_config():
    return tiny.config(Path({root!r}), "{policies}", train_step=6, warmup_step=2, update_step=2, {fields})
"""
_POLICIES = {
    "doge,selector=delta_loss,weighter=adapt": "weighter__refresh_interval=2",
    "odm,selector=greats,weighter=loss": "selector__target_rows=3",
    "odm,selector=several,plugins=tests.helpers.several": "",
    "odm,selector=less,order=sorting,weighter=joint_update_aware": "selector__proj_dim=16, order__scores='selector'",
    "odm,selector=near": "selector__embedding_model=MODEL",
}


@pytest.mark.slow
@pytest.mark.parametrize("policies", _POLICIES)
def test_two_processes_decide_what_one_does(tmp_path, policies):
    hosts = Hosts(tmp_path)
    model = embedding_model.write(tmp_path / "model")
    recipe = _RECIPE.format(root=str(hosts.root), model=str(model), policies=policies, fields=_POLICIES[policies])
    hosts.recipe.write_text(recipe)
    for count in (1, 2):
        hosts.run_all(hosts=count, devices=2, workdir=tmp_path / f"by-{count}")
    assert_same_run(tmp_path / "by-2", tmp_path / "by-1")
    ours, expected = (tiny_chat.selections(tmp_path / f"by-{n}") for n in (2, 1))
    assert ours.keys() == expected.keys() == (set() if "greats" in policies else {2, 4})
    for step, arrays in expected.items():
        np.testing.assert_array_equal(ours[step]["ids"], arrays["ids"])
        np.testing.assert_allclose(ours[step]["all_scores"], arrays["all_scores"], rtol=1e-4, atol=1e-5)


_CHAT_RECIPE = """
from pathlib import Path
from tests.helpers import tiny_chat

def get_config():
    return tiny_chat.config(
        Path({root!r}), selector="nice", train_step=3, selector__max_new_tokens=6, targets__group_rows=2,
        selector__reward="tests.helpers.rewards:letters", data__batch_size=4,
    )
"""


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path):
    hosts = Hosts(tmp_path)
    root = tiny_chat.write_questions(tmp_path / "questions")
    hosts.recipe.write_text(_CHAT_RECIPE.format(root=str(root)))
    for count in (1, 2):
        hosts.run_all(hosts=count, devices=2, workdir=tmp_path / f"by-{count}")
    assert_same_run(tmp_path / "by-2", tmp_path / "by-1")
    ours, expected = (tiny_chat.selections(tmp_path / f"by-{n}")[1] for n in (2, 1))
    np.testing.assert_array_equal(ours["ids"], expected["ids"])
    np.testing.assert_allclose(ours["all_scores"], expected["all_scores"], atol=1e-5)
