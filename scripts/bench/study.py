"""Do mixing, selecting and weighting help? All policies of a kind on the same data, seeds and steps, with intervals.

    nice python scripts/bench/study.py [--data=DIR] [--part=pretraining,instruction] [--rows=NAME,...] [--seeds=8]

*pretraining*: small models on the domains of DIR/slimpajama_mini; static natural and uniform proportions, the mixers,
and a swarm's proposal. *instruction*: a model of the first part tuned on the questions of DIR/instruct; all of them,
the selectors and the weighters. The learning rate is chosen for the baseline of each part (natural, all questions),
by held-out rows that are not the study's, and used by all. Models of one row are trained as one program, or one after
another where there is a selector. What is done is kept under --runs: stopped or killed at any time, the same command
goes on. Each row is written into docs/benchmarks/study_PART.json, with a picture, when it is done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import results
import study_table
from absl import flags
from study_rows import BASELINES, INSTRUCTION, PRETRAINING
from study_runs import Part, Scale
from tqdm import tqdm

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.training import run_config

_ROWS = {"pretraining": PRETRAINING, "instruction": INSTRUCTION}
_FOLDERS = {"pretraining": "slimpajama_mini", "instruction": "instruct"}
_RATES = {"pretraining": (1.2e-2, 2.4e-2), "instruction": (2e-3, 6e-3)}

_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "dtype": "float32",
    "remat": "none",
}
FULL = Scale(
    model=_MODEL,
    tokenizer="train:512",
    seq_len=32,
    cutoff_len=128,
    batch_size=8,
    steps=200,
    base_steps=200,
    tuning_steps=36,
    rates=_RATES,
    tried=2,
    swarm=10,
    candidates=80,
    measured=128,
    looked_at=24,
)
SMALL = Scale(
    model=_MODEL | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    tokenizer="bytes",
    seq_len=32,
    cutoff_len=256,
    batch_size=4,
    steps=10,
    base_steps=4,
    tuning_steps=5,
    rates={part: rates[:1] for part, rates in _RATES.items()},
    tried=1,
    swarm=8,
    candidates=40,
    measured=4,
    looked_at=4,
)

_DATA = cli.define_path("data", None, "Folder with slimpajama_mini/ and instruct/; by default ../shared/data.")
_PARTS = flags.DEFINE_list("part", list(_ROWS), "Which tables.")
_CHOSEN = flags.DEFINE_list("rows", None, "Some of the rows; their baseline comes too.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Models of each row.", lower_bound=2)
_SMALL = flags.DEFINE_bool("small", False, "A test: tiny models, which say nothing.")
_RUNS = cli.define_path("runs", "runs/bench-study", "Where the data's parts and the models are.")
_OUTPUT = cli.define_path("output", results.FOLDER, "The folder of the results.")


def chosen_rows(part: str) -> list[str]:
    """The rows of a part that are asked for, the baseline first.

    Raises:
        InputError: an unknown part or row.
    """
    if part not in _ROWS:
        raise InputError(f"--part={part}: one of {', '.join(_ROWS)} is expected")
    known = [name for rows in _ROWS.values() for name in rows]
    if unknown := [name for name in _CHOSEN.value or () if name not in known]:
        raise InputError(f"--rows: {unknown[0]!r} is not one of {', '.join(known)}")
    names = [name for name in _ROWS[part] if _CHOSEN.value is None or name in _CHOSEN.value]
    return list(dict.fromkeys([BASELINES[part], *names])) if names else []


def source(part: str) -> Path | None:
    """The part's data; None, with the reason in a line: there are none."""
    data = Path(_DATA.value or results.REPOSITORY.parent / "shared/data").resolve()
    if (data / _FOLDERS[part]).is_dir():
        return data / _FOLDERS[part]
    print(f"{part} is left out: no folder {_FOLDERS[part]} in {data}; --data names the folder that has it")
    return None


def study(part: str, names: Sequence[str], bar: tqdm) -> None:
    """Trains what is not there yet of a part, and writes its result row by row."""
    data, runs, scale = source(part), Path(_RUNS.value).resolve(), SMALL if _SMALL.value else FULL
    if data is None:
        return
    rows, seeds, baseline = _ROWS[part], list(range(_SEEDS.value)), BASELINES[part]
    at_work = Part(part, data, runs, scale, seeds)
    if part == "instruction":
        text = source("pretraining")
        if text is None:
            return
        at_work.base = runs / "base"
        before = Part("pretraining", text, runs, scale, seeds)
        rate, _ = tuned(before, "pretraining", bar)
        before.train_base(at_work.base, rate)
    rate, tried = tuned(at_work, part, bar)
    found = {}
    for name in names:
        bar.set_postfix_str(f"{part}: {name}")
        found[name] = at_work.losses(name, rows[name], rate)
        bar.update()
        lines = study_table.table(found, rows, baseline, seeds)
        config = at_work.config(rows[baseline], rate)
        result = results.describe(run_config.resolved(config)) | {
            "part": part,
            "baseline": baseline,
            "seeds": seeds,
            "setting": setting(scale, part),
            "learning_rate": {"chosen": rate, "tried": tried},
            "rows": lines,
        }
        output = Path(_OUTPUT.value) / f"study_{part}.json"
        results.write(output, result)
        if len(lines) > 1:
            output.with_suffix(".png").write_bytes(study_table.picture(lines, baseline).drawn("png"))


def tuned(at_work: Part, part: str, bar: tqdm) -> tuple[float, dict[str, Any]]:
    """The learning rate with the least loss, and the losses of all that were tried."""
    bar.set_postfix_str(f"{part}: learning rate")
    found = at_work.tuned(_ROWS[part][BASELINES[part]])
    return min(found, key=lambda rate: found[rate].mean()), {f"{rate:g}": v.tolist() for rate, v in found.items()}


def setting(scale: Scale, part: str) -> dict[str, Any]:
    """What all models of a part share."""
    tuning = part == "instruction"
    steps = scale.tuning_steps if tuning else scale.steps
    return {
        "steps": steps,
        "base_steps": scale.base_steps if tuning else None,
        "rows_a_step": scale.batch_size,
        "tokens_a_row": scale.cutoff_len if tuning else scale.seq_len,
        "tokenizer": scale.tokenizer,
        "model": dict(scale.model),
        "rows_measured_of_a_domain": scale.measured,
        "swarm": None if tuning else scale.swarm,
        "candidates_of_a_domain": scale.candidates if tuning else None,
    }


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    asked = {part: chosen_rows(part) for part in _PARTS.value}
    # So that a restart, and the next model of the same program, compiles nothing.
    jax.config.update("jax_compilation_cache_dir", str(Path(_RUNS.value).resolve() / "cache/compilations"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with tqdm(total=sum(map(len, asked.values())), unit="row") as bar:
        for part, names in asked.items():
            if names:
                study(part, names, bar)


if __name__ == "__main__":
    cli.run(main)
