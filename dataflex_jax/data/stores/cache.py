"""The cache of stores: each domain's folder found by its key, or built.

    CACHE_DIR/stores/NAME-KEY/  train.COLUMN train.offsets valid.COLUMN valid.offsets meta.json

KEY is a hash of the content of the input, the tokenizer and the options that matter, so a changed input file is
noticed, and adding a domain leaves the other stores alone. Stores of other keys are never deleted. `store.py` reads
documents, `examples.py` reads instruction examples.
"""

import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from jaxtyping import Int64, UInt
from ml_collections import ConfigDict

from dataflex_jax.data.sources.streams import Stream, open_source
from dataflex_jax.data.stores.build import Encoder, build_stores, read_events
from dataflex_jax.data.stores.hashes import FileHashes, digest, progress_bar, replace_json
from dataflex_jax.data.stores.writer import SPLITS, DomainWriter, partial_folder
from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)

_FORMAT = 2
_TOKENIZER_TRAINING_BYTES = 256 << 20
_MAX_FOUND_DOMAINS = 1000


@dataclasses.dataclass(frozen=True)
class StoreFolder:
    """A domain's store on disk.

    Attributes:
        name: of the domain.
        value: of the stream's domain field; None without one.
        key: hash of content, tokenizer and options (32 hex digits).
        path: the folder.
        stream: what it was built from.
        description: what the key stands for, and more for people; the beginning of meta.json.
    """

    name: str
    value: str | None
    key: str
    path: Path
    stream: Stream = dataclasses.field(repr=False)
    description: dict[str, Any] = dataclasses.field(repr=False)

    def meta(self) -> dict[str, Any]:
        """The content of meta.json."""
        return json.loads((self.path / "meta.json").read_text())

    def split(self, name: str) -> dict[str, Any]:
        """The fields of the `StoredSplit` "train" or "valid"."""
        meta = self.meta()
        counts = {f"num_{what}": meta[name][what] for what in ("tokens", "documents", "bytes")}
        return {"path": str(self.path / f"{name}.tokens"), "dtype": meta["dtype"], **counts}


def open_folders(
    data: ConfigDict,
    make_encoder: Callable[[Tokenizer], Encoder],
    *,
    plain_text: Callable[[str], str] = str,
    special_tokens: Sequence[str] = (),
    progress: bool = True,
) -> tuple[tuple[StoreFolder, ...], Tokenizer]:
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
    with _locked(cache_dir):
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
        folders = [
            folder
            for stream, content in zip(streams, contents, strict=True)
            for folder in _folders(stream, content, tokenizer, encoder, data, cache_dir)
        ]
        _build_missing(folders, encoder, data, progress)
    _report(folders)
    return tuple(folders), tokenizer


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """One split of one domain. Cheap to pickle: files are mapped at the first access, in whichever process.

    Attributes:
        path: the token file; the other columns lie beside it.
        dtype: of the tokens, "uint16" or "uint32".
        num_tokens: of all documents.
        num_documents: documents, or examples.
        num_bytes: of the text that the model predicts, in UTF-8.
    """

    path: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int

    @functools.cached_property
    def tokens(self) -> UInt[np.ndarray, " num_tokens"]:
        """All tokens, read-only and memory-mapped."""
        return self.column("tokens", self.dtype)

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " num_documents+1"]:
        """Document d is `tokens[offsets[d]:offsets[d + 1]]`."""
        return self.column("offsets", "int64")

    def column(self, name: str, dtype: str) -> np.ndarray:
        """A column, read-only and memory-mapped."""
        path = Path(self.path).with_suffix(f".{name}")
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a pickled memory map would carry all tokens."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


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


def _describe(stream: Stream, content: str, data: ConfigDict) -> dict[str, Any]:
    """What decides which documents of a stream are training documents."""
    return {
        "content": content,
        "reader": stream.reader.identity,
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


def _folders(
    stream: Stream,
    content: dict[str, Any],
    tokenizer: Tokenizer,
    encoder: Encoder,
    data: ConfigDict,
    cache_dir: Path,
) -> Iterator[StoreFolder]:
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
        yield StoreFolder(name, value, key, cache_dir / "stores" / f"{slug}-{key[:16]}", stream, description)


def _build_missing(folders: Sequence[StoreFolder], encoder: Encoder, data: ConfigDict, progress: bool) -> None:
    keep_skipped = data.on_bad_record == "skip"
    missing: dict[int, list[StoreFolder]] = {}
    for folder in folders:
        if not _is_complete(folder, encoder, keep_skipped):
            missing.setdefault(id(folder.stream), []).append(folder)
    streams = [wanted[0].stream for wanted in missing.values()]
    total = sum(part.size for stream in streams for part in stream.valid + stream.train)
    with progress_bar(total, "tokenizing", progress and bool(missing)) as bar:
        for stream, wanted in zip(streams, missing.values(), strict=True):
            names = {folder.value: folder.name for folder in wanted}
            what = next(iter(names.values())) if len(names) == 1 else f"{len(names)} domains"
            bar.set_description(f"tokenizing {what}", refresh=False)
            writers = {
                folder.value: DomainWriter(folder.path, folder.name, encoder.columns, folder.description, keep_skipped)
                for folder in wanted
            }
            build_stores(
                dataclasses.replace(stream, domains=names),
                writers,
                encoder,
                valid_fraction=data.valid_fraction,
                on_bad_record=data.on_bad_record,
                bar=bar,
            )


def _is_complete(folder: StoreFolder, encoder: Encoder, keep_skipped: bool) -> bool:
    """Whether a finished, undamaged store lies in the folder; what is in the way of a new one is removed."""
    if not folder.path.exists():
        return False
    shutil.rmtree(partial_folder(folder.path), ignore_errors=True)
    meta = folder.meta()
    if skipped_records(meta) and not keep_skipped:
        shutil.rmtree(folder.path)
        return False
    for split in SPLITS:
        tokens, items = meta[split]["tokens"], meta[split]["documents"]
        sizes = {f"{split}.offsets": (items + 1) * 8}
        for column in encoder.columns:
            values = items if column.per_item else tokens
            sizes[f"{split}.{column.name}"] = values * np.dtype(column.dtype).itemsize
        paths = {folder.path / name: size for name, size in sizes.items()}
        if any(not path.is_file() or path.stat().st_size != size for path, size in paths.items()):
            logger.warning("%s: files of the store are damaged; building it again", folder.path)
            shutil.rmtree(folder.path)
            return False
    return True


def skipped_records(meta: dict[str, Any]) -> int:
    """Bad records that were passed over, those without a domain included."""
    return meta["skipped_records"] + meta["unattributed_records"]


def _report(folders: Sequence[StoreFolder]) -> None:
    wanted: dict[str, None] = {}
    ignored: dict[str, int] = {}
    for folder in folders:
        meta = folder.meta()
        train, valid = (meta[split] for split in SPLITS)
        wanted[meta["domain_value"]] = None
        ignored |= meta["records_by_value"]
        logger.info(
            "domain %s: train %s documents, %s tokens, %s bytes; held out %s documents, %s tokens",
            folder.name,
            *(f"{train[kind]:,}" for kind in ("documents", "tokens", "bytes")),
            *(f"{valid[kind]:,}" for kind in ("documents", "tokens")),
        )
        if skipped := skipped_records(meta):
            logger.warning("domain %s: %d bad records skipped", folder.name, skipped)
        if meta["untargeted_examples"]:
            logger.warning(
                "domain %s: %d examples dropped that have no response within data.cutoff_len",
                folder.name,
                meta["untargeted_examples"],
            )
        if meta["held_out_duplicates"]:
            logger.warning(
                "domain %s: %d training documents left out because they are held out too",
                folder.name,
                meta["held_out_duplicates"],
            )
        if not valid["documents"]:
            logger.warning("domain %s: no held-out document; raise data.valid_fraction for evaluation", folder.name)
    ignored = {value: count for value, count in ignored.items() if value not in wanted}
    if ignored:
        listed = ", ".join(f"{value} {count:,}" for value, count in sorted(ignored.items())[:20])
        logger.warning("%d records of domains not in data.domains are ignored: %s", sum(ignored.values()), listed)
