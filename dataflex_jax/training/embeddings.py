"""Embeddings that stay as they are while a model learns: computed or read once, kept on disk, memory-mapped.

    CACHE_DIR/embeddings/NAME-KEY/  embeddings.float32 progress.json

KEY is a hash of what is embedded and of the model that embeds it, or of the file that the embeddings come from.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import ExampleRows
from dataflex_jax.data.stores.hashes import FileHashes
from dataflex_jax.data.stores.lock import cache_lock
from dataflex_jax.data.stores.row_results import RowResults
from dataflex_jax.data.text.pretrained import READ
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.data.texts import row_texts
from dataflex_jax.data.vectors import Vectors, open_vectors
from dataflex_jax.errors import InputError
from dataflex_jax.files import digest, expanded, keyed_path
from dataflex_jax.models import parts
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.models.hf.weights import WEIGHT_FILES
from dataflex_jax.policies.signals import Embeddings, FixedEmbeddings
from dataflex_jax.signals.model_signals import layer_numbers
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.row_sets import Matrix
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.signals.texts import OfBatch, TextModel
from dataflex_jax.training import agreement
from dataflex_jax.training.fits import check_vocabulary
from dataflex_jax.training.locate import run_at
from dataflex_jax.training.reference import Cache
from dataflex_jax.training.weights import How, open_model, shape_of

_CHUNK = 16384  # rows between two marks of progress
_FILE = "embeddings.float32"
_OPTION = "selector.embedding_model"


class Embedded(NamedTuple):
    """Rows that are embedded.

    Attributes:
        what: "candidates" or "targets".
        pool: where they are.
        ids: which of them, increasing.
        tokenizer: of the pool's rows.
    """

    what: str
    pool: Pool
    ids: Int64[np.ndarray, " n"]
    tokenizer: Tokenizer

    @property
    def identity(self) -> list[Any]:
        """What tells their texts from others'."""
        domains = [
            # How documents are cut into rows is no part of a domain's key.
            [domain.key, None if isinstance(rows := getattr(domain, self.pool.split), ExampleRows) else rows.buckets]
            for domain in self.pool.domains
        ]
        ids = hashlib.blake2b(self.ids.astype(np.int64).tobytes(), digest_size=16).hexdigest()
        return [domains, self.pool.split, self.tokenizer.fingerprint, ids]


def fixed_embeddings(
    wanted: Iterable[FixedEmbeddings], candidates: Embedded, targets: Embedded, sweeper: Sweeper, cache: Cache, how: How
) -> Mapping[FixedEmbeddings, tuple[Matrix, Matrix]]:
    """The embeddings of candidates and targets, memory-mapped; what is missing on disk is computed first.

    All processes call it together.

    Args:
        wanted: by policies.
        candidates: the training rows.
        targets: the target set's.
        sweeper: runs the embedding models.
        cache: where they are kept.
        how: how a Hugging Face checkpoint is run.

    Raises:
        InputError: a model or a file that cannot be used, or embeddings that do not fit the rows or each other.
        TrainingError: no space left; what was computed is kept.
    """
    return {each: _of_both(each, candidates, targets, sweeper, cache, how) for each in wanted}


class _Side(NamedTuple):
    """Candidates or targets: the rows, the user's file and the option that names it, and what the model reads first."""

    rows: Embedded
    option: str
    file: str | None
    prefix: str = ""


def _of_both(
    wanted: FixedEmbeddings, candidates: Embedded, targets: Embedded, sweeper: Sweeper, cache: Cache, how: How
) -> tuple[Matrix, Matrix]:
    sides = (
        _Side(candidates, "selector.candidate_embeddings", wanted.candidates),
        _Side(targets, "selector.target_embeddings", wanted.targets, wanted.target_prefix),
    )
    files = [None if side.file is None else _opened(side) for side in sides]
    model = None if all(files) else _EmbeddingModel(wanted, sweeper, cache, how)
    widths = [model.width if vectors is None else vectors.width for vectors in files]
    if widths[0] != widths[1]:
        culprit = 0 if files[1] is None else 1
        side, other = sides[culprit], sides[1 - culprit]
        has, others = widths[culprit], widths[1 - culprit]
        reason = f"embeddings of {has} numbers, but those of the {other.rows.what} have {others}; both need the same"
        raise InputError(reason, option=side.option, value=side.file)
    kept = []
    for side, vectors, width in zip(sides, files, widths, strict=True):
        source = model.of(side) if vectors is None else _of_file(vectors, cache)
        kept.append(_kept(side.rows, width, source, cache))
    return tuple(kept)


class _Source(NamedTuple):
    """Where embeddings come from: what tells them from others, and what makes those of some rows."""

    identity: Any
    make: Callable[[int, int], Matrix]


def _kept(rows: Embedded, width: int, source: _Source, cache: Cache) -> Matrix:
    key = digest(source.identity)
    agreement.agree({f"what the embeddings of the {rows.what} are made of": key})
    folder, count = Path(expanded(cache.folder)) / "embeddings", len(rows.ids)
    offsets = {_FILE: np.arange(count + 1) * width * 4}
    results = RowResults(keyed_path(folder, rows.what, key), offsets, f"embeddings of {rows.what}")
    results.complete(lambda first, stop: {_FILE: source.make(first, stop).tobytes()}, _CHUNK, cache.verify)
    return results.mapped(_FILE, np.float32, (count, width))


# Those of the user's own.


def _opened(side: _Side) -> Vectors:
    try:
        vectors = open_vectors(Path(expanded(side.file)))
    except InputError as error:
        raise InputError(error, option=side.option) from error
    if vectors.num_rows != len(side.rows.ids):
        reason = (
            f"has {vectors.num_rows} rows; one for each of {len(side.rows.ids)} {side.rows.what} is expected (what is "
            "held out or left out of the data is none)"
        )
        raise InputError(reason, option=side.option, value=side.file)
    return vectors


def _of_file(vectors: Vectors, cache: Cache) -> _Source:
    check = functools.cache(vectors.check)

    def make(first: int, stop: int) -> Matrix:
        check()
        return vectors.units(first, stop)

    return _Source(["file", *_contents([vectors.path], cache)], make)


def _contents(files: Sequence[Path], cache: Cache) -> list[str]:
    """The digests of files, remembered in the cache by their sizes and times."""
    folder = Path(expanded(cache.folder))
    with cache_lock(folder, "the embeddings") as lock:
        hashes = FileHashes(folder / "fingerprints.json", lock, again=cache.verify == "content", progress=True)
        found = [hashes(file) for file in files]
        hashes.save()
    return found


# Those of a model.


class _EmbeddingModel:
    """An embedding model, which is read where embeddings are missing.

    Attributes:
        width: of its embeddings.
        identity: what tells them from others.

    Args:
        wanted: names it, and what it is asked.
        sweeper: runs it.
        cache: remembers the digests of its files.
        how: how a Hugging Face checkpoint is run.
    """

    def __init__(self, wanted: FixedEmbeddings, sweeper: Sweeper, cache: Cache, how: How):
        self._name, self._signal, self._sweeper = wanted.model, wanted.of, sweeper
        self._how = dataclasses.replace(how, lora=None, trainable=None, param_dtype=how.dtype, remat="none", head=False)
        shape = shape_of(wanted.model, _OPTION)
        layers = 1 if wanted.of.layers is None else len(layer_numbers(wanted.of.layers, shape.num_hidden_layers))
        self.width = shape.hidden_size * layers
        weights = self._files(cache) or self._parameters()
        self.identity = [weights, self._how.dtype, wanted.of.embed.__name__, wanted.of.layers]

    def of(self, side: _Side) -> _Source:
        """What embeds the rows, a chunk after the other."""
        rows, texts = side.rows, None

        def make(first: int, stop: int) -> Matrix:
            nonlocal texts
            if texts is None:
                texts = row_texts(rows.pool, rows.ids[first:], rows.tokenizer)
            some = [side.prefix + text for text in itertools.islice(texts, stop - first)]
            found = self._texts.of_texts(_of_batch(self._signal), some, f"embeddings of {rows.what}")
            return np.asarray(found, np.float32)

        return _Source([self.identity, rows.identity, side.prefix], make)

    @functools.cached_property
    def _texts(self) -> TextModel:
        opened = open_model(self._name, self._sweeper.mesh, option=_OPTION, how=self._how)
        try:
            tokenizer = opened.tokenizer
        except InputError as error:
            reason = error.reason if error.option == "data.tokenizer" else error
            raise InputError(reason, option=_OPTION, value=self._name) from error
        check_vocabulary(self._name, tokenizer, _OPTION)
        model = opened.model.without_adapters()
        return TextModel(model.having(model.whole()), tokenizer, self._sweeper)

    def _files(self, cache: Cache) -> list[str] | None:
        """The digests of a Hugging Face checkpoint's files; None: it is a run or an adapter, and others count too."""
        if run_at(self._name, _OPTION) is not None:
            return None
        folder = folders.local_folder(self._name, [*WEIGHT_FILES, peft.CONFIG, *READ], _OPTION)
        if (folder / peft.CONFIG).is_file():
            return None
        return _contents(sorted({path for name in (*WEIGHT_FILES, *READ) for path in folder.glob(name)}), cache)

    def _parameters(self) -> list[str]:
        model, tokenizer, _ = self._texts
        frame = map(str, tokenizer.encode_whole([""], self._texts.longest)[0])
        return [parts.fingerprint(model.params), tokenizer.fingerprint, *frame]


@functools.cache
def _of_batch(signal: Embeddings) -> OfBatch:
    """Always the same function of a signal, so that it is compiled once."""
    of_rows = row_function(signal)
    return lambda model, batch: of_rows((Subject(model), None), batch)
