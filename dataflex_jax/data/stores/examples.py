"""The examples store: every domain's conversations tokenised once, with what of each is a target.

As the rows store's files, with `*.targets` (bool, one a token) and `*.ids` (int64, one an example) beside `*.tokens`
and `*.offsets`; `cache.py` says where they lie and when they are built. Examples that have no target within
`data.cutoff_len` are left out and counted.

An example's id is its record's number in the source, `part * 2**32 + record`: of a domain with one file simply the
number of the record, from 0. It does not depend on the template, the tokenizer or the options.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64
from ml_collections import ConfigDict

from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.sources.streams import Stream
from dataflex_jax.data.stores.build import Event, Rejection, token_dtype
from dataflex_jax.data.stores.cache import StoredSplit, StoreFolder, open_folders, skipped_records
from dataflex_jax.data.stores.writer import Column, Item
from dataflex_jax.data.text.chat import ChatEncoder, chosen_template, special_tokens, template_text, tuned_with
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError

_PART_BITS = 32


@dataclasses.dataclass(frozen=True)
class Examples(StoredSplit):
    """One split of one domain's examples.

    Attributes:
        num_targets: tokens that the model is trained to predict.
    """

    num_targets: int = 0

    @functools.cached_property
    def targets(self) -> Bool[np.ndarray, " num_tokens"]:
        """Which tokens the model is trained to predict; never an example's first one."""
        return self.column("targets", "bool")

    @functools.cached_property
    def ids(self) -> Int64[np.ndarray, " num_documents"]:
        """Of the examples, increasing."""
        return self.column("ids", "int64")

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, " num_documents"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def example(self, i: int) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """(tokens, targets) of example `i`.

        Raises:
            IndexError: `i` is not in [0, num_documents).
        """
        if not 0 <= i < self.num_documents:
            raise IndexError(f"example {i} of {self.num_documents} examples in {self.path}")
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part].astype(np.int32), np.array(self.targets[part])


@dataclasses.dataclass(frozen=True)
class ExampleStore:
    """One domain's examples.

    Attributes:
        name: of the domain.
        key: hash of content, tokenizer, template and options (32 hex digits).
        path: the store's folder.
        train: training split.
        valid: held-out split, never trained on; may be empty.
        skipped_records: bad records passed over (data.on_bad_record="skip").
        dropped_examples: those without a target within data.cutoff_len.
    """

    name: str
    key: str
    path: str
    train: Examples
    valid: Examples
    skipped_records: int
    dropped_examples: int
    _stream: Stream = dataclasses.field(repr=False, compare=False)

    @property
    def record_format(self) -> Mapping[str, Any]:
        """How its records are read; those of stores with equal ones may be in one file."""
        return self._stream.reader.identity

    def records(self, split: str, columns: Sequence[str] = ()) -> Iterator[Mapping[str, Any]]:
        """The source record of every example of "train" or "valid", in their order, read anew.

        Args:
            split: which split.
            columns: the fields wanted; of a table only they are read.
        """
        examples = self.train if split == "train" else self.valid
        parts = self._stream.valid if split == "valid" and self._stream.valid else self._stream.train
        owners, wanted = np.divmod(examples.ids, 1 << _PART_BITS)
        for number, part in enumerate(parts):
            indices = iter(wanted[owners == number].tolist())
            index = next(indices, None)
            for record in part.records(columns, index) if index is not None else ():
                if record.index == index:
                    yield record.fields
                    index = next(indices, None)
                    if index is None:
                        break

    def values(self, split: str, field: str) -> list[Any]:
        """A record field (dotted) of every example of a split, in their order: groups of targets, scores to order by.

        Raises:
            InputError: a record without the field.
        """
        found = []
        for number, record in enumerate(self.records(split, [field.split(".")[0]])):
            value: Any = record
            for key in field.split("."):
                if not isinstance(value, Mapping) or key not in value:
                    raise InputError(
                        f"domain {self.name!r}, {split} example {number}: no field {field!r}; the record has "
                        f"{', '.join(record)}"
                    )
                value = value[key]
            found.append(value)
        return found


class ExampleEncoder:
    """Conversations: their tokens and targets, cut off at `data.cutoff_len`; a `build.Encoder`."""

    def __init__(self, data: ConfigDict, template: str | None, tokenizer: Tokenizer):
        self._chat = ChatEncoder(
            tokenizer,
            template_text(template, tokenizer),
            train_on_prompt=data.train_on_prompt,
            mask_history=data.mask_history,
            cutoff_len=data.cutoff_len,
        )
        self.identity = self._chat.identity
        self.columns = (
            Column("tokens", token_dtype(tokenizer)),
            Column("targets", "bool"),
            Column("ids", "int64", per_item=True),
        )

    def encode(self, events: Sequence[Event]) -> list[Item | Rejection]:
        """The item of each conversation."""
        encoded = self._chat.encode_batch([Conversation.from_json(event.text) for event in events])
        return [self._item(event, chat) for event, chat in zip(events, encoded, strict=True)]

    def _item(self, event: Event, chat: Any) -> Item | Rejection:
        if isinstance(chat, str):
            return Rejection("bad", chat)
        if not chat.targets.any():
            return Rejection("untargeted", "no response within data.cutoff_len")
        identity = (event.after.part << _PART_BITS) + event.after.index - 1
        columns = (chat.tokens.astype(self.columns[0].dtype), chat.targets, np.array([identity]))
        return Item(columns, {"bytes": chat.target_bytes, "targets": int(chat.targets.sum())})


def open_example_stores(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[ExampleStore, ...], Tokenizer]:
    """Opens the examples store of every domain of `config.data`, building what is missing; see `cache.open_folders`.

    Args:
        data: the `data` section of a config (see configs/base.py for the fields).
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        The stores, in order of `data.domains`, and the tokenizer, whose chat template is the one that was used and
        which stops at its end of turn.

    Raises:
        InputError: bad input or options, in one line.
        TrainingError: no space left; what was built is kept.
    """
    template = chosen_template(data.template, data.tokenizer)
    folders, tokenizer = open_folders(
        data,
        functools.partial(ExampleEncoder, data, template),
        plain_text=lambda text: Conversation.from_json(text).plain_text(),
        special_tokens=special_tokens(template),
        progress=progress,
    )
    return tuple(map(_open_store, folders)), tuned_with(tokenizer, template_text(template, tokenizer))


def _open_store(folder: StoreFolder) -> ExampleStore:
    meta = folder.meta()
    train, valid = (Examples(**folder.split(split), num_targets=meta[split]["targets"]) for split in ("train", "valid"))
    dropped = meta["untargeted_examples"]
    return ExampleStore(
        folder.name, folder.key, str(folder.path), train, valid, skipped_records(meta), dropped, folder.stream
    )
