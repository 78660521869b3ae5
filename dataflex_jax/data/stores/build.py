"""Building domain stores: one resumable pass over a stream, encoded in batches and appended to flat files.

An `Encoder` says what a text becomes: `DocumentEncoder` in documents.py, `ExampleEncoder` in examples.py.
"""

import collections
import concurrent.futures
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import tqdm

from dataflex_jax.data.sources.streams import Document, Stream
from dataflex_jax.data.stores.writer import DIGEST_BYTES, SPLITS, START, Column, DomainWriter, Item, Position
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError

COMMIT_SECONDS = 2.0
_BATCH_BYTES = 4 << 20
_BATCH_RECORDS = 1 << 16
_BATCHES_IN_FLIGHT = 2
_MAX_VALUES = 1000
_OTHER_VALUES = "(others)"
_NARROW_VOCABULARY = 1 << 16


class Event(NamedTuple):
    """What one record comes to.

    `kind` is "train" or "valid" (a document), "bad", "empty", "duplicate" (a training document that is also held out),
    "unattributed" (a bad record without a domain) or "ignored" (of a domain that nobody asked for). An encoder may find
    a document "bad" or "untargeted" after all.
    """

    kind: str
    value: str | None
    after: Position
    consumed: int  # bytes of the stream read so far
    text: str
    size: int  # of `text` in UTF-8
    digest: bytes


class Rejection(NamedTuple):
    """Why a text makes no item: kind "bad", with what is wrong, or "untargeted" (nothing in it to train on)."""

    kind: str
    problem: str


class Encoder(Protocol):
    """What the texts of a store become.

    Attributes:
        columns: of an item, the tokens first.
        identity: JSON that changes when the items do, the tokenizer's part aside.
    """

    columns: tuple[Column, ...]
    identity: dict[str, Any]

    def encode(self, events: Sequence[Event]) -> list[Item | Rejection]:
        """The item of each text."""


def token_dtype(tokenizer: Tokenizer) -> str:
    """The narrowest dtype for a store's tokens."""
    return "uint16" if tokenizer.vocab_size <= _NARROW_VOCABULARY else "uint32"


def read_events(
    stream: Stream,
    valid_fraction: float,
    on_bad_record: str,
    start: Position = START,
    held_out: dict[str | None, set[bytes]] | None = None,
) -> Iterator[Event]:
    """Reads a stream from `start` on and says of every record what it comes to.

    Args:
        stream: with its `domains` known.
        valid_fraction: share of the documents held out by hash where the stream has no held-out parts.
        on_bad_record: "raise" or "skip".
        start: the first record to read.
        held_out: {domain value: digests of the held-out texts before `start`}; filled in place.

    Raises:
        InputError: an unreadable file, or a bad record under on_bad_record="raise".
    """
    held_out = collections.defaultdict(set) if held_out is None else held_out
    consumed = 0
    for phase, parts in enumerate((stream.valid, stream.train)):
        for number, part in enumerate(parts):
            if (phase, number) >= start[:2]:
                first = start.index if (phase, number) == start[:2] else 0
                for document in stream.documents(part, first):
                    kind, text, digest = _judge(document, stream, phase, valid_fraction, held_out)
                    if kind in ("bad", "unattributed") and on_bad_record == "raise":
                        raise _refused(document.problem)
                    after = Position(phase, number, document.index + 1)
                    position = consumed + document.position
                    yield Event(kind, document.value, after, position, document.text or "", len(text), digest)
            consumed += part.size


def _judge(
    document: Document, stream: Stream, phase: int, valid_fraction: float, held_out: dict[str | None, set[bytes]]
) -> tuple[str, bytes, bytes]:
    """The kind of a record, its text in UTF-8 and the digest that decides the split."""
    if stream.domain_field is not None and document.value is None:
        return "unattributed", b"", b""
    if document.value not in stream.domains:
        return "ignored", b"", b""
    if document.text is None:
        return "bad", b"", b""
    if not document.text or document.text.isspace():
        return "empty", b"", b""
    text = document.text.encode()
    digest = hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()
    if phase == 0:
        held_out[document.value].add(digest)
        return "valid", text, digest
    if stream.valid:
        return ("duplicate" if digest in held_out[document.value] else "train"), text, digest
    share = int.from_bytes(digest[:8], "little") / 2**64
    return ("valid" if share < valid_fraction else "train"), text, digest


def build_stores(
    stream: Stream,
    writers: dict[str | None, DomainWriter],
    encoder: Encoder,
    *,
    valid_fraction: float,
    on_bad_record: str,
    bar: tqdm.tqdm,
) -> None:
    """Reads a stream once and finishes the stores of all `writers`, {domain value: writer}.

    Tokens are written as they come; memory holds a few batches of some megabytes of text. Each store resumes from its
    own last commit.

    Raises:
        InputError: bad input, or a domain without training documents.
        OSError: no room to write; what is committed is safe.
    """
    behind = min(writers.values(), key=lambda writer: writer.progress.position)
    start, values = behind.progress.position, collections.Counter(behind.progress.values)
    held_out = collections.defaultdict(set, {value: writer.digests() for value, writer in writers.items()})
    events = read_events(stream, valid_fraction, on_bad_record, start, held_out)
    after, consumed, committed = start, behind.progress.consumed, time.monotonic()
    bar_start = bar.n
    if not bar.disable:
        bar.initial += consumed  # what an earlier run did must not count as this run's speed
    bar.update(consumed)
    try:
        for batch, items in _encoded(_batches(events), encoder):
            if on_bad_record == "raise":
                _raise_first_problem(batch, items, stream)
            _apply(batch, items, stream, writers, values)
            after, consumed = batch[-1].after, batch[-1].consumed
            bar.update(bar_start + consumed - bar.n)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                _commit(writers, after, consumed, values)
                committed = time.monotonic()
        _commit(writers, after, consumed, values)
        _finish(writers)
    finally:
        for writer in writers.values():
            writer.close()


def _commit(writers: dict[str | None, DomainWriter], after: Position, consumed: int, values: dict[str, int]) -> None:
    for writer in writers.values():
        if after >= writer.progress.position:
            writer.commit(after, consumed, values)


def _finish(writers: dict[str | None, DomainWriter]) -> None:
    empty = None
    for writer in writers.values():
        try:
            writer.finish()
        except InputError as error:  # the other domains' stores are complete all the same
            empty = empty or error
    if empty:
        raise empty


def _batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    batch, size = [], 0
    for event in events:
        batch.append(event)
        size += event.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterable[list[Event]], encoder: Encoder
) -> Iterator[tuple[list[Event], list[Item | Rejection | None]]]:
    """Encodes batches in order, a few ahead, so that reading and writing overlap with the encoder's threads."""

    def encode(batch: list[Event]) -> list[Item | Rejection | None]:
        items = iter(encoder.encode([event for event in batch if event.kind in SPLITS]))
        return [next(items) if event.kind in SPLITS else None for event in batch]

    with concurrent.futures.ThreadPoolExecutor(_BATCHES_IN_FLIGHT) as pool:
        pending = collections.deque()
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > _BATCHES_IN_FLIGHT:
                done, items = pending.popleft()
                yield done, items.result()
        for done, items in pending:
            yield done, items.result()


def _raise_first_problem(batch: list[Event], items: list[Item | Rejection | None], stream: Stream) -> None:
    for event, item in zip(batch, items, strict=True):
        if isinstance(item, Rejection) and item.kind == "bad":
            phase, part, index = event.after
            raise _refused(f"{(stream.valid, stream.train)[phase][part].place(index - 1)}: {item.problem}")


def _refused(problem: str) -> InputError:
    return InputError(f"{problem} (data.on_bad_record='skip' passes over bad records)")


def _apply(
    batch: list[Event],
    items: list[Item | Rejection | None],
    stream: Stream,
    writers: dict[str | None, DomainWriter],
    values: collections.Counter,
) -> None:
    accepted = collections.defaultdict(lambda: ([], []))
    for event, item in zip(batch, items, strict=True):
        if event.value is not None:
            known = event.value in values or len(values) < _MAX_VALUES
            values[event.value if known else _OTHER_VALUES] += 1
        concerned = writers.values() if event.kind == "unattributed" else filter(None, [writers.get(event.value)])
        for writer in concerned:
            if event.after <= writer.progress.position:
                continue
            if not isinstance(item, Item):
                writer.count(event.kind if item is None else item.kind, 1)
                continue
            found, digests = accepted[event.value, event.kind]
            found.append(item)
            if stream.valid and event.kind == "valid":
                digests.append(event.digest)
    for (value, split), content in accepted.items():
        writers[value].append(split, *content)
