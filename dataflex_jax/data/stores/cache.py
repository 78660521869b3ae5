"""The cache of stores: each domain's folder found by its key, or built.

    CACHE_DIR/stores/NAME-KEY/  train.COLUMN train.offsets valid.COLUMN valid.offsets meta.json

KEY is a hash of the content of the input, the tokenizer and the options that matter, so a changed input file is
noticed, and adding a domain leaves the other stores alone. NAME is for people: domains with one content share a store.
Stores of other keys are never deleted. A cache that is complete is only read. What is damaged is never trained on but
made again from the sources. documents.py and examples.py say what lies in a store.
"""

import collections
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import FilePart
from dataflex_jax.data.sources.streams import Stream
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.data.stores.build import Encoder, build_stores, read_events
from dataflex_jax.data.stores.checksums import VERIFY
from dataflex_jax.data.stores.hashes import FileHashes, progress_bar
from dataflex_jax.data.stores.lock import CacheLock, cache_lock
from dataflex_jax.data.stores.store import Store, read_meta, skipped_records, store_fault
from dataflex_jax.data.stores.writer import SPLITS, DomainWriter
from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import digest, expanded, keyed_path, read_sealed, replace_sealed

logger = logging.getLogger(__name__)

_FORMAT = 2
_TOKENIZER_TRAINING_BYTES = 256 << 20
_MAX_FOUND_DOMAINS = 1000
_MOST_LINES = 20  # about domains, one each


class _Wanted(NamedTuple):
    """A domain's store, which may not be there yet.

    Attributes:
        name: of the domain.
        value: of the stream's domain field; None without one.
        identity: the content, the tokenizer and the options that make the store what it is.
        key: a hash of them (32 hex digits).
        path: its folder.
        stream: what it is built from.
        remarks: for people; the beginning of meta.json, before the identity.
    """

    name: str
    value: str | None
    identity: dict[str, Any]
    key: str
    path: Path
    stream: Stream
    remarks: dict[str, Any]


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
    moment, the same call goes on where it was and ends with the same bytes. `data.verify` says how closely what is
    there is looked at: see `checksums.fault`; under "content" the input files are also hashed again.

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
    cache_dir = Path(expanded(data.cache_dir))
    with cache_lock(cache_dir, "the rows store") as lock:
        if not cache_dir.is_dir():
            lock.take("it is to be made")
        hashes = FileHashes(cache_dir / "fingerprints.json", lock, again=data.verify == "content", progress=progress)
        streams, contents = [], []
        for stream in open_source(data):
            content = digest([[part.fingerprint(hashes) for part in parts] for parts in (stream.valid, stream.train)])
            if stream.domains is None:
                stream = dataclasses.replace(stream, domains=_found_domains(stream, content, cache_dir, lock, progress))
            _check_names(stream)
            streams.append(stream)
            contents.append(_describe(stream, content, data))
        hashes.save()
        tokenizer = load_tokenizer(
            data.tokenizer,
            texts=lambda: map(plain_text, _training_texts(streams, data, lock)),
            cache_dir=cache_dir,
            eos_token=data.eos_token,
            begin_of_text=data.begin_of_text,
            texts_fingerprint=digest(
                [[content, list(stream.domains)] for content, stream in zip(contents, streams, strict=True)]
            ),
            special_tokens=special_tokens,
        )
        encoder = make_encoder(tokenizer)
        wanted = _wanted_stores(streams, contents, tokenizer, encoder, data, cache_dir)
        _build_missing(wanted, encoder, data, lock, progress)
    _report(wanted, held_out=data.valid_fraction > 0)
    stores = (Store.load(store.name, store.key, store.path, encoder.columns, store.stream) for store in wanted)
    return tuple(stores), tokenizer


def _check_options(data: ConfigDict) -> None:
    if data.on_bad_record not in ("raise", "skip"):
        raise InputError("must be one of 'raise', 'skip'", option="data.on_bad_record", value=data.on_bad_record)
    if not 0 <= data.valid_fraction < 1:
        raise InputError("must be a number >= 0 and < 1", option="data.valid_fraction", value=data.valid_fraction)
    if data.verify not in VERIFY:
        raise InputError(f"must be one of {', '.join(map(repr, VERIFY))}", option="data.verify", value=data.verify)
    if not data.cache_dir:
        raise InputError("needs a folder for the tokenised rows", option="data.cache_dir", value=data.cache_dir)


def _check_names(stream: Stream) -> None:
    for name in stream.domains.values():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"domain {name!r}: the name is not UTF-8; give its file or field another one") from error


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


def _found_domains(stream: Stream, content: str, cache_dir: Path, lock: CacheLock, progress: bool) -> dict[str, str]:
    """All values of data.domain_field, {value: value}, found by reading everything once."""
    path = cache_dir / "domain_values" / f"{digest([content, stream.domain_field])}.json"
    values = _kept_values(path)
    if values is None and lock.take(f"the values of {stream.domain_field} are to be found"):
        values = _kept_values(path)
    if values is None:
        if path.exists():
            logger.warning("%s: damaged; the values of %s are looked for again", path, stream.domain_field)
        values = _domain_values(stream, progress)
        replace_sealed(path, {"values": values})
    return {value: value for value in values}


def _kept_values(path: Path) -> list[str] | None:
    """The values found by an earlier start; None: there are none, or they are damaged."""
    try:
        kept = read_sealed(path)
    except InputError:
        return None
    # Version 0.1.0 wrote the bare list.
    match kept:
        case {"values": [*values]} | [*values] if values and all(isinstance(value, str) for value in values):
            return values
    return None


def _domain_values(stream: Stream, progress: bool) -> list[str]:
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
    return sorted(found)


def _training_texts(streams: Sequence[Stream], data: ConfigDict, lock: CacheLock) -> Iterator[str]:
    """Training documents for a tokenizer: of each stream the first ones, up to its share of a fixed size."""
    lock.take("the tokenizer is to be trained")
    return _first_texts(streams, data)


def _first_texts(streams: Sequence[Stream], data: ConfigDict) -> Iterator[str]:
    for stream in streams:
        left = _TOKENIZER_TRAINING_BYTES // len(streams)
        for event in read_events(stream, data.valid_fraction, data.on_bad_record):
            if event.kind == "train":
                yield event.text
                left -= event.size
            if left <= 0:
                break


def _wanted_stores(
    streams: Sequence[Stream],
    contents: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    encoder: Encoder,
    data: ConfigDict,
    cache_dir: Path,
) -> list[_Wanted]:
    wanted, paths = [], {}
    for stream, content in zip(streams, contents, strict=True):
        for value, name in stream.domains.items():
            identity = {
                "format": _FORMAT,
                "tokenizer": tokenizer.fingerprint,
                "encoder": encoder.identity,
                "domain_value": value,
                **content,
            }
            key = digest(identity)
            path = paths.get(key) or keyed_path(cache_dir / "stores", name, key[:16])
            paths[key] = path
            remarks = {"name": name, "tokenizer_spec": data.tokenizer, "eos_id": tokenizer.eos_id}
            wanted.append(_Wanted(name, value, identity, key, path, stream, remarks))
    return wanted


def _build_missing(
    wanted: Sequence[_Wanted], encoder: Encoder, data: ConfigDict, lock: CacheLock, progress: bool
) -> None:
    faults = _faults(wanted, encoder, data, progress)
    if faults and lock.take(next(iter(faults.values()))):
        faults = _faults([store for store in wanted if store.path in faults], encoder, data, progress)
    missing: dict[Path, _Wanted] = {}
    by_stream: dict[int, list[_Wanted]] = {}
    for store in wanted:
        if store.path in faults and missing.setdefault(store.path, store) is store:
            by_stream.setdefault(id(store.stream), []).append(store)
            if store.path.exists():
                logger.warning("%s; building the store again", faults[store.path])
                shutil.rmtree(store.path)
    streams = [stores[0].stream for stores in by_stream.values()]
    total = sum(part.size for stream in streams for part in stream.valid + stream.train)
    with progress_bar(total, "tokenizing", progress and bool(missing)) as bar:
        for stream, stores in zip(streams, by_stream.values(), strict=True):
            names = {store.value: store.name for store in stores}
            what = next(iter(names.values())) if len(names) == 1 else f"{len(names)} domains"
            bar.set_description(f"tokenizing {what}", refresh=False)
            build_stores(
                dataclasses.replace(stream, domains=names),
                {store.value: _writer(store, encoder, data) for store in stores},
                encoder,
                valid_fraction=data.valid_fraction,
                on_bad_record=data.on_bad_record,
                bar=bar,
            )


def _writer(store: _Wanted, encoder: Encoder, data: ConfigDict) -> DomainWriter:
    return DomainWriter(
        store.path,
        store.name,
        encoder.columns,
        store.remarks | store.identity,
        keep_skipped=data.on_bad_record == "skip",
        verify=data.verify,
    )


def _faults(wanted: Sequence[_Wanted], encoder: Encoder, data: ConfigDict, progress: bool) -> dict[Path, str]:
    """Why the stores that cannot be used cannot be."""
    found = {store.path: _fault(store, encoder, data, progress) for store in wanted}
    return {path: fault for path, fault in found.items() if fault is not None}


def _fault(store: _Wanted, encoder: Encoder, data: ConfigDict, progress: bool) -> str | None:
    if not store.path.exists():
        return f"there is no store of domain {store.name!r} yet"
    if fault := store_fault(store.path, store.identity, encoder.columns, data.verify, progress):
        return fault
    skipped = skipped_records(read_meta(store.path))
    if skipped and data.on_bad_record == "raise":
        return f"{store.path}: made without {skipped} bad records, which data.on_bad_record = 'raise' refuses"
    return None


def _report(wanted: Sequence[_Wanted], *, held_out: bool) -> None:
    """Says what the stores hold; `held_out`: whether each domain is meant to have held-out documents."""
    ignored: dict[str, int] = {}
    counts, without = collections.Counter(), []
    log = logger.debug if len(wanted) > _MOST_LINES else logger.info
    for store in wanted:
        meta = read_meta(store.path)
        train, valid = (meta[split] for split in SPLITS)
        ignored |= meta["records_by_value"]
        counts.update({(split, kind): meta[split][kind] for split in SPLITS for kind in ("documents", "tokens")})
        files = sum(isinstance(part, FilePart) for part in store.stream.train + store.stream.valid)
        log(
            "domain %s: train %s documents, %s tokens, %s bytes; held out %s documents, %s tokens%s",
            store.name,
            *(f"{train[kind]:,}" for kind in ("documents", "tokens", "bytes")),
            *(f"{valid[kind]:,}" for kind in ("documents", "tokens")),
            f"; of {files} file{'s' * (files > 1)}" if files else "",
        )
        if left_out := _left_out(meta):
            logger.warning("domain %s: left out: %s", store.name, left_out)
        if not valid["documents"]:
            without.append(store.name)
    if len(wanted) > _MOST_LINES:
        numbers = (f"{counts[split, kind]:,}" for split in SPLITS for kind in ("documents", "tokens"))
        logger.info(
            "%d domains: train %s documents, %s tokens; held out %s documents, %s tokens", len(wanted), *numbers
        )
    if without and held_out:
        listed = one_line(", ".join(without))
        logger.warning("domain %s: no held-out document; raise data.valid_fraction for evaluation", listed)
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
