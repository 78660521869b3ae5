"""What was found, for people and programs: tables, a picture, JSON, and the proposal as a weights file."""

from pathlib import Path
from typing import Any

import numpy as np

from dataflex_jax.files import replace_file, replace_json
from dataflex_jax.mixtures import proposal
from dataflex_jax.mixtures.fitting import PROPOSAL, Found, Verified
from dataflex_jax.reporting.mixture_plot import Predictions, mixture_figure
from dataflex_jax.training.domain_weights import WEIGHTS_FILE, write_weights

JSON, PICTURE = "swarm.json", "swarm.png"
_PRIOR = "prior"


def table(found: Found) -> str:
    """A line for each metric, and one for each domain."""
    runs, checked = found.runs, found.checked
    width = max(map(len, (*runs.metrics, *runs.domains, "metric")))
    at_prior, proposed = found.law.at(found.prior), found.law.at(found.proposal)
    lines = [f"{'metric':{width}} {'R²':>7} {'rank':>7} {'seeds':>8} {_PRIOR:>9} {PROPOSAL:>9}"]
    for number, name in enumerate(runs.metrics):
        seeds = "" if runs.deviation is None else f"{runs.deviation[number]:.4f}"
        figures = f"{checked.r2[number]:7.3f} {checked.spearman[number]:7.3f} {seeds:>8}"
        left_out = "" if checked.foretells[number] else "  not foretold"
        lines.append(f"{name:{width}} {figures} {at_prior[number]:9.4f} {proposed[number]:9.4f}{left_out}")
    lines += ["", f"{'domain':{width}} {_PRIOR:>9} {PROPOSAL:>9} {'at most':>9}"]
    for name, *weights in zip(runs.domains, found.prior, found.proposal, found.most, strict=True):
        lines.append(f"{name:{width}} " + " ".join(f"{weight:9.2%}" for weight in weights))
    return "\n".join(lines)


def verdict(verified: Verified) -> str:
    """Whether the proposal helped, in words."""
    count = len(verified.values[PROPOSAL])
    means = ", ".join(f"{name} {values.mean():.4f}" for name, values in verified.values.items())
    lines = [f"Verified by {count} seeds each, the mean of the metrics: {means}."]
    words = {-1: "it helped", 1: "it did harm", 0: f"{count} seeds do not tell which is better"}
    for name, change in verified.against.items():
        ends = f"{change.low:+.4f} to {change.high:+.4f}"
        lines.append(f"Against {name} the proposal is at {change.mean:+.4f} (95 %: {ends}): {words[change.sign]}.")
    return "\n".join(lines)


def write(folder: Path, found: Found, verified: Verified | None) -> None:
    """Writes swarm.json, swarm.png and domain_weights.json."""
    runs, checked = found.runs, found.checked
    replace_json(folder / JSON, _as_json(found, verified), indent=1)
    sensitivity = found.law.sensitivity(found.prior)
    metrics = {
        name: Predictions(runs.values[:, n], checked.predicted[:, n], checked.r2[n], sensitivity[n])
        for n, name in enumerate(runs.metrics)
    }
    figure = mixture_figure(metrics, runs.domains, {_PRIOR: found.prior, PROPOSAL: found.proposal})
    replace_file(folder / PICTURE, figure.drawn("png"))
    facts = {"from": JSON, "runs": len(runs.names), "foretold": bool(checked.foretells.any())}
    write_weights(folder / WEIGHTS_FILE, runs.domains, found.proposal, **facts)


def _as_json(found: Found, verified: Verified | None) -> dict[str, Any]:
    runs, checked, law = found.runs, found.checked, found.law
    at_prior, proposed, sensitivity = law.at(found.prior), law.at(found.proposal), law.sensitivity(found.prior)

    def by_domain(values: np.ndarray) -> dict[str, float]:
        return dict(zip(runs.domains, values.tolist(), strict=True))

    metrics = {
        name: {
            "r2": float(checked.r2[n]),
            "spearman": float(checked.spearman[n]),
            "foretold": bool(checked.foretells[n]),
            "deviation_of_seeds": None if runs.deviation is None else float(runs.deviation[n]),
            "floor": float(law.floors[n]),
            "slopes": by_domain(law.slopes[n]),
            "at_prior": float(at_prior[n]),
            "at_proposal": float(proposed[n]),
            "sensitivity": by_domain(sensitivity[n]),
        }
        for n, name in enumerate(runs.metrics)
    }
    return {
        "runs": len(runs.names),
        "kl_weight": proposal.KL_WEIGHT,
        "prior": by_domain(found.prior),
        "proposal": by_domain(found.proposal),
        "at_most": by_domain(found.most),
        "metrics": metrics,
        "verified": None if verified is None else _verified(verified),
    }


def _verified(verified: Verified) -> dict[str, Any]:
    against = {name: change._asdict() for name, change in verified.against.items()}
    return {"values": {name: values.tolist() for name, values in verified.values.items()}, "against": against}
