"""What a folder knows of its models."""

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.mapped.book import Book
from dataflex_jax.mapped.members import Member

ONE, OTHER = Member("one", 1), Member("other", 1, proportions=np.array([0.25, 0.75]), rows=np.arange(3))
RUN = {"config.train_step": 3, "config.data.domains": ("a", "b"), "the rows of domain 'a'": "0"}


@pytest.fixture
def path(tmp_path):
    book = Book(tmp_path / "models.json", RUN, ["group"])
    book.add([ONE], np.array([[0.5]]))
    return tmp_path / "models.json"


def test_models_are_known_by_what_they_are_not_by_their_names(path):
    book = Book(path, RUN, ["group"])
    renamed = ONE._replace(name="renamed")
    assert book.missing([OTHER, renamed]) == [OTHER]
    assert [book.has([member.identity()]) for member in (renamed, OTHER)] == [True, False]
    book.add([OTHER], np.array([[0.1 + 0.2]]))
    assert Book(path, RUN, ["group"]).losses([OTHER, ONE]).tolist() == [[0.1 + 0.2], [0.5]]
    for changed in (OTHER._replace(seed=2), OTHER._replace(rows=np.arange(4)), OTHER._replace(proportions=None)):
        assert book.missing([changed]) == [changed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.train_step": 4}, "with config.train_step = 3, not 4; choose another folder"),
        ({"the rows of domain 'a'": "1"}, "with the rows of domain 'a' = '0', not '1'; choose another folder"),
        ({"the rows of domain 'b'": "1"}, "with the rows of domain 'b' = None, not '1'; choose another folder"),
    ],
)
def test_what_differs_is_named(path, change, message):
    with pytest.raises(InputError, match=message):
        Book(path, RUN | change, ["group"])


def test_a_field_that_another_version_lacks_is_no_difference(path):
    assert Book(path, RUN | {"config.new": 1}, ["group"]).missing([ONE]) == []


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "models.json").write_text("[1]")
    with pytest.raises(InputError, match=r"models\.json: not the file of trained models; choose another folder"):
        Book(tmp_path / "models.json", RUN, ["group"])
