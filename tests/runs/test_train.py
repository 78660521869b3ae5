"""Whole runs: what they leave, exact resume, what may change between two starts, and what is refused."""

import collections

import jax
import numpy as np
import pytest

from dataflex_jax.data.rows import DocumentRows
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.errors import InputError
from dataflex_jax.evaluate import evaluate
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import resume, run_config
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import RunStep, locate, open_model
from tests.helpers import tiny

FILES = ("metrics.jsonl", "policy.jsonl", "eval.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    train_and_evaluate(tiny.config(root, eval_every=4), folder)
    return folder


def test_learns_and_leaves_its_records(whole):
    metrics, policy = tiny.records(whole, "metrics.jsonl"), tiny.records(whole, "policy.jsonl")
    assert [line["step"] for line in metrics] == [line["step"] for line in policy] == list(range(1, 13))
    assert metrics[0]["loss"] > 5.4  # ln 257 = 5.55, random weights
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.5
    assert [line["step"] for line in tiny.records(whole, "eval.jsonl")] == [4, 8, 12]
    assert metrics[-1]["tokens_seen"] == 12 * 8 * 32
    rows = sum(line["observed"]["domain_rows"][name] for line in policy for name in tiny.DOMAINS)
    assert rows == 12 * 8


def test_policy_lines_say_what_was_published_and_the_loader_obeyed(whole):
    """Weights of step s are drawn from at s + 1 + lag, and from no other step on."""
    policy = tiny.records(whole, "policy.jsonl")
    published = {line["effective_step"]: line["sampling_weights"] for line in policy if line["published"]}
    assert sorted(published) == [4, 6, 8, 10, 12, 14]
    in_effect = policy[0]["observed"]["drawn_with"]
    for line in policy:
        in_effect = published.get(line["step"], in_effect)
        drawn = line["observed"]["drawn_with"]
        np.testing.assert_allclose([drawn[n] for n in in_effect], [in_effect[n] for n in in_effect], rtol=1e-6)
        for name, share in drawn.items():
            assert abs(line["observed"]["domain_rows"][name] - 8 * share) < 1


def test_the_logged_trajectory_is_the_algorithms(whole):
    """Recomputed from policy.jsonl alone, in NumPy."""
    names = sorted(tiny.DOMAINS)
    reward = np.zeros(3)
    for line in tiny.records(whole, "policy.jsonl"):
        observed = line["observed"]
        for i, name in enumerate(names):
            if observed["domain_rows"][name]:
                reward[i] = 0.9 * reward[i] + 0.1 * np.exp(observed["domain_loss"][name])
        eps = min(1 / 3, np.sqrt(np.log(3) / (3 * line["step"])))
        weights = (1 - 3 * eps) * reward / reward.sum() + eps
        logged = [line["sampling_weights"][name] for name in names]
        np.testing.assert_allclose(logged, weights, atol=1e-6)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(whole, root, tmp_path):
    # The later start repeats what an interrupted run had written after its last checkpoint, so nothing is left of it.
    train_and_evaluate(tiny.config(root, eval_every=4, train_step=6), tmp_path)
    (tmp_path / "policy.jsonl").open("a").write('{"step": 7, "torn')
    train_and_evaluate(tiny.config(root, eval_every=4), tmp_path)
    for name in FILES[:2]:
        assert tiny.records(tmp_path, name) == tiny.records(whole, name)
    # The shorter run was evaluated at its own end, step 6, as well.
    assert [e for e in tiny.records(tmp_path, "eval.jsonl") if e["step"] != 6] == tiny.records(whole, "eval.jsonl")


def test_a_finished_run_is_left_as_it_is(whole, root):
    before = {name: (whole / name).read_bytes() for name in FILES}
    outcome = train_and_evaluate(tiny.config(root, eval_every=4), whole)
    assert outcome.step == 12
    assert {name: (whole / name).read_bytes() for name in FILES} == before


@pytest.mark.slow
def test_gradient_accumulation_changes_rounding_only(whole, root, tmp_path):
    """In the peer, ODM's reward depends on it."""
    train_and_evaluate(
        tiny.config(root, data__grad_accumulation=4, mesh__fsdp=1, mesh__data=2, mesh__tensor=4), tmp_path
    )
    for ours, theirs in zip(tiny.records(tmp_path, "policy.jsonl"), tiny.records(whole, "policy.jsonl"), strict=True):
        assert ours["observed"]["domain_rows"] == theirs["observed"]["domain_rows"]
        for name in tiny.DOMAINS:
            loss, expected = (line["observed"]["domain_loss"][name] for line in (ours, theirs))
            np.testing.assert_allclose(loss, expected, rtol=2e-5)
            np.testing.assert_allclose(ours["state"]["reward"][name], theirs["state"]["reward"][name], rtol=1e-4)


def test_resuming_with_other_proportions_more_steps_and_a_further_domain(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", names=("digits", "vowels"))
    run = tmp_path / "run"
    # A tokenizer trained for the run stays the run's, though a further domain would give another one.
    fields = {"data__tokenizer": "train:300"}
    train_and_evaluate(tiny.config(root, "static", train_step=4, data__proportions=(3.0, 1.0), **fields), run)
    tiny.write_domains(root)
    train_and_evaluate(tiny.config(root, "static", train_step=8, data__proportions=(2.0, 1.0, 1.0), **fields), run)
    policy = tiny.records(run, "policy.jsonl")
    assert policy[3]["observed"]["drawn_with"] == {"digits": 0.75, "vowels": 0.25}
    assert policy[4]["observed"]["drawn_with"] == {"code": 0.5, "digits": 0.25, "vowels": 0.25}
    assert policy[-1]["observed"]["domain_rows"] == {"code": 4, "digits": 2, "vowels": 2}
    epochs = tiny.records(run, "metrics.jsonl")[-1]["domain_epochs"]
    assert epochs["digits"] * 2 > epochs["code"] * 2  # 24 + 8 rows against 16


@pytest.mark.slow
def test_odm_keeps_what_it_learned_when_a_domain_is_added(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", names=("digits", "vowels"))
    run = tmp_path / "run"
    train_and_evaluate(tiny.config(root, train_step=4), run)
    tiny.write_domains(root)
    train_and_evaluate(tiny.config(root, train_step=6), run)
    before, after = tiny.records(run, "policy.jsonl")[3:5]
    for name in ("digits", "vowels"):
        loss, expected = after["observed"]["domain_loss"][name], before["state"]["reward"][name]
        if loss is not None:
            expected = 0.9 * expected + 0.1 * np.exp(loss)
        np.testing.assert_allclose(after["state"]["reward"][name], expected, rtol=1e-5)
    assert after["state"]["count"] == 5


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model__hidden_size", 64, "config.model.hidden_size = 64: the checkpoint was trained with 32"),
        ("seed", 1, "config.seed = 1"),
        ("data__seq_len", 16, "config.data.seq_len = 16"),
        ("mixer", None, "config.mixer.name"),
        ("data__domains", ("digits", "vowels"), "domain 'code' is missing"),
        ("data__valid_fraction", 0.3, "held-out split is not what the checkpoint was trained on"),
    ],
)
def test_resuming_something_else_is_refused_by_name(whole, root, field, value, named):
    before = {name: (whole / name).read_bytes() for name in FILES}
    fields = {} if field == "mixer" else {field: value}
    with pytest.raises(InputError, match=named):
        train_and_evaluate(tiny.config(root, None if field == "mixer" else "odm", **fields), whole)
    assert {name: (whole / name).read_bytes() for name in FILES} == before


def test_a_checkpoint_evaluates_as_the_run_did(whole):
    config, path = run_config.read(whole), whole / "checkpoints" / "8"
    (record,) = evaluate(open_model(path, make_mesh(config.mesh)), config)
    assert {"step": 8, **record} == tiny.records(whole, "eval.jsonl")[1]
    assert (locate(path), locate(whole)) == (RunStep(whole, 8), RunStep(whole, 12))
    for path in (whole / "checkpoints", whole / "checkpoints" / "7", whole.parent):
        with pytest.raises(InputError, match="neither a run folder"):
            locate(path)


def test_off_is_the_natural_mixture_without_policy_lines(root, tmp_path):
    train_and_evaluate(tiny.config(root, None, train_step=2), tmp_path)
    assert not (tmp_path / "policy.jsonl").exists()
    assert len(tiny.records(tmp_path, "metrics.jsonl")) == 2


def test_a_longer_lag_delays_what_is_drawn(root, tmp_path):
    train_and_evaluate(tiny.config(root, data__lag=3, train_step=10), tmp_path / "3")
    train_and_evaluate(tiny.config(root, data__lag=0, train_step=10), tmp_path / "0")
    for lag in (0, 3):
        policy = tiny.records(tmp_path / str(lag), "policy.jsonl")
        natural = policy[0]["observed"]["drawn_with"]
        drawn = [line["observed"]["drawn_with"] != natural for line in policy]
        assert drawn.index(True) == 2 + lag  # decided after step 2, drawn from at step 3 + lag
        assert next(line["effective_step"] for line in policy if line["published"]) == 3 + lag


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__batch_size": 12}, "must be a multiple of mesh.data x mesh.fsdp = 8"),
        ({"data__batch_size": 16, "data__grad_accumulation": 3}, "must be a multiple of config.data.grad_accumulation"),
        ({"data__proportions": (1.0, 1.0)}, "has 2 entries; one for each of the 3 domains"),
        ({"data__proportions": (1.0, -1.0, 1.0)}, "every entry must be a finite number >= 0"),
        ({"data__proportions": (0.0, 0.0, 0.0)}, "at least one entry must be > 0"),
        ({"data__seq_len": 100_000}, "domain 'code' has .* less than one row"),
        ({"model__vocab_size": 100}, "the tokenizer has 257 tokens, but the model's vocab_size is 100"),
        ({"mixer__min_exploration_rate": 0.5}, "config.mixer.min_exploration_rate = 0.5: must be in"),
        ({"update_step": 0}, "config.update_step = 0: must be an integer >= 1"),
        ({"data__root": "/no/such/folder"}, "/no/such/folder"),
        ({"data__domains": ("digits", "nope")}, "nope"),
        ({"model__architecture": "gpt2"}, "gpt2"),
        ({"model__name_or_path": "/no/such/model"}, "config.model.name_or_path = '/no/such/model'"),
        ({"mesh__data": 3}, "mesh.data=3"),
        ({"model__remat": "some"}, "remat"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(root, tmp_path, fields, message):
    with pytest.raises(InputError, match=message) as e:
        train_and_evaluate(tiny.config(root, **fields), tmp_path)
    assert "\n" not in str(e.value)


def test_a_workdir_that_holds_something_else_is_refused(root, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not a folder of checkpoints \(it holds 'notes.txt'\)"):
        train_and_evaluate(tiny.config(root), tmp_path)
    assert (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"


def test_every_row_is_visited_before_any_is_repeated(root, tmp_path, monkeypatch):
    """The peer's natural epoch of mixing touches 63% of the rows."""
    visits = {}
    original = DocumentRows.row

    def counted(rows, i):
        if not rows.partial:  # the training rows
            visits.setdefault(id(rows), collections.Counter(range(rows.num_rows)))[i] += 1
        return original(rows, i)

    monkeypatch.setattr(DocumentRows, "row", counted)
    train_and_evaluate(tiny.config(root, None, train_step=70, checkpoint_every=100), tmp_path)
    assert min(tiny.records(tmp_path, "metrics.jsonl")[-1]["domain_epochs"].values()) > 1
    assert len(visits) == len(tiny.DOMAINS)
    for counts in visits.values():
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_initial_position_is_before_the_first_step():
    position = resume.beginning(resume.Identity({}, {"a": "1", "b": "2"}, {"a": 1.0, "b": 3.0}))
    assert isinstance(position.sampler, SamplerState)
    np.testing.assert_array_equal(position.sampler.weights, [0.25, 0.75])
    assert position.sampler.step == position.tokens_seen == 0
    assert jax.process_count() == 1
