"""A small run folder that looks like a real one, for the tests of plots and report."""

import json
import math
from pathlib import Path

import numpy as np

_UNSURE = {"accuracy_stderr": 0.0123, "samples": 100}


def write_run(
    folder: Path, *, names=("books", "code", "web"), steps=20, mixer=True, seed=0, offset=0.0, evaluator=None
) -> Path:
    """Writes config.json, metrics.jsonl, policy.jsonl (with `mixer`), eval.jsonl and summary.json; returns the folder.

    Domain i's held-out nll at step s is `2 + i / 10 + offset + 6 exp(-s / 5)`. At every tenth step the evaluator of
    that name, if any, found an accuracy of `0.25 + s / 100 + offset` in "algebra", and 0.1 more in "law".
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = {"metrics": [], "policy": [], "eval": []}
    tokens = 0
    for step in range(1, steps + 1):
        nll = {name: 2 + i / 10 + offset + 6 * math.exp(-step / 5) for i, name in enumerate(names)}
        weights = rng.dirichlet(np.full(len(names), 50.0))
        # The last domain is missing from every other batch.
        losses = {name: nll[name] + rng.normal(0, 0.05) for name in names}
        if step % 2:
            losses[names[-1]] = None
        tokens += 4096
        records["metrics"].append(
            {
                "step": step,
                "loss": float(np.mean([loss for loss in losses.values() if loss is not None])),
                "learning_rate": 1e-3 * (1 - step / steps),
                "grad_norm": 1 + math.exp(-step),
                "tokens_seen": tokens,
                "tokens_per_second": None if step == 1 else 5e4,
                "mfu": None,
                "domain_loss": losses,
                "domain_epochs": {name: step * 0.01 * (i + 1) for i, name in enumerate(names)},
            }
        )
        if mixer:
            records["policy"].append(
                {
                    "step": step,
                    "policy": "odm",
                    "observed": {
                        "domain_loss": losses,
                        "domain_rows": dict.fromkeys(names, 2),
                        "drawn_with": dict.fromkeys(names, 1 / len(names)),
                    },
                    "state": {"reward": list(weights)},
                    "sampling_weights": dict(zip(names, weights, strict=True)),
                    "published": True,
                    "effective_step": step + 2,
                }
            )
        if evaluator is not None and step % 10 == 0:
            algebra, law = ({"accuracy": 0.25 + step / 100 + offset + more, **_UNSURE} for more in (0.0, 0.1))
            overall = {"accuracy": 0.3 + step / 100 + offset, "length": 12.3456 + offset, **_UNSURE}
            groups = {"algebra": algebra, "law": law}
            records["eval"].append({"step": step, "split": evaluator, "domains": groups, "overall": overall})
        if step % 5 == 0:
            scores = {name: _scores(value) for name, value in nll.items()}
            overall = _scores(float(np.mean(list(nll.values()))))
            records["eval"].append({"step": step, "split": "valid", "domains": scores, "overall": overall})
    for name, lines in records.items():
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "config": {
            "seed": seed,
            "train_step": steps,
            "mixer": {"name": "odm", "alpha": 0.9} if mixer else None,
            "data": {"seq_len": 128, "tokenizer": "bytes"},
        },
        "device_kind": "cpu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"step": steps, "tokens_seen": tokens}))
    return folder


def add_evaluation(folder: Path, split: str, **metrics: float) -> None:
    """Adds a line to eval.jsonl after all others, of what else than the held-out loss was measured at its last step."""
    lines = (folder / "eval.jsonl").read_text()
    step = json.loads(lines.splitlines()[-1])["step"]
    line = {"step": step, "split": split, "domains": {}, "overall": metrics}
    (folder / "eval.jsonl").write_text(lines + json.dumps(line) + "\n")


def _scores(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2) / 4, "tokens": 1000}
