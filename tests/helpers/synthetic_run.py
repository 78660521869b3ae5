"""A small run folder that looks like a real one, for the tests of plots and report."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

_UNSURE = {"accuracy_stderr": 0.0123, "samples": 100}


def write_run(
    folder: Path, *, names=("books", "code", "web"), steps=20, mixer=True, seed=0, offset=0.0, evaluator=None
) -> Path:
    """Writes config.json, metrics.jsonl, policy.jsonl (with `mixer`), eval.jsonl, times.jsonl and summary.json.

    Domain i's held-out nll at step s is `2 + i / 10 + offset + 6 exp(-s / 5)`. At every tenth step the evaluator of
    that name, if any, found an accuracy of `0.25 + s / 100 + offset` in "algebra", and 0.1 more in "law". A step takes
    a minute.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = {"metrics": [], "policy": [], "eval": [], "times": []}
    begun = datetime(2026, 1, 31, 23, 50, tzinfo=UTC)
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
        records["times"].append({"step": step, "time": (begun + timedelta(minutes=step)).isoformat()})
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


def write_selections(folder: Path, steps=(5, 10, 15), candidates=60, chosen=12, seed=0) -> dict[int, dict]:
    """Adds choices of the highest scores to a run: files in selections/, and lines in policy.jsonl.

    Candidate i has `10 + i % 50` inputs and is of "books", "code" or "web", a third of the candidates each.

    Returns:
        step -> the arrays of its file.
    """
    rng = np.random.default_rng(seed)
    (folder / "selections").mkdir()
    lengths, ever, before, written = 10 + np.arange(candidates) % 50, set(), None, {}
    for step in steps:
        scores = rng.normal(size=candidates).astype(np.float32)
        scores[step] = np.nan
        ranked = np.argsort(np.where(np.isnan(scores), -np.inf, scores))[::-1]
        ids = ranked[:chosen]
        sizes, counts = np.unique(lengths, return_counts=True)
        arrays = {"ids": ids, "scores": scores[ids], "domains": ids * 3 // candidates, "lengths": lengths[ids]}
        arrays |= {"pool_lengths": sizes, "pool_rows": counts, "all_scores": scores}
        path = folder / "selections" / f"step_{step:08d}.npz"
        np.savez(path, **arrays)
        ends = [("highest", i) for i in ranked[:10]] + [("lowest", i) for i in ranked[-2:-12:-1]]
        told = [
            {"end": end, "id": int(i), "domain": "books", "record": None, "score": float(scores[i])}
            | {"length": int(lengths[i]), "chosen": bool(i in ids), "text": f"<b>row {i}</b> of\nsome text"}
            for end, i in ends
        ]
        path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
        ever |= set(ids.tolist())
        share = {name: float((arrays["domains"] == i).mean()) for i, name in enumerate(("books", "code", "web"))}
        line = {"step": step, "policy": "less", "coverage": len(ever) / candidates, "domain_share": share}
        line["overlap"] = None if before is None else float(np.isin(ids, before).mean())
        ends = {"score_min": scores[ids].min(), "score_mean": scores[ids].mean(), "score_max": scores[ids].max()}
        with open(folder / "policy.jsonl", "a") as file:
            file.write(json.dumps(line | {name: float(value) for name, value in ends.items()}) + "\n")
        before, written[step] = ids, arrays
    return written


def _scores(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2) / 4, "tokens": 1000}
