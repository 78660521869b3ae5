"""A progress line, and throughput.

Everything here runs on the host; nothing is traced.
"""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Self, TextIO

import jax
from tqdm import tqdm


class Progress:
    """A progress bar on stderr with loss, tokens/s and the time left; on other processes than the first, nothing.

    Where stderr is no terminal (a batch job's log) it prints a plain line every `seconds_between_lines` instead.

    Args:
        total: steps of the whole run.
        initial: steps done before, when resuming.
        unit: what one count is.
        seconds_between_lines: only for logs; a terminal is refreshed as tqdm does.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        unit: str = "step",
        *,
        seconds_between_lines: float = 30.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file = file or sys.stderr
        self._active = jax.process_index() == 0
        self._total, self._initial, self._unit = total, initial, unit
        self._clock, self._interval = clock, seconds_between_lines
        self._start = self._last_line = clock()
        self._count = self._printed = initial
        self._note = ""
        terminal = self._active and self._file.isatty()
        self._bar = (
            tqdm(total=total, initial=initial, unit=unit, file=self._file, dynamic_ncols=True) if terminal else None
        )

    def update(self, count: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that `count` of `total` are done, with the latest loss [nats/token] and rate, where they are known."""
        if not self._active:
            return
        parts = []
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if tokens_per_second is not None:
            parts.append(f"{tqdm.format_sizeof(float(tokens_per_second))} tokens/s")
        if parts:
            self._note = ", ".join(parts)
        self._count = count
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count - self._bar.n)
        elif count >= self._total or self._clock() - self._last_line >= self._interval:
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line of its own without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._active:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen or in the log."""
        if self._bar is not None:
            self._bar.close()
        elif self._active and self._count > self._printed:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._printed = self._clock(), self._count
        line = tqdm.format_meter(
            self._count,
            self._total,
            self._last_line - self._start,
            ncols=0,
            unit=self._unit,
            initial=self._initial,
            postfix=self._note,
        )
        print(line, file=self._file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Throughput:
    """Tokens per second over the last `window` steps, and the model FLOPs utilisation (MFU).

    MFU is tokens/s x FLOPs/token / peak FLOP/s (PaLM, arXiv:2204.02311, appendix B). The first step only starts the
    clock, so its compilation is not counted.

    Args:
        flops_per_token: of forward and backward pass of the model, without recomputation.
        peak_flops: dense FLOP/s of all devices of the run together; None where unknown, then `mfu` is None.
        window: steps.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token, self._peak_flops, self._clock = flops_per_token, peak_flops, clock
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)
        self._tokens = 0
        self._excluded = 0.0

    def update(self, tokens: int) -> None:
        """Notes that a step of `tokens` tokens (all hosts) has ended: call it when its result is on the host."""
        self._tokens += tokens
        self._marks.append((self._clock() - self._excluded, self._tokens))

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Stops the clock for an evaluation, a checkpoint or a sweep."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - start

    @property
    def tokens_per_second(self) -> float | None:
        """None until the second step has ended."""
        if len(self._marks) < 2:
            return None
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else None

    @property
    def mfu(self) -> float | None:
        """A fraction of 1; None until the second step has ended or where the peak is unknown."""
        rate = self.tokens_per_second
        if rate is None or self._flops_per_token is None or self._peak_flops is None:
            return None
        return rate * self._flops_per_token / self._peak_flops
