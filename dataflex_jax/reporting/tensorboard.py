"""Scalars as TensorBoard's event files."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_SECONDS_BETWEEN_FLUSHES = 30.0


class TensorBoard:
    """Writes scalars in the calling thread, so that a full disk is reported where a run's other files report it.

    (In the thread of tensorboardX's SummaryWriter it is a traceback, after which the run waits for that thread.)

    Args:
        folder: of the event files, a new one each time.
        purge_step: TensorBoard hides what earlier files have from this step on; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        # EventsWriter's own names have a resolution of one second, and the later of two writers would overwrite.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()
