"""Do scores foretell what models learn? LDS of selectors' scores on a planted task and on text of several domains.

    nice python scripts/bench/lds.py [--root=DIR] [--subsets=32] [--output=docs/benchmarks/lds.json]

*planted*: a pool of sentences, a tenth of them in the targets' grammar; `less` beside which sentences these are.
*text*: the first kilobytes of each domain of --root, the held-out text of each domain a target group; scores of a
model that was trained on the pool (`less` for each group and as one score, `rds`, `near`, `loss`) beside what is known
without a model: whether a row is of the group's own domain. A finished study under --runs is not repeated, an
interrupted one goes on.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import results
from absl import flags
from ml_collections import ConfigDict

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.policies import registry
from dataflex_jax.selection.choosing import write_selection
from dataflex_jax.training import run_config
from dataflex_jax.training.selecting import select
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.validation import results as found_results
from dataflex_jax.validation.study import Design, validate

_DATA = results.REPOSITORY.parent / "shared/data/slimpajama_mini"

_ROOT = cli.define_path("root", None, "Folder of NAME.jsonl files; by default ../shared/data/slimpajama_mini.")
_SUBSETS = flags.DEFINE_integer("subsets", 32, "Models of each task.", lower_bound=8)
_RUNS = cli.define_path("runs", "runs/bench-lds", "Where the run folders are.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/lds.json", "The result; the plots lie beside it.")

POOL, PLANTED, TARGETS = 100, 10, 12
BYTES = 24_000  # of each domain, as many are held out
SELECTORS = ("less", "rds", "near", "loss")


def small(folder: Path, **data: Any) -> ConfigDict:
    """Two layers, 64 wide, on what `data` names."""
    config = base.get_config()
    config.model.update(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    config.model.update(num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.06)
    config.model.update(dtype="float32", remat="none")
    config.update(checkpoint_every=1000, eval_every=0, tensorboard=False, log_every=50)
    config.data.update(source="local", cache_dir=str(folder / "cache"), **data)
    config.optim.update(learning_rate=6e-3, warmup_ratio=0.1)
    return config


def sentence(rng: random.Random, step: int) -> str:
    """Eight letters in a circle, and one of two grammars: the next letter is mostly `step` further on."""
    letters = [rng.randrange(8)]
    for _ in range(19):
        letters.append((letters[-1] + (step if rng.random() < 0.9 else rng.randrange(8))) % 8)
    return "".join("abcdefgh"[letter] for letter in letters)


def planted(folder: Path) -> tuple[ConfigDict, Callable[[Pool], Mapping[str, np.ndarray]]]:
    """The recipe of the planted task, and what is known of its pool."""
    rng = random.Random(0)
    steps = [3] * PLANTED + [1] * (POOL - PLANTED)
    rng.shuffle(steps)
    for name, steps_of_lines in {"pool": steps, "targets": [3] * TARGETS}.items():
        lines = [{"instruction": "?", "output": sentence(rng, step)} for step in steps_of_lines]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "sentences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"formatting": "alpaca", "template": "mistral", "cutoff_len": 48, "buckets": (48,), "tokenizer": "bytes"}
    config = small(folder, root=str(folder / "pool"), batch_size=8, valid_fraction=0.0, **rows)
    config.targets.update(source="local", root=str(folder / "targets"), formatting="alpaca")
    config.train_step = 60
    return config, lambda pool: {"the planted ones": np.array(steps) == 3}


def text(folder: Path) -> tuple[ConfigDict, Callable[[Pool], Mapping[str, np.ndarray]]]:
    """The recipe of the text, and what is known of its pool."""
    root = Path(_ROOT.value or _DATA).resolve()
    names = sorted(path.name for path in root.glob("*.jsonl"))
    if not names:
        raise InputError(f"--root={root}: no NAME.jsonl there; give a folder of domains")
    (folder / "domains").mkdir(parents=True, exist_ok=True)
    for name in names:
        kept, size = [], 0
        for line in (root / name).read_text().splitlines():
            words = json.loads(line)["text"][: BYTES - size]
            kept.append(json.dumps({"text": words}) + "\n")
            size += len(words)
            if size >= BYTES:
                break
        (folder / "domains" / name).write_text("".join(kept))
    config = small(folder, root=str(folder / "domains"), tokenizer="train:1024", seq_len=64, batch_size=16)
    config.targets.group_rows = 32
    config.train_step = 90

    def known(pool: Pool) -> dict[str, np.ndarray]:
        return {"the same domain": pool.domain_of(np.arange(pool.num_rows))[:, None] == np.arange(len(pool.domains))}

    return config, known


def scored(config: ConfigDict, selector: str, run: Path, file: Path) -> list[Path]:
    """Files of a selector's scores by the model of a run: as one score, and where it has such for each group."""
    one = file.with_name(f"{file.stem} (one score).npz")
    if file.exists():
        return [path for path in (file, one) if path.exists()]
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.selector = registry.policy_config("selector", selector)
    pool, chosen = select(config, [str(run)], None, 1, by_group=selector == "less")
    alone = chosen._replace(by_group=None)
    if chosen.by_group is None or len(chosen.by_group) == 1:
        write_selection(file, pool, alone, all_scores=True)
        return [file]
    write_selection(one, pool, alone, all_scores=True)
    write_selection(file, pool, chosen, all_scores=True)
    return [file, one]


def study(name: str, folder: Path, make: Callable, selectors: tuple[str, ...]) -> dict[str, Any]:
    """The figures of a task; its plot lies beside the result."""
    config, known = make(folder)
    train_and_evaluate(config.copy_and_resolve_references(), folder / "model")
    config.data.tokenizer = str(folder / "model")
    files = [path for each in selectors for path in scored(config, each, folder / "model", folder / f"{each}.npz")]
    pool = Pool(open_domains(config.data)[0])
    for what, values in known(pool).items():
        files.append(folder / f"{what}.npy")
        np.save(files[-1], values)
    design = Design(_SUBSETS.value, 0.5)
    found = validate(config, files, design, folder / "validate")
    if found is None:
        raise TrainingError(f"{folder}: stopped before the end; the same command goes on")
    found_results.write(folder / "validate", found, design)
    picture = Path(_OUTPUT.value).with_name(f"lds_{name}.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes((folder / "validate" / "lds.png").read_bytes())
    print(found_results.table(found))
    figures = json.loads((folder / "validate" / "lds.json").read_text())
    return figures | {"train_step": config.train_step, "batch_size": config.data.batch_size}


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    runs = Path(_RUNS.value)
    tasks = {
        "planted": study("planted", runs / "planted", planted, ("less",)),
        "text": study("text", runs / "text", text, SELECTORS),
    }
    config = small(runs, root=str(runs))
    results.write(_OUTPUT.value, results.describe(run_config.resolved(config)) | {"tasks": tasks})


if __name__ == "__main__":
    cli.run(main)
