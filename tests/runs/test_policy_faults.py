"""What policies that weight the loss cannot work with: one clear line each, and exit code 2."""

import json
import shutil

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import policy_runs, tiny
from tests.helpers.command import Starter, Trainer, the_error


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=1)


def refused(root, folder, mixer=None, weighter=None, **fields):
    """The line that refuses the run."""
    with pytest.raises(InputError) as caught:
        train_and_evaluate(policy_runs.config(root, mixer, weighter, **fields), folder / "run")
    assert "\n" not in str(caught.value)
    assert not (folder / "run" / "metrics.jsonl").exists()
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [("mixer", "doremi"), ("weighter", "rho1")])
def test_a_reference_must_be_a_run(root, tmp_path, kind, name):
    message = refused(root, tmp_path, **{kind: name})
    assert message == f"config.{kind}.reference = None: must be a run folder or a Hugging Face model"
    for path in (tmp_path / "nowhere", root):
        message = refused(root, tmp_path, **{kind: name}, **{f"{kind}__reference": str(path)})
        assert message.startswith(f"config.{kind}.reference = {str(path)!r}: neither a run folder")
    message = refused(root, tmp_path, **{kind: name}, **{f"{kind}__reference_losses": "guessed"})
    assert message == f"config.{kind}.reference_losses = 'guessed': must be one of model, cached"


def test_a_reference_must_share_tokenizer_and_domains(root, reference, tmp_path):
    fields = {"mixer": "doremi", "mixer__reference": str(reference)}
    message = refused(root, tmp_path, **fields, data__tokenizer="train:300")
    assert message.startswith(
        f"config.mixer.reference = {str(reference)!r}: trained with another tokenizer; both need the same"
    )
    assert f"--config.data.tokenizer={reference / 'tokenizer'}" in message
    message = refused(root, tmp_path, **fields, data__domains=("digits", "vowels"))
    assert "trained on the domains ['code', 'digits', 'vowels'], not on ['digits', 'vowels']" in message


def test_two_policies_cannot_have_two_references(root, reference, tmp_path):
    other = shutil.copytree(reference, tmp_path / "other")
    fields = {"mixer__reference": str(reference), "weighter__reference": str(other)}
    message = refused(root, tmp_path, "doremi", "rho1", **fields)
    assert "config: the policies want different reference models" in message
    assert str(reference) in message
    assert str(other) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); a JSON file is expected"),
        ("digits: 1", "not valid JSON"),
        ("[1, 2, 3]", "a JSON list; one object is expected"),
        ({"digits": 1, "vowels": 1}, "domains: no code (the domains of this run are code, digits, vowels)"),
        ({"digits": 1, "vowels": 1, "code": 1, "book": 1}, "domains: unexpected book (the"),
        ({"digits": 1, "vowels": 1, "books": 1}, "domains: no code; unexpected books (the"),
        ({"digits": 1, "vowels": 1, "code": "much"}, "domains.code = 'much': must be a number >= 0"),
        ({"digits": 1, "vowels": 1, "code": -1}, "every entry must be a finite number >= 0"),
    ],
)
def test_a_weights_file_must_fit_the_domains(root, tmp_path, content, message):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps({"domains": content}))
    found = refused(root, tmp_path, "static", mixer__proportions=str(path))
    assert found.startswith(f"{path}: ")
    assert message in found


@pytest.mark.parametrize("name", ["adapt", "joint_update_aware"])
def test_a_target_set_must_have_rows(root, tmp_path, name):
    message = refused(root, tmp_path, weighter=name, data__valid_fraction=0.0)
    assert message.startswith("config.targets: group 'code' has no rows (raise config.data.valid_fraction or name")


def test_the_command_ends_with_code_2(tmp_path):
    trainer = Trainer(tmp_path)
    starter = Starter(trainer)
    cases = {
        "weighter=lost": "unknown weighter 'lost'; known: adapt, ",
        "weighter=loss+loss": "weighter=loss+loss: 'loss' twice; once is enough",
        "weighter=rho1": "config.weighter.reference = None: must be a run folder or a Hugging Face model",
        "mixer=doremi": "config.mixer.reference = None: must be a run folder or a Hugging Face model",
        "weighter=loss+rho1": "config.weighter.rho1.reference = None: must be a run folder or a Hugging Face model",
    }
    try:
        for variant, message in cases.items():
            result = starter.run(workdir=tmp_path / "run", config=f"configs/base.py:{variant}")
            assert result.returncode == 2
            assert message in the_error(result)
    finally:
        starter.close()


@pytest.mark.slow
def test_stopped_while_reference_losses_are_computed_it_goes_on_with_them(tmp_path):
    trainer = Trainer(tmp_path)
    reference = policy_runs.train(tmp_path / "reference", trainer.root, train_step=1)
    options = {"workdir": tmp_path / "run", "config": f"{trainer.recipe}:doremi"}
    arguments = (f"--config.mixer.reference={reference}", "--config.mixer.reference_losses=cached")
    arguments += ("--config.train_step=2", f"--config.data.cache_dir={tmp_path / 'losses'}")
    first_store = r"^open \S*/reference_losses/\S*/scales\.float32"
    result = trainer.run(*arguments, **options, SIGNAL="SIGTERM", SIGNAL_AT=first_store)
    assert result.returncode == 0, result.stderr
    assert "Stopped on request before the first step" in result.stdout
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "losses" / "reference_losses").rglob("progress.json"))
    trainer.done(*arguments, **options)
    assert len(list((tmp_path / "losses" / "reference_losses").rglob("progress.json"))) == 3
