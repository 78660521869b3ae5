"""Checkpoints that are damaged, hostile or foreign, by seeded mutations: they open as they were, or one line names a
file."""

import dataclasses
import functools
import json
import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf import peft
from dataflex_jax.models.hf.config import from_hf, read_shape
from dataflex_jax.models.hf.weights import load_params
from dataflex_jax.models.layout import placed
from dataflex_jax.sharding import make_mesh
from tests.models.make_golden import CHECKPOINT, GOLDEN
from tests.models.make_golden_peft import FOLDER, MODEL, MODELS

FLOATS = ("rms_norm_eps", "rope_theta", "initializer_range")
WRONG = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 10**12, 10**30, 10**400, 1.5, -0.5, 1e39, float("nan"), float("inf")),
    *(
        "",
        "8",
        "1e6",
        "llama",
        "../weights.safetensors",
        "pytorch_model.bin",
        "x" * 300,
        "a\nb\0",
        "~nobody/x",
        "\ud800",
    ),
    *(
        [],
        [1],
        ["full_attention"] * 3,
        [{}],
        {},
        {"a": 1},
        {"rope_type": "llama3"},
        functools.reduce(lambda x, _: [x], range(500), 1),
    ),
)


def load(folder: Path):
    """(the configuration, the parameters) of a checkpoint."""
    config = from_hf(read_shape(folder), dtype="float32")
    _, shapes = jax.eval_shape(functools.partial(decoder.create, config), jax.random.key(0))
    return config, load_params(str(folder), placed(make_mesh({}, jax.devices()[:1]), shapes))


def load_adapter(folder: Path):
    """(its configuration, its factors), on the golden base."""
    lora, base = peft.read_lora_config(str(folder), "--adapter", "float32")
    assert base is None or isinstance(base, str)
    model = from_hf(MODELS[MODEL], dtype="float32", lora=lora)
    return lora, peft.load_adapter(str(folder), model, "--adapter", base, "float32 0123")


def places(value, path=()):
    """Every (path, value) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated_value(value, rng: random.Random):
    """The JSON value with a field less, or with a field of another type or size."""
    value = json.loads(json.dumps(value))
    *parents, last = rng.choice(list(places(value)))
    inside = functools.reduce(lambda inner, key: inner[key], parents, value)
    if rng.random() < 0.2:
        del inside[last]
    else:
        inside[last] = rng.choice(WRONG)
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a bit flipped, cut short, or something else in their place."""
    kind, place = rng.randrange(5), rng.randrange(len(data))
    if kind < 2:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 2:
        return data[:place]
    if kind == 3:
        return data[:place] + rng.randbytes(9) + data[place:]
    return rng.choice([b"", b"[" * 10_000, b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"3"])


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    return json.dumps(mutated_value(json.loads(data), rng)).encode()


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Of the tensors themselves nothing is changed but where they end: the format has no checksums."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        claimed = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        return claimed.to_bytes(8, "little") + header + tensors
    if kind == 1:
        return data[: rng.randrange(len(data))]
    header = mutated_bytes(header, rng) if kind == 2 else json.dumps(mutated_value(json.loads(header), rng)).encode()
    return len(header).to_bytes(8, "little") + header + tensors


MUTATIONS = {
    "config.json": (GOLDEN / CHECKPOINT, load, mutated_json),
    "model.safetensors.index.json": (GOLDEN / CHECKPOINT, load, mutated_json),
    "model-00002-of-00004.safetensors": (GOLDEN / CHECKPOINT, load, mutated_safetensors),
    "adapter_config.json": (FOLDER, load_adapter, mutated_json),
    "adapter_model.safetensors": (FOLDER, load_adapter, mutated_safetensors),
}


def opened(folder, open_folder):
    """What it opens as, or the line that refuses it."""
    try:
        return open_folder(folder)
    except InputError as error:
        message = str(error)
    assert "\n" not in message, message
    assert re.match(rf"{re.escape(str(folder))}/.+: ", message), message
    assert len(message) < 1500, message
    return message


def check_config(config: ModelConfig, contents: dict) -> None:
    """Nothing was read as something else than it is."""
    for name, value in dataclasses.asdict(config).items():
        given = contents.get(name)
        if given is not None and name not in ("dtype", "rope_scaling", "head_dim"):
            assert value == given, name
            assert name in FLOATS or type(value) is type(given), (name, value, given)
            assert not isinstance(given, bool) or name in ("tie_word_embeddings", "attention_bias"), (name, given)


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 50), marks=pytest.mark.slow)], ids=["some", "more"]
)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_file_is_read_as_it_was_or_refused_by_name(tmp_path, name, seeds):
    source, open_folder, mutated = MUTATIONS[name]
    original, whole = (source / name).read_bytes(), open_folder(source)
    folder = Path(shutil.copytree(source, tmp_path / "folder"))
    refused = 0
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        (folder / name).write_bytes(mutated(original, rng))
        found = opened(folder, open_folder)
        if isinstance(found, str):
            refused += 1
            continue
        config, params = found
        if isinstance(config, ModelConfig):
            check_config(config, json.loads((folder / "config.json").read_bytes()))
        jax.tree.map(np.testing.assert_array_equal, params, whole[1])
    assert 0.3 * len(seeds) < refused <= len(seeds)
