"""The reference model out of a checkpoint of either kind."""

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.imports import imported
from tests.helpers import policy_runs, tiny
from tests.helpers.command import assert_same_curves


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    return policy_runs.train(tmp_path_factory.mktemp("reference") / "run", root, train_step=4)


@pytest.fixture(scope="module")
def exported(reference):
    export_checkpoint(str(reference), reference.parent / "hf")
    return reference.parent / "hf"


def proxy(folder, root, reference, **fields):
    fields = {"mixer__reference": str(reference), "data__tokenizer": str(reference), "train_step": 3} | fields
    return policy_runs.train(folder, root, "doremi", **fields)


@pytest.mark.parametrize("losses", ["model", "cached"])
def test_an_exported_reference_is_the_run(root, reference, exported, tmp_path, losses):
    for name, source in (("run", reference), ("hf", exported)):
        proxy(tmp_path / name, root, source, mixer__reference_losses=losses)
    assert_same_curves(tmp_path / "hf", tmp_path / "run")
    observed = tiny.records(tmp_path / "hf", "policy.jsonl")[0]["observed"]
    assert any(value is not None for value in observed["excess"].values())


def test_an_exported_reference_says_nothing_of_domains(root, reference, exported, tmp_path):
    fields = {"data__domains": ("digits", "vowels")}
    with pytest.raises(
        InputError, match=r"^config.mixer.reference = .*: trained on the domains \['code', .* not on \['digits', 'v"
    ):
        proxy(tmp_path / "run", root, reference, **fields)
    assert proxy(tmp_path / "hf", root, exported, **fields)


def test_an_imported_run_is_a_reference_before_it_is_trained(root, reference, exported, tmp_path):
    fields = {"model__name_or_path": str(exported), "model__from_scratch": False, "data__tokenizer": str(exported)}
    imported(policy_runs.config(root, **fields), tmp_path / "imported")
    for name, source in (("run", reference), ("import", tmp_path / "imported")):
        proxy(tmp_path / name, root, source)
    assert_same_curves(tmp_path / "import", tmp_path / "run")


def test_a_reference_that_is_none_is_named_once(root, reference, tmp_path):
    for path, reason in (("/no/such", "neither a run folder"), ("no/such", "no such folder, and not to be had from")):
        with pytest.raises(InputError) as e:
            proxy(tmp_path / "none", root, reference, mixer__reference=path)
        assert str(e.value).startswith(f"config.mixer.reference = {path!r}: {reason}")
        assert "\n" not in str(e.value)


def test_another_tokenizer_is_refused(root, exported, tmp_path):
    with pytest.raises(
        InputError, match=rf"^config.mixer.reference = '{exported}': trained with another tokenizer; .*={exported}$"
    ):
        proxy(tmp_path, root, exported, data__tokenizer="train:300")
