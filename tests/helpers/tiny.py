"""A run that takes seconds: three tiny domains of generated text, bytes for tokens, a two-layer model."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dataflex_jax.configs import base
from dataflex_jax.evaluate import evaluate
from dataflex_jax.reporting import plot_style
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import run_config
from dataflex_jax.training.locate import locate
from dataflex_jax.training.weights import How, open_model

DOMAINS = {"digits": "0123456789 ", "vowels": "aeiou ", "code": "(){}[];=+-\n"}


def write_domains(folder: Path, characters: int = 6000, names=tuple(DOMAINS)) -> Path:
    """NAME.jsonl of many short documents a domain, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = random.Random(name)
        documents = ["".join(rng.choices(DOMAINS[name], k=200)) for _ in range(characters // 200)]
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(root: Path, mixer: str = "odm", **fields) -> ConfigDict:
    """A tiny run on `root`'s domains; `fields` as in `having`."""
    c = base.get_config(f"mixer={mixer}" if mixer else "")
    c.train_step, c.warmup_step, c.update_step = 12, 2, 2
    c.log_every, c.checkpoint_every, c.eval_rows, c.tensorboard = 1, 4, 4, False
    c.model.update(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        remat="none",
    )
    c.data.update(
        source="local",
        root=str(root),
        tokenizer="bytes",
        seq_len=32,
        batch_size=8,
        valid_fraction=0.2,
        cache_dir=str(root.parent / "cache"),
    )
    c.optim.update(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)
    return having(c, fields)


def having(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """`config` with fields set, by dotted names with "__" for the dot."""
    for name, value in fields.items():
        *path, field = name.split("__")
        section = config
        for part in path:
            section = section[part]
        section[field] = value
    return config


def draw_nothing() -> None:
    """Empty files for the pictures of this process's runs: drawing them takes as long as such a run itself."""
    plot_style.Chart.drawn = lambda chart, kind: b""


def records(run_folder: Path, name: str) -> list[dict]:
    """The lines of a run's file without what depends on the clock."""
    lines = [json.loads(line) for line in (run_folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "seconds")} for line in lines]


def evaluated(source: Path, data: ConfigDict | None = None) -> dict[str, dict]:
    """The held-out figures of a checkpoint by domain.

    Args:
        source: the checkpoint, as for `open_model`.
        data: whose data and mesh to use; None: the run's.
    """
    data = data or run_config.read(locate(source).folder)
    (record,) = evaluate(open_model(source, make_mesh(data.mesh), how=How.of(data)), data)
    return record["domains"]
