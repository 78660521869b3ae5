"""The rows store: every domain tokenised once into flat, memory-mapped token files.

    CACHE_DIR/stores/NAME-KEY/  train.tokens train.offsets valid.tokens valid.offsets meta.json

`*.tokens` holds all documents of a split one after the other, an end-of-text id after each (uint16, or uint32 for
vocabularies over 65,536); `*.offsets` (int64 [documents + 1]) says where each starts and the last one ends. KEY is a
hash of the content of the input, the tokenizer and the options that matter, so a changed input file is noticed, and
adding a domain leaves the other stores alone. Stores of other keys are never deleted. Any `seq_len` reads from the same
store.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from jaxtyping import Int32, Int64, UInt
from ml_collections import ConfigDict

from dataflex_jax.data.build import build_stores, read_events
from dataflex_jax.data.hashes import FileHashes, digest, progress_bar, replace_json
from dataflex_jax.data.sources import Stream, open_source
from dataflex_jax.data.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.data.writer import SPLITS, DomainWriter, partial_folder
from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)

_FORMAT = 1
_NARROW_VOCABULARY = 1 << 16
_TOKENIZER_TRAINING_BYTES = 256 << 20
_MAX_FOUND_DOMAINS = 1000


@dataclasses.dataclass(frozen=True)
class TokenArray:
    """One split of one domain. Cheap to pickle: files are mapped at the first access, in whichever process.

    Attributes:
        path: the token file; the offsets lie beside it.
        dtype: "uint16" or "uint32".
        num_tokens: end-of-text ids included.
        num_documents: documents.
        num_bytes: of the documents' text in UTF-8.
    """

    path: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int

    @functools.cached_property
    def tokens(self) -> UInt[np.ndarray, " num_tokens"]:
        """All tokens, read-only and memory-mapped."""
        return _memory_map(self.path, self.dtype)

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " num_documents+1"]:
        """Document d is `tokens[offsets[d]:offsets[d + 1]]`."""
        return _memory_map(str(Path(self.path).with_suffix(".offsets")), "int64")

    def num_rows(self, seq_len: int) -> int:
        """Rows of `seq_len` inputs and their next tokens; only the last partial row is left out."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def row(self, i: int, seq_len: int) -> Int32[np.ndarray, " seq_len+1"]:
        """Row `i`: `tokens[i*T : i*T + T + 1]`, its last token being the first of the next row.

        Raises:
            IndexError: `i` is not in [0, num_rows(seq_len)).
        """
        if not 0 <= i < self.num_rows(seq_len):
            raise IndexError(f"row {i} of {self.num_rows(seq_len)} rows of {seq_len} tokens in {self.path}")
        return self.tokens[i * seq_len : (i + 1) * seq_len + 1].astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a pickled memory map would carry all tokens."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class DomainStore:
    """One domain's documents as token ids.

    Attributes:
        name: of the domain.
        key: hash of content, tokenizer and options (32 hex digits).
        path: the store's folder.
        train: training split.
        valid: held-out split, never trained on; may be empty.
        skipped_records: bad records passed over (data.on_bad_record="skip"), those without a domain included.
    """

    name: str
    key: str
    path: str
    train: TokenArray
    valid: TokenArray
    skipped_records: int


def open_stores(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[DomainStore, ...], Tokenizer]:
    """Opens the rows store of every domain of `config.data`, building what is missing.

    Safe to call from several processes or hosts that share `data.cache_dir`: one builds, the others wait. Killed at any
    moment, the same call goes on where it was and ends with the same bytes.

    Args:
        data: the `data` section of a config (see configs/base.py for the fields).
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        The stores, in order of `data.domains` (sorted by name where that is None), and the tokenizer.

    Raises:
        InputError: bad input or options, in one line.
        TrainingError: no space left; what was built is kept.
    """
    _check_options(data)
    cache_dir = Path(data.cache_dir).expanduser()
    with _locked(cache_dir):
        return _open_locked(data, cache_dir, progress)


def _check_options(data: ConfigDict) -> None:
    if data.on_bad_record not in ("raise", "skip"):
        raise InputError(f"data.on_bad_record={data.on_bad_record!r}: accepted are 'raise' and 'skip'")
    if not 0 <= data.valid_fraction < 1:
        raise InputError(f"data.valid_fraction={data.valid_fraction}: accepted are values from 0 to below 1")
    if not data.cache_dir:
        raise InputError("data.cache_dir is not set; it needs a folder for the tokenised rows")


def _locked(cache_dir: Path) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(str(cache_dir / ".lock"))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("waiting for another process that builds the rows store in %s", cache_dir)
        return lock.acquire()
    except OSError as error:
        raise InputError(f"data.cache_dir={cache_dir}: is not a writable folder: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Domain:
    """A domain and where its store belongs."""

    name: str
    value: str | None
    key: str
    folder: Path
    description: dict[str, Any]


def _open_locked(data: ConfigDict, cache_dir: Path, progress: bool) -> tuple[tuple[DomainStore, ...], Tokenizer]:
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
        texts=lambda: _training_texts(streams, data),
        cache_dir=cache_dir,
        eos_token=data.eos_token,
        texts_fingerprint=digest(
            [[content, list(stream.domains)] for content, stream in zip(contents, streams, strict=True)]
        ),
    )
    plan = [
        (stream, _domains(stream, content, tokenizer, data, cache_dir))
        for stream, content in zip(streams, contents, strict=True)
    ]
    _build_missing(plan, tokenizer, data, progress)
    stores = tuple(_open_store(domain) for _, domains in plan for domain in domains)
    _report(stores)
    return stores, tokenizer


def _describe(stream: Stream, content: str, data: ConfigDict) -> dict[str, Any]:
    """What decides which documents of a stream are training documents."""
    return {
        "content": content,
        "text_field": stream.text_field,
        "domain_field": stream.domain_field,
        # A split that comes with the data does not depend on the fraction.
        "valid_fraction": None if stream.valid else float(data.valid_fraction),
    }


def _found_domains(stream: Stream, content: str, cache_dir: Path, progress: bool) -> dict[str, str]:
    """All values of data.domain_field, {value: value}, found by reading everything once."""
    path = cache_dir / "domain_values" / f"{digest([content, stream.domain_field])}.json"
    if not path.is_file():
        found, base = set(), 0
        with progress_bar(sum(part.size for part in stream.train), f"finding {stream.domain_field}", progress) as bar:
            for part in stream.train:
                for document in stream.documents(part):
                    if document.value is not None:
                        found.add(document.value)
                    if len(found) > _MAX_FOUND_DOMAINS:
                        raise InputError(
                            f"data.domain_field={stream.domain_field!r}: over {_MAX_FOUND_DOMAINS} values; "
                            "name the wanted ones in data.domains"
                        )
                    bar.update(base + document.position - bar.n)
                base += part.size
        if not found:
            raise InputError(f"data.domain_field={stream.domain_field!r}: no record has this field")
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


def _domains(
    stream: Stream, content: dict[str, Any], tokenizer: Tokenizer, data: ConfigDict, cache_dir: Path
) -> tuple[_Domain, ...]:
    found = []
    for value, name in stream.domains.items():
        identity = {"format": _FORMAT, "tokenizer": tokenizer.fingerprint, "domain_value": value, **content}
        key = digest(identity)
        description = {"name": name, "tokenizer_spec": data.tokenizer, "eos_id": tokenizer.eos_id, **identity}
        slug = re.sub(r"[^\w.-]+", "_", name)[:80]
        found.append(_Domain(name, value, key, cache_dir / "stores" / f"{slug}-{key[:16]}", description))
    return tuple(found)


def _build_missing(
    plan: Sequence[tuple[Stream, Sequence[_Domain]]], tokenizer: Tokenizer, data: ConfigDict, progress: bool
) -> None:
    keep_skipped = data.on_bad_record == "skip"
    missing = [(stream, [d for d in domains if not _is_complete(d, keep_skipped)]) for stream, domains in plan]
    missing = [(stream, domains) for stream, domains in missing if domains]
    total = sum(part.size for stream, _ in missing for part in stream.valid + stream.train)
    dtype = "uint16" if tokenizer.vocab_size <= _NARROW_VOCABULARY else "uint32"
    with progress_bar(total, "tokenizing", progress and bool(missing)) as bar:
        for stream, domains in missing:
            names = {domain.value: domain.name for domain in domains}
            what = next(iter(names.values())) if len(names) == 1 else f"{len(names)} domains"
            bar.set_description(f"tokenizing {what}", refresh=False)
            writers = {d.value: DomainWriter(d.folder, d.name, dtype, d.description, keep_skipped) for d in domains}
            build_stores(
                dataclasses.replace(stream, domains=names),
                writers,
                tokenizer,
                valid_fraction=data.valid_fraction,
                on_bad_record=data.on_bad_record,
                bar=bar,
            )


def _is_complete(domain: _Domain, keep_skipped: bool) -> bool:
    """Whether a finished, undamaged store lies in the folder; what is in the way of a new one is removed."""
    if not domain.folder.exists():
        return False
    shutil.rmtree(partial_folder(domain.folder), ignore_errors=True)
    store = _open_store(domain)
    if store.skipped_records and not keep_skipped:
        shutil.rmtree(domain.folder)
        return False
    for split in (store.train, store.valid):
        sizes = (split.num_tokens * np.dtype(split.dtype).itemsize, (split.num_documents + 1) * 8)
        paths = (Path(split.path), Path(split.path).with_suffix(".offsets"))
        if any(not path.is_file() or path.stat().st_size != size for path, size in zip(paths, sizes, strict=True)):
            logger.warning("%s: files of the store are damaged; building it again", domain.folder)
            shutil.rmtree(domain.folder)
            return False
    return True


def _open_store(domain: _Domain) -> DomainStore:
    meta = json.loads((domain.folder / "meta.json").read_text())
    train, valid = (
        TokenArray(
            str(domain.folder / f"{split}.tokens"),
            meta["dtype"],
            meta[split]["tokens"],
            meta[split]["documents"],
            meta[split]["bytes"],
        )
        for split in SPLITS
    )
    skipped = meta["skipped_records"] + meta["unattributed_records"]
    return DomainStore(domain.name, domain.key, str(domain.folder), train, valid, skipped)


def _memory_map(path: str, dtype: str) -> np.ndarray:
    if os.path.getsize(path) == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _report(stores: Sequence[DomainStore]) -> None:
    wanted: dict[str, None] = {}
    ignored: dict[str, int] = {}
    for store in stores:
        meta = json.loads((Path(store.path) / "meta.json").read_text())
        wanted[meta["domain_value"]] = None
        ignored |= meta["records_by_value"]
        logger.info(
            "domain %s: train %s documents, %s tokens, %s bytes; held out %s documents, %s tokens",
            store.name,
            *(f"{n:,}" for n in (store.train.num_documents, store.train.num_tokens, store.train.num_bytes)),
            *(f"{n:,}" for n in (store.valid.num_documents, store.valid.num_tokens)),
        )
        if store.skipped_records:
            logger.warning("domain %s: %d bad records skipped", store.name, store.skipped_records)
        if meta["held_out_duplicates"]:
            logger.warning(
                "domain %s: %d training documents left out because they are held out too",
                store.name,
                meta["held_out_duplicates"],
            )
        if not store.valid.num_documents:
            logger.warning("domain %s: no held-out document; raise data.valid_fraction for evaluation", store.name)
    ignored = {value: count for value, count in ignored.items() if value not in wanted}
    if ignored:
        listed = ", ".join(f"{value} {count:,}" for value, count in sorted(ignored.items())[:20])
        logger.warning("%d records of domains not in data.domains are ignored: %s", sum(ignored.values()), listed)
