"""Checkpoints: one Orbax composite a step, of the parts of `Contents`."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import filelock
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.foreign import read_object
from dataflex_jax.json_lines import Written
from dataflex_jax.training import checksums
from dataflex_jax.training.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
LOCK = ".lock"


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: all that a step changes.
        run: in JSON what the run is and where its data stand, see `resume.to_json`.
        selection: what a selector or an order remembers, NumPy arrays; empty without either.
        lines: how far the run folder's files of lines had come, by name; known to the first process.
    """

    state: TrainState
    run: dict[str, Any]
    selection: Mapping[str, Any] = MappingProxyType({})
    lines: Mapping[str, Written] = MappingProxyType({})


class Checkpoints:
    """The checkpoints of one run: written asynchronously, complete or not there at all, the newest `keep` kept.

    What is read of one is read only once all its files are found to be as they were written. As a context manager it
    waits at the end for the save under way, also where the run fails. A run folder that it has made and in which there
    is nothing then is removed again.

    Args:
        run_folder: they lie in its subfolder `checkpoints`.
        keep: older ones are deleted, after a newer one is complete; None keeps all.
        writable: whether to save too; otherwise nothing is touched, not even what another process has half written.

    Raises:
        InputError: the folder is there and holds something else, cannot be written, or another run is using it.
    """

    def __init__(self, run_folder: Path, keep: int | None = None, *, writable: bool = True):
        self.folder = (run_folder / FOLDER).absolute()
        self._lock = None
        self._new = _missing(run_folder) if writable else []
        if writable:
            _make_folder(run_folder, self.folder)
            self._lock = _locked(run_folder)
        _check_folder(self.folder)
        self._found: dict[int, str | None] = {}
        self._saving: tuple[int, Mapping[str, Written]] | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=writable,
            cleanup_tmp_directories=writable,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
            else:
                self._settle()
        finally:
            if self._lock is not None:
                self._lock.release()
                if kind is not None and self._new:
                    _remove_if_empty(self.folder, self._new)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def newest_sound(self) -> int | None:
        """The newest step to go on from; damaged ones after it are put aside, and this is said.

        Raises:
            InputError: all are damaged; nothing is changed then.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        sound = next((step for step in steps if self._fault(step) is None), None)
        if steps and sound is None:
            self._refuse(steps[0])
        damaged = [step for step in steps if step > sound]
        for step in damaged:
            folder = self.folder / str(step)
            logger.warning("%s: damaged (%s); going on from step %d.", folder, self._fault(step), sound)
            if jax.process_index() == 0:
                os.rename(folder, tempfile.mkdtemp(prefix=f"{step}.damaged-", dir=self.folder))
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
            self._manager.reload()
        return sound

    def lines(self, step: int) -> dict[str, Written]:
        """How far the run folder's files of lines had come; empty for a checkpoint of an older version."""
        return checksums.lines(self.folder / str(step))

    def save(self, step: int, contents: Contents) -> None:
        """Starts writing; returns once the arrays are copied from the devices, so that the state may be donated.

        Raises:
            TrainingError: this or the previous save failed.
        """
        items = {"state": ocp.args.StandardSave(contents.state), "run": ocp.args.JsonSave(contents.run)}
        if contents.selection:
            items["selection"] = ocp.args.PyTreeSave(contents.selection)
        self.wait()  # the one before may still write its checksums
        self._saving = step, contents.lines
        self._guarded(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Returns once the last save is complete.

        Raises:
            TrainingError: it failed.
        """
        self._guarded(self._manager.wait_until_finished)

    def clear(self) -> None:
        """Deletes all of them, once the save under way is complete.

        Raises:
            TrainingError: that save failed.
        """
        self.wait()
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def read_run(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
            InputError: it cannot be read.
        """
        return self._read(step, run=ocp.args.JsonRestore())

    def read_state(self, step: int, abstract: TrainState) -> TrainState:
        """The state, in the shapes, dtypes and shardings of `abstract`.

        Raises:
            InputError: it cannot be read.
        """
        return self._read(step, state=ocp.args.StandardRestore(abstract))

    def read_selection(self, step: int) -> dict[str, Any]:
        """What a selector or an order remembers.

        Raises:
            InputError: it cannot be read.
        """
        return self._read(step, selection=ocp.args.PyTreeRestore())

    def read_parts(self, step: int, **wanted: PyTree) -> dict[str, PyTree]:
        """Some fields of the state alone, in the shapes, dtypes and shardings that are given, e.g. of `params`.

        Raises:
            InputError: they cannot be read.
        """
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        # A manager that has read parts of the state would refuse to save it.
        with Checkpoints(self.folder.parent, writable=False) as reading:
            reading._found = self._found
            return reading._read(step, state=arguments)

    def read_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of each leaf of the state, by its path: {"mixer/weights": (7,)}."""
        handler, folder = ocp.PyTreeCheckpointHandler(), self._manager.directory / str(step) / "state"
        return shapes_by_path(self._readable(step, "state", lambda: handler.metadata(folder)).tree)

    def close(self) -> None:
        """Waits and releases the manager's threads.

        Raises:
            TrainingError: the last save failed.
        """
        self.wait()
        self._manager.close()

    def last_good(self) -> str:
        """The newest complete checkpoint in words, for messages; waits for the save under way."""
        self._settle()
        step = self._manager.latest_step()
        return "no checkpoint is complete yet" if step is None else f"last good checkpoint: {self.folder / str(step)}"

    def newest(self) -> str:
        """The newest complete checkpoint in words, as the folder has it now; from any thread, and without waiting."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        steps = [int(entry.name) for entry in entries if entry.name.isdigit()]
        return f"last good checkpoint: {self.folder / str(max(steps))}" if steps else "no checkpoint is complete yet"

    def _settle(self) -> None:
        """Waits for the save under way, whose failure is for `save` and `wait` to report."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def _guarded(self, call) -> None:
        try:
            call()
        except Exception as error:
            if _system_error(error) is None:
                logger.exception("The checkpoint was not written.")
            self._manager.reload()
            raise TrainingError(
                f"{self.folder}: writing a checkpoint failed ({_reason(error)}); {self.last_good()}"
            ) from error

    def _write_checksums(self) -> None:
        """Called by Orbax in the first process when a save is written, right before its folder gets its name."""
        step, lines = self._saving
        checksums.write(next(self.folder.glob(f"{step}.orbax-checkpoint-tmp*")), lines)

    def _fault(self, step: int) -> str | None:
        if step not in self._found:
            folder = self.folder / str(step)
            self._found[step] = checksums.fault(folder) or _renamed(folder)
        return self._found[step]

    def _refuse(self, step: int) -> NoReturn:
        earlier = [other for other in self._manager.all_steps() if other < step]
        way_out = f"delete it to go back to step {max(earlier)}" if earlier else "delete it to start from the beginning"
        raise InputError(f"{self.folder / str(step)}: cannot be read ({self._fault(step)}); it is damaged, {way_out}")

    def _read(self, step: int, **item: ocp.args.CheckpointArgs) -> Any:
        (name,) = item
        return self._readable(step, name, lambda: self._manager.restore(step, args=ocp.args.Composite(**item))[name])

    def _readable(self, step: int, name: str, read: Callable[[], Any]) -> Any:
        """What `read` reads of a checkpoint; its faults are the checkpoint's."""
        if self._fault(step) is not None:
            self._refuse(step)
        try:
            return read()
        except Exception as error:
            # Orbax puts some of what it meets into a bare Exception.
            cause, folder = error.__cause__ or error, self.folder / str(step)
            if (folder / checksums.FILE).exists():
                if not isinstance(cause, (OSError, ValueError, KeyError)):
                    raise
                raise InputError(f"{folder}: its {name} is sound, but cannot be read ({_reason(cause)})") from error
            self._found[step] = _reason(cause)
            self._refuse(step)


def _renamed(folder: Path) -> str | None:
    """What step a checkpoint is of, where its folder has the name of another; None: it has its own, or cannot be read.

    Such a run would go on from that step and never save the steps up to the name.
    """
    try:
        run = read_object(folder / "run" / "metadata")
    except InputError:
        return None
    sampler = run.get("sampler")
    step = sampler.get("step") if isinstance(sampler, dict) else None
    return None if step is None or str(step) == folder.name else f"its folder was renamed, it is of step {step}"


def shapes_by_path(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path, keys and fields joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _system_error(error: Exception) -> str | None:
    """The operating system's words for what went wrong ("No space left on device"), where it was it that failed."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return error.strerror if isinstance(error, OSError) else None


def _reason(error: Exception, limit: int = 200) -> str:
    words = _system_error(error) or next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return words if len(words) <= limit else words[: limit - 3] + "..."


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    folder = folder.absolute()
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_if_empty(checkpoints: Path, new: Sequence[Path]) -> None:
    """Removes a run folder with nothing in it, and of the folders above it those that were made for it."""
    run_folder = checkpoints.parent
    if {entry.name for entry in run_folder.iterdir()} - {LOCK, checkpoints.name} or any(checkpoints.iterdir()):
        return
    (run_folder / LOCK).unlink(missing_ok=True)
    checkpoints.rmdir()
    for folder in new:
        if any(folder.iterdir()):
            break
        folder.rmdir()


def _make_folder(run_folder: Path, folder: Path) -> None:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir={run_folder}: cannot be made as a folder ({error.strerror}); choose another"
        ) from error
    if not os.access(folder if folder.exists() else run_folder, os.W_OK):
        raise InputError(f"--workdir={run_folder}: a folder that cannot be written; choose another")


def _locked(run_folder: Path) -> filelock.BaseFileLock | None:
    """Keeps other runs out of the folder until the process ends; of several processes the first one does."""
    if jax.process_index() != 0:
        return None
    lock = filelock.FileLock(str(run_folder / LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"--workdir={run_folder}: another run is using it; wait for it, or choose another") from error
    return lock


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder of checkpoints")
    for entry in folder.iterdir() if folder.exists() else ():
        if not entry.name.startswith(".") and not entry.name.partition(".")[0].isdigit():
            raise InputError(
                f"{folder}: not a folder of checkpoints (it holds {entry.name!r}); choose another --workdir"
            )
