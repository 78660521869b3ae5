"""The target set: where its rows come from, their groups, and what is refused."""

import json

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.targets import held_out, open_targets
from dataflex_jax.errors import InputError
from tests.helpers import tiny, tiny_chat


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


def targets_of(config):
    domains, _ = open_domains(config.data, progress=False)
    return open_targets(config, domains, config.data.tokenizer), domains


def write(folder, **records):
    folder.mkdir(exist_ok=True)
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def question(i, **more):
    return {"instruction": f"{i}?", "output": f"{i}.", **more}


def test_without_a_source_the_held_out_rows_are_it_a_group_a_domain(root):
    targets, domains = targets_of(tiny_chat.config(root))
    assert targets.names == ("capitals", "digits")
    assert np.bincount(targets.groups).tolist() == [domain.valid.num_rows for domain in domains]
    np.testing.assert_array_equal(targets.groups, targets.pool.domain_of(targets.ids))
    border = domains[0].valid.num_rows
    np.testing.assert_array_equal(targets.pool.row(border).tokens, domains[1].valid.row(0).tokens)


def test_a_field_may_name_the_groups(root):
    targets, domains = targets_of(tiny_chat.config(root, targets__group_field="kind"))
    kinds = [kind for domain in domains for kind in domain.store.values("valid", "kind")]
    assert set(targets.names) == {"a", "b"}
    assert [targets.names[group] for group in targets.groups] == kinds


def test_groups_may_be_cut(root):
    config = tiny_chat.config(root, targets__group_field="kind", targets__group_rows=2)
    targets, domains = targets_of(config)
    kinds = [kind for domain in domains for kind in domain.store.values("valid", "kind")]
    expected = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    assert targets.ids.tolist() == expected
    assert sorted(np.bincount(targets.groups)) == [2, 2]
    assert [targets.names[group] for group in targets.groups] == [kinds[i] for i in expected]


def test_another_source_is_taken_whole_and_tokenised_like_the_pool(root, tmp_path):
    folder = write(tmp_path / "targets", exam=[question(i, subject="xyz"[i % 3]) for i in range(12)])
    source = {"targets__source": "local", "targets__root": str(folder), "targets__formatting": "alpaca"}
    targets, domains = targets_of(tiny_chat.config(root, **source, targets__group_field="subject"))
    assert targets.names == ("x", "y", "z")
    assert len(targets.ids) == 12
    assert targets.pool.buckets == domains[0].train.buckets
    first = tiny_chat.config(folder, data__valid_fraction=0.0)
    (same,), _ = open_domains(first.data, progress=False)
    np.testing.assert_array_equal(targets.pool.row(3).tokens, same.train.row(3).tokens)


def test_mmlu_folders_have_a_group_a_subject(root, tmp_path):
    folder = tmp_path / "dev"
    folder.mkdir()
    for subject in ("anatomy", "virology"):
        (folder / f"{subject}_dev.csv").write_text("2+2?,1,2,3,4,D\n3-1?,1,2,3,4,B\n")
    source = {"targets__source": "local", "targets__root": str(folder), "targets__formatting": "mmlu"}
    targets, _ = targets_of(tiny_chat.config(root, **source, data__cutoff_len=400, data__buckets=(400,)))
    assert targets.names == ("anatomy", "virology")
    assert targets.groups.tolist() == [0, 0, 1, 1]


def test_documents_may_be_targets_of_documents(tmp_path):
    pool = tiny.write_domains(tmp_path / "documents", characters=1800, names=("digits", "vowels"))
    other = tiny.write_domains(tmp_path / "other", characters=1000, names=("code",))
    config = tiny_chat.documents(pool, targets__source="local", targets__root=str(other))
    targets, _ = targets_of(config)
    assert targets.names == ("code",)
    assert len(targets.ids) == targets.pool.num_rows > 10
    with pytest.raises(InputError, match=r"config\.targets\.group_field: rows of documents are no records"):
        targets_of(tiny_chat.documents(pool, targets__group_field="kind"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__valid_fraction": 0.0}, "config.targets: group 'capitals' has no rows .raise config.data.valid_fracti"),
        ({"targets__group_field": "subject"}, "config.targets.group_field.* no field 'subject'"),
        (
            {"targets__source": "local", "targets__root": "/no/such", "targets__formatting": "alpaca"},
            r"^config.targets.root = '/no/such': no such file or folder",
        ),
        (
            {"targets__source": "local", "targets__root": "ROOT", "targets__domains": ("maths",)},
            "^config.targets.domains: 'maths' is not in .*; available: capitals, digits$",
        ),
        (
            {"targets__source": "local", "targets__root": "ROOT", "targets__formatting": "sharegpt"},
            "^config.targets: .*/capitals.jsonl:1: no field 'conversations'",
        ),
        ({"targets__source": "local", "targets__root": "ROOT"}, "config.targets.*no field 'text'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(root, options, message):
    options = {name: str(root) if value == "ROOT" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message) as caught:
        targets_of(tiny_chat.config(root, **options))
    assert "\n" not in str(caught.value)


def test_a_group_without_an_example_that_counts_is_refused(root, tmp_path):
    """All its responses are cut off."""
    folder = write(tmp_path / "targets", exam=[question(1)], essays=[question("long " * 30)])
    source = {"targets__source": "local", "targets__root": str(folder), "targets__formatting": "alpaca"}
    with pytest.raises(InputError, match=r"config\.targets.*'essays'") as caught:
        targets_of(tiny_chat.config(root, **source))
    assert "\n" not in str(caught.value)


def test_held_out_rows_are_the_first_of_each_domain(root):
    domains, _ = open_domains(tiny_chat.config(root).data, progress=False)
    found = held_out(domains, 3)
    assert found.names == ("capitals", "digits")
    assert found.groups.tolist() == [0, 0, 0, 1, 1, 1]
    border = domains[0].valid.num_rows
    assert found.ids.tolist() == [0, 1, 2, border, border + 1, border + 2]
    assert np.bincount(held_out(domains, 1000).groups).tolist() == [domain.valid.num_rows for domain in domains]


def test_a_domain_without_held_out_rows_is_refused_where_a_policy_needs_them(root):
    domains, _ = open_domains(tiny_chat.config(root, data__valid_fraction=0.0).data, progress=False)
    with pytest.raises(
        InputError, match=r"config.data.valid_fraction: domain 'capitals' has no held-out rows.*raise it"
    ):
        held_out(domains, 3)
