"""What reaches TensorBoard and Weights & Biases: event files read back, and a `wandb` that notes what it is told."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def events(folder: Path) -> list[list[Event]]:
    """The events of every TensorBoard file of a run, file by file in the order of writing."""
    files = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.name.rsplit(".", 1)[-1]):
        data, at, found = path.read_bytes(), 0, []
        while at < len(data):
            # A record: length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
        files.append(found)
    return files


def scalars(file: list[Event]) -> dict[tuple[str, int], float]:
    """(tag, step) -> value."""
    return {(value.tag, event.step): value.simple_value for event in file for value in event.summary.value}


class Wandb:
    """To be put into `sys.modules`; `runs` are those that it began."""

    def __init__(self):
        self.runs: list[WandbRun] = []

    def init(self, **arguments):
        self.runs.append(WandbRun(arguments))
        return self.runs[-1]


class WandbRun:
    """What `wandb.init` returns."""

    def __init__(self, arguments):
        self.arguments, self.logged, self.defined, self.finished = arguments, [], [], False
        self.id = arguments.get("id", "new-id")

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True
