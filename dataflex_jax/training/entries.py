"""What a run writes into its folder, by name, and the refusal of what else may lie there under these names."""

import os
from pathlib import Path

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.run_log import EVALUATIONS, METRICS, POLICY, TIMES
from dataflex_jax.selection import windows
from dataflex_jax.training import checkpoint, run_config
from dataflex_jax.training.domain_weights import WEIGHTS_FILE

FILES = (
    *("config.json", run_config.HISTORY, METRICS, POLICY, EVALUATIONS, TIMES, WEIGHTS_FILE),
    *("summary.json", "report.html", checkpoint.LOCK),
)
FOLDERS = (checkpoint.FOLDER, windows.FOLDER, "tokenizer", "plots", "tensorboard")


def check_entries(run_folder: Path) -> None:
    """Refuses a run folder in which a file lies under the name of a folder or the other way round, or is read-only.

    Raises:
        InputError: names the entry.
    """
    files, folders = [run_folder / name for name in FILES], [run_folder / name for name in FOLDERS]
    files += sorted((run_folder / windows.FOLDER).glob("step_*.*"))
    for path in filter(os.path.lexists, (*folders, *files)):
        wanted, right = ("folder", path.is_dir()) if path in folders else ("file", path.is_file())
        if not right:
            reason = f"not a {wanted}, which a run writes there; move it away"
            raise InputError(f"{path}: {reason}, or choose another --workdir")
        if not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot be written; change its permissions, or choose another --workdir")
