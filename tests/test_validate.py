"""`python -m dataflex_jax.validate`: what it writes, that it goes on, and what it refuses."""

import json

import numpy as np
import pytest

from dataflex_jax import validate
from dataflex_jax.errors import InputError
from dataflex_jax.mapped import models
from dataflex_jax.validation.study import named
from tests.helpers import tiny_chat
from tests.helpers.command_line import parsed

CANDIDATES = 67
_RECIPE = """
from pathlib import Path
from tests.helpers import tiny_chat

def get_config(kind="less"):
    config = tiny_chat.config(Path({root!r}), selector="less", train_step=3, mixer=None if kind == "less" else kind)
    config.model.num_hidden_layers = 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe, files of scores, and the output of one study of two of them."""
    folder = tmp_path_factory.mktemp("validate")
    root = tiny_chat.write_questions(folder / "questions")
    (folder / "recipe.py").write_text(_RECIPE.format(root=str(root)))
    random = np.random.default_rng(0)
    np.savez(folder / "less.npz", all_scores=random.normal(size=CANDIDATES))
    table = random.normal(size=(CANDIDATES, 2)).tolist()
    (folder / "mine.csv").write_text("digits,capitals\n" + "".join(f"{a},{b}\n" for a, b in table))
    return folder


def run(folder, *arguments, scores=("less.npz", "mine.csv"), recipe="recipe.py", output="out"):
    given = [f"--scores={folder / name}" for name in scores]
    given += [f"--config={folder / recipe}", f"--output={folder / output}", "--subsets=8", *arguments]
    with parsed(*given, command=validate):
        validate.main(["validate"])


@pytest.fixture(scope="module")
def written(folder):
    """The folder after a study."""
    run(folder)
    return folder / "out"


def test_it_writes_the_figures_a_picture_and_the_models_losses(written, capsys):
    found = json.loads((written / "lds.json").read_text())
    assert (found["subsets"], found["candidates"], found["rows_of_a_subset"]) == (8, CANDIDATES, round(CANDIDATES / 2))
    assert list(found["scores"]) == ["less", "mine"]
    for figures in (*found["scores"].values(), found["random"]):
        assert figures["interval"][0] <= figures["lds"] <= figures["interval"][1]
    assert list(found["scores"]["mine"]["groups"]) == ["capitals", "digits"]
    arrays = np.load(written / "subsets.npz")
    assert arrays["rows"].shape == (8, 34)
    assert arrays["groups"].tolist() == ["capitals", "digits"]
    np.testing.assert_array_equal(arrays["losses"].T, [found["losses"][group] for group in arrays["groups"]])
    assert (written / "lds.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_are_there_for_other_scores(folder, written, capsys, monkeypatch):
    monkeypatch.delattr(models, "train")  # nothing is trained
    before = (written / "subsets.npz").read_bytes()
    np.save(folder / "other.npy", np.arange(CANDIDATES))
    run(folder, scores=["other.npy"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["scores", "other", "random"]
    assert lines[0].split()[-2:] == ["capitals", "digits"]
    assert lines[-1] == f"8 subsets. Written to {written / 'lds.json'}, lds.png and subsets.npz."
    assert (written / "subsets.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("--subsets=7",), {}, r"^--subsets=7: too few for a correlation; 8 or more are needed"),
        (("--alpha=1",), {}, r"^--alpha=1.0: makes subsets of 67 of the 67 candidates; some, and not all, are needed"),
        (("--alpha=0",), {}, r"^--alpha=0.0: makes subsets of 0 of the 67"),
        ((), {"scores": []}, r"^--scores is missing: an .npz of `select`"),
        ((), {"scores": ["less.npz", "less.npz"]}, r"^--scores=.*less.npz: is given twice"),
        (
            ("--config.data.valid_fraction=0.3",),
            {"scores": ["mine.csv"]},
            "mine.csv: 67 lines of scores; the pool has ",
        ),
        (("--config.data.packing=True",), {}, r"^config.data.packing = True: scores are of single examples"),
        (("--config.train_step=4",), {}, r"models.json: its models were trained with config.train_step = 3, not 4"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, written, arguments, options, message):
    with pytest.raises(InputError, match=message) as raised:
        run(folder, *arguments, **options)
    assert "\n" not in str(raised.value)


def test_files_have_short_names_where_these_differ(tmp_path):
    one, other, third = tmp_path / "a" / "less.npz", tmp_path / "b" / "less.npz", tmp_path / "c.npy"
    assert named([one, other, third]) == {str(one): one, str(other): other, "c": third}
