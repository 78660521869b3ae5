"""Checkpoints: one Orbax composite a step, `state` (the TrainState, sharded) and `run` (JSON: where the data stands)."""

import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.state import PyTree, TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run: written asynchronously, complete or not there at all, the newest `keep` kept.

    Args:
        run_folder: they lie in its subfolder `checkpoints`.
        keep: older ones are deleted, after a newer one is complete; None keeps all.

    Raises:
        InputError: the folder is there and holds something else.
    """

    def __init__(self, run_folder: Path, keep: int | None = None):
        self.folder = (run_folder / FOLDER).absolute()
        _check_folder(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied from the devices, so that the state may be donated.

        Raises:
            TrainingError: this or the previous save failed.
        """
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._guarded(lambda: self._manager.save(step, args=arguments))

    def wait(self) -> None:
        """Returns once the last save is complete.

        Raises:
            TrainingError: it failed.
        """
        self._guarded(self._manager.wait_until_finished)

    def read_run(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def read_state(self, step: int, abstract: TrainState) -> TrainState:
        """The state, in the shapes, dtypes and shardings of `abstract`."""
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def read_params(self, step: int, abstract: PyTree) -> PyTree:
        """The parameters alone, in the shapes, dtypes and shardings of `abstract`."""
        wanted = {"params": abstract}
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]["params"]

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        self.wait()
        self._manager.close()

    def last_good(self) -> str:
        """The newest complete checkpoint in words, for messages."""
        step = self._manager.latest_step()
        return "no checkpoint is complete yet" if step is None else f"last good checkpoint: {self.folder / str(step)}"

    def _guarded(self, call) -> None:
        try:
            call()
        except Exception as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            logger.exception("The checkpoint was not written.")
            self._manager.reload()
            raise TrainingError(f"writing a checkpoint failed ({reason}); {self.last_good()}") from e


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder of checkpoints")
    for entry in folder.iterdir() if folder.exists() else ():
        if not entry.name.partition(".")[0].isdigit():
            raise InputError(
                f"{folder}: not a folder of checkpoints (it holds {entry.name!r}); choose another --workdir"
            )


def locate(path: str | Path) -> tuple[Path, int]:
    """Resolves a `--checkpoint` option: a run folder (its newest step) or the folder of one step.

    Returns:
        The run folder and the step.

    Raises:
        InputError: it is neither.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER and path.is_dir():
        return path.parent.parent, int(path.name)
    if not (path / FOLDER).is_dir():
        raise InputError(f"--checkpoint={path}: neither a run folder (with {FOLDER}/) nor a step's folder in one")
    checkpoints = Checkpoints(path)
    step = checkpoints.latest()
    checkpoints.close()
    if step is None:
        raise InputError(f"--checkpoint={path}: no complete checkpoint in {path / FOLDER}")
    return path, step
