"""What a finished run leaves: summary.json, the plots, the report, and a few lines that say where they are."""

from pathlib import Path

from dataflex_jax.files import read_jsonl
from dataflex_jax.reporting.hardware import peak_memory_bytes
from dataflex_jax.reporting.page import write_report
from dataflex_jax.reporting.plots import plot_run
from dataflex_jax.reporting.run_folder import write_summary
from dataflex_jax.training.job import Outcome


def write_results(run_folder: Path, outcome: Outcome) -> None:
    """Writes the final files of a run and prints where they are."""
    evaluation = read_jsonl(run_folder / "eval.jsonl")[-1]
    last = read_jsonl(run_folder / "metrics.jsonl")[-1]
    memory = peak_memory_bytes()
    write_summary(
        run_folder,
        {
            "steps": outcome.step,
            "tokens_seen": outcome.tokens_seen,
            "loss": last["loss"],
            "held_out": {"overall": evaluation["overall"], "domains": evaluation["domains"]},
            "domain_epochs": last["domain_epochs"],
            "tokens_per_second": outcome.tokens_per_second,
            "mfu": outcome.mfu,
            "peak_memory": memory._asdict(),
        },
    )
    plots = plot_run(run_folder)
    report = write_report([run_folder], run_folder / "report.html")
    if evaluation["overall"]:
        print(f"Held-out loss {evaluation['overall']['nll']:.4f} nats/token after {outcome.step} steps.")
    print(f"Results: {run_folder}/summary.json, metrics.jsonl, policy.jsonl, eval.jsonl, checkpoints/")
    print(f"Plots:   {', '.join(str(plot) for plot in plots)}")
    print(f"Report:  {report}")
