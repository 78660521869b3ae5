"""Whole runs on instruction data: several datasets, mixed online, resumed exactly, packed or padded."""

import json
import random

import numpy as np
import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import sft
from dataflex_jax.data.domains import open_domains
from dataflex_jax.errors import InputError
from dataflex_jax.evaluate import evaluate
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import run_config
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import tiny

NAMES = ("capitals", "digits")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with dataset_info.json: an alpaca file and a ShareGPT one."""
    folder = tmp_path_factory.mktemp("data") / "datasets"
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 30))) for _ in range(80)]
    capitals = [{"instruction": "Shout.", "input": word, "output": word.upper()} for word in words]
    turns = [[("human", "Count."), ("gpt", "1 2 3"), ("human", "More"), ("gpt", "4 " * (i % 9 + 1))] for i in range(60)]
    digits = [{"conversations": [{"from": role, "value": text} for role, text in turn]} for turn in turns]
    entries = {
        "capitals": {"file_name": "capitals.json"},
        "digits": {"file_name": "digits.jsonl", "formatting": "sharegpt"},
        "elsewhere": {"hf_hub_url": "somebody/something"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    (folder / "capitals.json").write_text(json.dumps(capitals))
    (folder / "digits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in digits))
    return folder


def config(root, **fields):
    """Rows of three lengths: the system prompt alone has 70 bytes."""
    data = {"source": "dataset_info", "cutoff_len": 160, "buckets": (112, 136, 160)}
    fields = {**{f"data__{name}": value for name, value in data.items()}, **fields}
    return tiny.config(root, eval_every=4, eval_rows=100, **fields)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_and_evaluate(config(root), folder)
    return folder


def test_learns_responses_and_mixes_the_datasets(root, whole):
    metrics, policy = tiny.records(whole, "metrics.jsonl"), tiny.records(whole, "policy.jsonl")
    assert set(metrics[-1]["domain_epochs"]) == set(NAMES)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
    assert len({tuple(line["sampling_weights"].values()) for line in policy}) > 5
    for line in policy:
        for name, share in line["observed"]["drawn_with"].items():
            assert abs(line["observed"]["domain_rows"][name] - 8 * share) < 1
    # Only what the assistant says is counted: no row has more of it than the longest response.
    domains, _ = open_domains(config(root).data, progress=False)
    most = [max(np.add.reduceat(d.store.train.targets, d.store.train.offsets[:-1])) for d in domains]
    assert metrics[-1]["tokens_seen"] <= 12 * 8 * max(most) < 12 * 8 * 50
    held_out = tiny.records(whole, "eval.jsonl")[-1]
    assert {name: figures["tokens"] for name, figures in held_out["domains"].items()} == {
        domain.name: domain.store.valid.num_targets for domain in domains
    }


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(root, whole, tmp_path):
    train_and_evaluate(config(root, train_step=4), tmp_path)
    train_and_evaluate(config(root), tmp_path)
    for name in ("metrics.jsonl", "policy.jsonl", "eval.jsonl"):
        assert tiny.records(tmp_path, name) == tiny.records(whole, name)


def test_a_checkpoint_evaluates_as_the_run_did_with_its_own_tokenizer(root, whole):
    other = config(root, data__tokenizer=str(whole / "tokenizer"))  # which has the template by now
    for chosen in (run_config.read(whole), other):
        opened = open_model(whole / "checkpoints" / "8", make_mesh(chosen.mesh))
        (record,) = evaluate(opened, chosen)
        assert {"step": 8, **record} == tiny.records(whole, "eval.jsonl")[1]


@pytest.mark.slow
def test_packed_rows_train_alike_with_any_accumulation(root, tmp_path):
    runs = []
    for accumulation in (1, 2):
        fields = {"data__packing": True, "data__cutoff_len": 400, "data__buckets": None, "data__batch_size": 16}
        run = tmp_path / str(accumulation)
        train_and_evaluate(config(root, **fields, data__grad_accumulation=accumulation, train_step=4), run)
        runs.append(tiny.records(run, "metrics.jsonl"))
    for once, split in zip(*runs, strict=True):
        np.testing.assert_allclose(once["loss"], split["loss"], rtol=2e-5)
        assert once["tokens_seen"] == split["tokens_seen"]


@pytest.mark.slow
def test_changed_options_and_packing_belong_to_another_run(root, whole):
    for fields in ({"data__packing": True}, {"data__mask_history": True}, {"data__cutoff_len": 150}):
        with pytest.raises(InputError, match="is not what the checkpoint was trained on"):
            train_and_evaluate(config(root, **fields), whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data__domains": ("capitals", "nope")},
            "'nope' is not in .*dataset_info.json; available: capitals, digits, else",
        ),
        ({"data__formatting": "alpaca"}, "each entry of dataset_info.json has its own"),
        ({"data__formatting": "chatml"}, "config.data.formatting = 'chatml': must be one of 'alpaca', 'pairs', 'share"),
        ({"data__template": "vicuna"}, "config.data.template = 'vicuna': must be one of 'qwen', 'llama3', "),
        ({"data__mask_history": True, "data__train_on_prompt": True}, "not together with config.data.train_on_prompt"),
        ({"data__buckets": (32, 64)}, "must hold config.data.cutoff_len = 160 tokens"),
        ({"data__buckets": (64, 32)}, "must be a tuple of increasing integers"),
        ({"data__root": "/no/such/folder"}, "needs a folder with dataset_info.json"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(root, tmp_path, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        train_and_evaluate(config(root, **fields), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_recipe():
    for variant in ("quickstart", "local", "quickstart,mixer=odm"):
        chosen = sft.get_config(variant)
        chosen.data.root = chosen.data.root or "datasets"
        configuration.validate(chosen)
    assert chosen.mixer.name == "odm"
    with pytest.raises(InputError, match="unknown variant 'big' of the sft recipe; known: quickstart, local"):
        sft.get_config("big")
