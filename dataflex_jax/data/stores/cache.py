"""The cache of stores: each domain's folder found by its key, or built.

    CACHE_DIR/stores/NAME-KEY/  train.COLUMN train.offsets valid.COLUMN valid.offsets meta.json

KEY is a hash of the content of the input, the tokenizer and the options that matter, so a changed input file is
noticed, and adding a domain leaves the other stores alone. Stores of other keys are never deleted. documents.py and
examples.py say what lies in a store.
"""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from ml_collections import ConfigDict

from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import FilePart
from dataflex_jax.data.sources.streams import Stream
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.data.stores.build import Encoder, build_stores, read_events
from dataflex_jax.data.stores.hashes import FileHashes, progress_bar
from dataflex_jax.data.stores.store import Store, read_meta, skipped_records
from dataflex_jax.data.stores.writer import SPLITS, DomainWriter, partial_folder
from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError, TrainingError, is_disk_full
from dataflex_jax.files import digest, replace_json

logger = logging.getLogger(__name__)

_FORMAT = 2
_TOKENIZER_TRAINING_BYTES = 256 << 20
_MAX_FOUND_DOMAINS = 1000


class _Wanted(NamedTuple):
    """A domain's store, which may not be there yet.

    Attributes:
        name: of the domain.
        value: of the stream's domain field; None without one.
        key: hash of content, tokenizer and options (32 hex digits).
        path: its folder.
        stream: what it is built from.
        description: what the key stands for, and more for people; the beginning of meta.json.
    """

    name: str
    value: str | None
    key: str
    path: Path
    stream: Stream
    description: dict[str, Any]


def open_stores(
    data: ConfigDict,
    make_encoder: Callable[[Tokenizer], Encoder],
    *,
    plain_text: Callable[[str], str] = str,
    special_tokens: Sequence[str] = (),
    progress: bool = True,
) -> tuple[tuple[Store, ...], Tokenizer]:
    """Opens the store of every domain of `config.data`, building what is missing.

    Safe to call from several processes or hosts that share `data.cache_dir`: one builds, the others wait. Killed at any
    moment, the same call goes on where it was and ends with the same bytes.

    Args:
        data: the `data` section of a config (see configs/base.py for the fields).
        make_encoder: what the texts become.
        plain_text: of a stream's text what a tokenizer is trained on.
        special_tokens: that a tokenizer made here is to have.
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        The stores, in order of `data.domains` (sorted by name where that is None), and the tokenizer.

    Raises:
        InputError: bad input or options, in one line.
        TrainingError: no space left; what was built is kept.
    """
    _check_options(data)
    cache_dir = Path(data.cache_dir).expanduser()
    with _locked(cache_dir), _full_disk_said(cache_dir):
        hashes = FileHashes(cache_dir / "fingerprints.json", progress)
        streams, contents = [], []
        for stream in open_source(data):
            content = digest([[part.fingerprint(hashes) for part in parts] for parts in (stream.valid, stream.train)])
            if stream.domains is None:
                stream = dataclasses.replace(stream, domains=_found_domains(stream, content, cache_dir, progress))
            streams.append(stream)
            contents.append(_describe(stream, content, data))
        hashes.save()
        tokenizer = load_tokenizer(
            data.tokenizer,
            texts=lambda: map(plain_text, _training_texts(streams, data)),
            cache_dir=cache_dir,
            eos_token=data.eos_token,
            texts_fingerprint=digest(
                [[content, list(stream.domains)] for content, stream in zip(contents, streams, strict=True)]
            ),
            special_tokens=special_tokens,
        )
        encoder = make_encoder(tokenizer)
        wanted = [
            store
            for stream, content in zip(streams, contents, strict=True)
            for store in _wanted_stores(stream, content, tokenizer, encoder, data, cache_dir)
        ]
        _build_missing(wanted, encoder, data, progress)
    _report(wanted)
    stores = (Store.load(store.name, store.key, store.path, encoder.columns, store.stream) for store in wanted)
    return tuple(stores), tokenizer


def _check_options(data: ConfigDict) -> None:
    if data.on_bad_record not in ("raise", "skip"):
        raise InputError("must be one of 'raise', 'skip'", option="data.on_bad_record", value=data.on_bad_record)
    if not 0 <= data.valid_fraction < 1:
        raise InputError("must be a number >= 0 and < 1", option="data.valid_fraction", value=data.valid_fraction)
    if not data.cache_dir:
        raise InputError("needs a folder for the tokenised rows", option="data.cache_dir", value=data.cache_dir)


def _locked(cache_dir: Path) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(str(cache_dir / ".lock"))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("waiting for another process that builds the rows store in %s", cache_dir)
        return lock.acquire()
    except OSError as error:
        reason = f"is not a writable folder: {error.strerror}"
        raise InputError(reason, option="data.cache_dir", value=str(cache_dir)) from error


@contextlib.contextmanager
def _full_disk_said(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(
            f"{cache_dir}: no space left while building the rows store; what is committed is safe, free some space (or "
            "set data.cache_dir elsewhere) and run the same command again"
        ) from error


def _describe(stream: Stream, content: str, data: ConfigDict) -> dict[str, Any]:
    """What decides which documents of a stream are training documents."""
    return {
        "content": content,
        "reader": stream.reader.identity,
        "domain_field": stream.domain_field,
        # A split that comes with the data does not depend on the fraction.
        "valid_fraction": None if stream.valid else float(data.valid_fraction),
        # Stores from before messages could be marked stay in use where none is.
        **({"marked": True} if _is_marked(stream) else {}),
    }


def _is_marked(stream: Stream) -> bool:
    return isinstance(stream.reader, ConversationReader) and stream.reader.is_marked(stream.valid + stream.train)


def _found_domains(stream: Stream, content: str, cache_dir: Path, progress: bool) -> dict[str, str]:
    """All values of data.domain_field, {value: value}, found by reading everything once."""
    path = cache_dir / "domain_values" / f"{digest([content, stream.domain_field])}.json"
    if not path.is_file():
        found, problem, base = set(), None, 0
        with progress_bar(sum(part.size for part in stream.train), f"finding {stream.domain_field}", progress) as bar:
            for part in stream.train:
                for document in stream.documents(part):
                    if document.value is not None:
                        found.add(document.value)
                    problem = problem or document.problem
                    if len(found) > _MAX_FOUND_DOMAINS:
                        raise InputError(
                            f"over {_MAX_FOUND_DOMAINS} values; name the wanted ones in domains",
                            option="data.domain_field",
                            value=stream.domain_field,
                        )
                    bar.update(base + document.position - bar.n)
                base += part.size
        if not found:
            raise InputError(problem or f"{stream.train[0].place(0)}: no record")
        replace_json(path, sorted(found))
    return {value: value for value in json.loads(path.read_text())}


def _training_texts(streams: Sequence[Stream], data: ConfigDict) -> Iterator[str]:
    """Training documents for a tokenizer: of each stream the first ones, up to its share of a fixed size."""
    for stream in streams:
        left = _TOKENIZER_TRAINING_BYTES // len(streams)
        for event in read_events(stream, data.valid_fraction, data.on_bad_record):
            if event.kind == "train":
                yield event.text
                left -= event.size
            if left <= 0:
                break


def _wanted_stores(
    stream: Stream,
    content: dict[str, Any],
    tokenizer: Tokenizer,
    encoder: Encoder,
    data: ConfigDict,
    cache_dir: Path,
) -> Iterator[_Wanted]:
    for value, name in stream.domains.items():
        identity = {
            "format": _FORMAT,
            "tokenizer": tokenizer.fingerprint,
            "encoder": encoder.identity,
            "domain_value": value,
            **content,
        }
        key = digest(identity)
        description = {"name": name, "tokenizer_spec": data.tokenizer, "eos_id": tokenizer.eos_id, **identity}
        slug = re.sub(r"[^\w.-]+", "_", name)[:80]
        yield _Wanted(name, value, key, cache_dir / "stores" / f"{slug}-{key[:16]}", stream, description)


def _build_missing(wanted: Sequence[_Wanted], encoder: Encoder, data: ConfigDict, progress: bool) -> None:
    keep_skipped = data.on_bad_record == "skip"
    missing: dict[int, list[_Wanted]] = {}
    for store in wanted:
        if not _is_complete(store.path, encoder, keep_skipped):
            missing.setdefault(id(store.stream), []).append(store)
    streams = [stores[0].stream for stores in missing.values()]
    total = sum(part.size for stream in streams for part in stream.valid + stream.train)
    with progress_bar(total, "tokenizing", progress and bool(missing)) as bar:
        for stream, stores in zip(streams, missing.values(), strict=True):
            names = {store.value: store.name for store in stores}
            what = next(iter(names.values())) if len(names) == 1 else f"{len(names)} domains"
            bar.set_description(f"tokenizing {what}", refresh=False)
            writers = {
                store.value: DomainWriter(store.path, store.name, encoder.columns, store.description, keep_skipped)
                for store in stores
            }
            build_stores(
                dataclasses.replace(stream, domains=names),
                writers,
                encoder,
                valid_fraction=data.valid_fraction,
                on_bad_record=data.on_bad_record,
                bar=bar,
            )


def _is_complete(folder: Path, encoder: Encoder, keep_skipped: bool) -> bool:
    """Whether a finished, undamaged store lies in the folder; what is in the way of a new one is removed."""
    if not folder.exists():
        return False
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    meta = read_meta(folder)
    if skipped_records(meta) and not keep_skipped:
        shutil.rmtree(folder)
        return False
    for split in SPLITS:
        tokens, items = meta[split]["tokens"], meta[split]["documents"]
        sizes = {f"{split}.offsets": (items + 1) * 8}
        for column in encoder.columns:
            values = items if column.per_item else tokens
            sizes[f"{split}.{column.name}"] = values * np.dtype(column.dtype).itemsize
        paths = {folder / name: size for name, size in sizes.items()}
        if any(not path.is_file() or path.stat().st_size != size for path, size in paths.items()):
            logger.warning("%s: files of the store are damaged; building it again", folder)
            shutil.rmtree(folder)
            return False
    return True


def _report(wanted: Sequence[_Wanted]) -> None:
    ignored: dict[str, int] = {}
    for store in wanted:
        meta = read_meta(store.path)
        train, valid = (meta[split] for split in SPLITS)
        ignored |= meta["records_by_value"]
        files = sum(isinstance(part, FilePart) for part in store.stream.train + store.stream.valid)
        logger.info(
            "domain %s: train %s documents, %s tokens, %s bytes; held out %s documents, %s tokens%s",
            store.name,
            *(f"{train[kind]:,}" for kind in ("documents", "tokens", "bytes")),
            *(f"{valid[kind]:,}" for kind in ("documents", "tokens")),
            f"; of {files} file{'s' * (files > 1)}" if files else "",
        )
        if left_out := _left_out(meta):
            logger.warning("domain %s: left out: %s", store.name, left_out)
        if not valid["documents"]:
            logger.warning("domain %s: no held-out document; raise data.valid_fraction for evaluation", store.name)
    names = {store.value for store in wanted}
    ignored = {value: count for value, count in ignored.items() if value not in names}
    if ignored:
        listed = ", ".join(f"{value} {count:,}" for value, count in sorted(ignored.items())[:20])
        logger.warning("%d records of domains not in data.domains are ignored: %s", sum(ignored.values()), listed)


def _left_out(meta: dict[str, Any]) -> str:
    counts = {
        "bad records": skipped_records(meta),
        "empty documents": meta["empty_documents"],
        "examples without a target, or without one within data.cutoff_len": meta["untargeted_examples"],
        "training documents that are held out too": meta["held_out_duplicates"],
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
