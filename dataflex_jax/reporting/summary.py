"""What a finished run leaves: summary.json, the plots, the report, and a few lines that say where they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_jax.reporting.evaluations import HELD_OUT, evaluations, splits
from dataflex_jax.reporting.hardware import peak_memory_bytes
from dataflex_jax.reporting.page import write_report
from dataflex_jax.reporting.plots import plot_run
from dataflex_jax.reporting.run_folder import RunRecords, series, write_summary


def write_results(
    run_folder: Path, *, steps: int, tokens_seen: int, tokens_per_second: float | None, mfu: float | None
) -> None:
    """Writes the final files of a run and prints where they are.

    Args:
        run_folder: with the lines that it wrote.
        steps: optimizer steps done.
        tokens_seen: tokens trained on, those that count in the loss.
        tokens_per_second: over the last steps; None where unknown.
        mfu: over the last steps; None where unknown.
    """
    run = RunRecords.load(run_folder)
    # A finished run that is started again measures nothing.
    before = run.summary if run.summary.get("steps") == steps else {}
    again = bool(before) and tokens_per_second is None
    evaluated = {split: _figures(evaluations(run, split)[-1]) for split in splits([run])}
    held_out = evaluated.pop(HELD_OUT, before.get("held_out") or _figures({}))
    last = run.metrics[-1] if run.metrics else before
    write_summary(
        run_folder,
        {
            "steps": steps,
            "tokens_seen": tokens_seen,
            "loss": last.get("loss"),
            "held_out": held_out,
            **({"evaluators": evaluated} if evaluated else {}),
            "domain_epochs": last.get("domain_epochs"),
            "tokens_per_second": before.get("tokens_per_second") if again else tokens_per_second,
            "mfu": before.get("mfu") if again else mfu,
            "peak_memory": before.get("peak_memory") if again else peak_memory_bytes()._asdict(),
        },
    )
    plots = plot_run(run_folder)
    report = write_report([run_folder], run_folder / "report.html")
    _, held_out_nll = series(evaluations(run), "overall", "nll")
    if len(held_out_nll):
        print(f"Held-out loss {held_out_nll[-1]:.4f} nats/token after {steps} steps.")
    print(f"Results: {run_folder}/summary.json, metrics.jsonl, policy.jsonl, eval.jsonl, checkpoints/")
    print(f"Plots:   {', '.join(str(plot) for plot in plots)}")
    print(f"Report:  {report}")


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"overall": record.get("overall"), "domains": record.get("domains", {})}
