"""Tokenizers: a hub id, a local folder or tokenizer.json, plain bytes, or BPE trained on the training documents.

Every kind ends up as a `tokenizers.Tokenizer`, whose batch encoder runs on all cores. Text never becomes a control
token: a document that happens to hold "<|endoftext|>" is encoded as these characters.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataflex_jax.data.text import pretrained
from dataflex_jax.data.text.pretrained import TokenizerFiles
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import expanded, replace_file, replace_json

logger = logging.getLogger(__name__)

DEFAULT = "train:4096"
END_OF_TEXT = "<|endoftext|>"
_KNOWN_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_MIN_VOCABULARY = 257  # every byte and the end of text
_MAX_VOCABULARY = 1 << 20
_PIECE_CHARACTERS = 1 << 20
_SLICE_CHARACTERS = 1 << 22
_ACCEPTED = "a hub id, a folder, a path to tokenizer.json, 'bytes' or 'train:VOCAB'"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        eos_id: id of the token that ends every document.
        fingerprint: changes when the tokenisation, or `eos_id`, does.
        chat_template: Jinja text in Hugging Face's form, or None.
        bos_token: the token that a chat template may begin with, or None.
        turn_end_ids: of further tokens at which generation stops: those of generation_config.json, and the one with
            which the chat template that a model was tuned with ends a response.
        begin_ids: of the tokens with which documents and prompts begin, mostly none. A chat template writes its own.
        template_source: where `chat_template` stands, for messages.
        template_variables: what a chat template may write, such as {"eos_token": "</s>"}.
    """

    vocab_size: int
    eos_id: int
    fingerprint: str
    _backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    chat_template: str | None = dataclasses.field(repr=False, default=None)
    bos_token: str | None = None
    turn_end_ids: tuple[int, ...] = ()
    begin_ids: tuple[int, ...] = ()
    template_source: str = dataclasses.field(repr=False, compare=False, default="config.data.template")
    template_variables: dict[str, str] = dataclasses.field(repr=False, compare=False, default_factory=dict)
    _files: TokenizerFiles | None = dataclasses.field(repr=False, compare=False, default=None)  # None: made here

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which generation stops, `eos_id` first."""
        return tuple(dict.fromkeys((self.eos_id, *self.turn_end_ids)))

    @property
    def eos_token(self) -> str:
        """The token of `eos_id`."""
        return self._backend.id_to_token(self.eos_id)

    @property
    def special_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """The control tokens by id."""
        return {i: token for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def copy_of_backend(self, *, room_for: Sequence[str] = ()) -> tokenizers.Tokenizer:
        """A backend of one's own to change; as here, it encodes control tokens that stand in a text as characters.

        Args:
            room_for: tokens that are going to be added to it, and must not get the ids of others.
        """
        text = self._backend.to_str()
        if self._backend.get_vocab_size(with_added_tokens=True) < self.vocab_size:
            # The library gives what is added the number of tokens as its id, whoever has it where there are holes.
            rules = json.loads(text)
            rules["model"]["vocab"] |= {token: i for i, token in enumerate(room_for, self.vocab_size)}
            text = json.dumps(rules)
        copied = tokenizers.Tokenizer.from_str(text)
        copied.encode_special_tokens = True
        return copied

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, on all cores.

        Texts over a million characters are encoded in pieces cut after a line end (memory stays bounded), so a token
        that would span such a cut is lost.
        """
        ids: list[list[int]] = [[] for _ in texts]
        pieces = ((owner, piece) for owner, text in enumerate(texts) for piece in _pieces(text))
        for some in _slices(pieces):
            encodings = self._backend.encode_batch_fast([piece for _, piece in some], add_special_tokens=False)
            for (owner, _), encoding in zip(some, encodings, strict=True):
                ids[owner] += encoding.ids
        return ids

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the beginnings of documents."""
        return [[*self.begin_ids, *ids] for ids in self.encode_batch(texts)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole documents, with the end of the text."""
        return [[*self.begin_ids, *ids, self.eos_id] for ids in self.encode_batch(texts)]

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that a chat template, maybe another model's, has made.

        Control tokens that stand in them are control tokens where there are such here; a text begins as documents do.
        """
        backend = self.copy_of_backend()
        backend.encode_special_tokens = False
        encoded = (encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False))
        begin = list(self.begin_ids)
        return [ids if ids[: len(begin)] == begin else begin + ids for ids in encoded]

    def encode_whole(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Token ids of each text between the tokens that the tokenizer itself puts around one.

        So embedding models were trained, such as Qwen3-Embedding, which reads a text off an end of text. A text is cut
        where it is longer than `longest` with these; they stay.
        """
        begin, end = pretrained.frame(self._backend)
        room = max(longest - len(begin) - len(end), 0)
        return [[*begin, *ids[:room], *end] for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of token ids; special tokens are included unless `special` is False."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer, and where generation stops, in Hugging Face's layout.

        The files of a tokenizer that was not made here are as they came but for the tokens and the template that are
        other ones here. `load_tokenizer(folder, ...)` loads it again.
        """
        folder = Path(folder)
        files = self._exported()
        for name, data in files.items():
            replace_file(folder / name, data)
        for name in pretrained.COPIED:
            if name not in files:
                (folder / name).unlink(missing_ok=True)
        bos = {} if self.bos_token is None else {"bos_token_id": self._backend.token_to_id(self.bos_token)}
        stops = self.eos_id if self.stop_ids == (self.eos_id,) else list(self.stop_ids)
        replace_json(folder / pretrained.GENERATION_CONFIG, {**bos, "eos_token_id": stops}, indent=2)

    def _exported(self) -> dict[str, bytes]:
        fields = {"eos_token": self.eos_token, "bos_token": self.bos_token, "chat_template": self.chat_template}
        fields = {name: value for name, value in fields.items() if value is not None}
        if self._files is not None:
            return pretrained.exported(self._files, fields)
        config = {"tokenizer_class": pretrained.GENERIC, "clean_up_tokenization_spaces": False, **fields}
        backend = self._backend.to_str(pretty=True).encode()
        return {pretrained.TOKENIZER: backend, pretrained.CONFIG: pretrained.to_json(config)}


def load_tokenizer(
    spec: str,
    *,
    texts: Callable[[], Iterator[str]],
    cache_dir: str | os.PathLike,
    eos_token: str | None = None,
    begin_of_text: bool | None = None,
    texts_fingerprint: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Loads, or trains, the tokenizer that `config.data.tokenizer` names, with generation_config.json's stop tokens.

    Args:
        spec: a hub id, a local folder (or a run's), a path to a tokenizer.json, "bytes" (ids 0-255 are the bytes, 256
            ends a text), or "train:VOCAB": byte-level BPE with VOCAB tokens, trained on `texts()` once and kept in
            `cache_dir`.
        texts: makes an iterator over training documents (held-out ones excluded); called only to train.
        cache_dir: folder for trained tokenizers.
        eos_token: the token that ends a document; None: the tokenizer's own, else a well-known one it has.
        begin_of_text: whether documents and prompts begin with the tokenizer's token for that; None: as it says itself.
        texts_fingerprint: identifies the content of `texts()`; None: found by reading them.
        special_tokens: further control tokens for "bytes" and "train:VOCAB", with the ids after the vocabulary.

    Raises:
        InputError: no such tokenizer, no access to the hub, files that are not a tokenizer's, or no token for the end
            of a text or, where it is asked for, for its beginning.
    """
    if not spec:
        raise InputError(f"not set; accepted: {_ACCEPTED}", option="data.tokenizer")
    if is_made(spec):
        made = _byte_backend() if spec == "bytes" else _trained(spec, texts, texts_fingerprint, Path(cache_dir))
        made.add_special_tokens(list(special_tokens))
        if begin_of_text:
            reason = f"config.data.tokenizer = {spec!r} has no bos_token"
            raise InputError(reason, option="data.begin_of_text", value=True)
        return _from_backend(made, spec, eos_token or END_OF_TEXT)
    path = Path(expanded(spec))
    if (path / "checkpoints").is_dir() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.is_file():
        files = pretrained.read_file(path)
    elif path.is_dir():
        files = pretrained.read_folder(path)
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        files = pretrained.read_folder(_snapshot(spec))
    else:
        raise _refused(spec, f"no such file or folder; accepted: {_ACCEPTED}")
    return _from_files(files, spec, eos_token, begin_of_text)


def _snapshot(spec: str) -> Path:
    try:
        return pretrained.snapshot(spec)
    except pretrained.HUB_ERRORS as error:
        raise _refused(
            spec,
            "cannot be loaded, neither from a local folder nor from the hub or its cache (offline? accepted: "
            f"{_ACCEPTED}): {one_line(error, 160)}",
        ) from error


def _refused(spec: str, reason: str) -> InputError:
    return InputError(reason, option="data.tokenizer", value=spec)


def is_made(spec: str) -> bool:
    """Whether `load_tokenizer` makes the tokenizer itself, with the control tokens that are asked for."""
    return spec == "bytes" or spec.startswith("train:")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        end = end if end > start else start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _slices(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The pieces, some at a time: an encoding takes a hundred bytes a character until its ids are taken over."""
    some, characters = [], 0
    for owner, piece in pieces:
        some.append((owner, piece))
        characters += len(piece)
        if characters >= _SLICE_CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _from_files(files: TokenizerFiles, spec: str, eos_token: str | None, begin_of_text: bool | None) -> Tokenizer:
    loaded = pretrained.load(files, begin_of_text)
    tokenizer = _from_backend(loaded.backend, spec, eos_token or loaded.roles.get("eos_token"))
    return dataclasses.replace(
        tokenizer,
        chat_template=files.template,
        bos_token=loaded.roles.get("bos_token"),
        turn_end_ids=tuple(dict.fromkeys(i for i in files.stops if i != tokenizer.eos_id)),
        begin_ids=loaded.begin_ids,
        template_source=str(files.template_source),
        template_variables=loaded.roles,
        _files=loaded.files,
    )


def _from_backend(backend: tokenizers.Tokenizer, spec: str, eos_token: str | None) -> Tokenizer:
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if eos_token is None:
        eos_token = next((token for token in _KNOWN_EOS if token in vocabulary), None)
    if eos_token is None:
        raise _refused(spec, "has no known end-of-text token; name one of its tokens in config.data.eos_token")
    if eos_token not in vocabulary:
        reason = f"not in the vocabulary of config.data.tokenizer = {spec!r}"
        raise InputError(reason, option="data.eos_token", value=eos_token)
    eos_id = vocabulary[eos_token]
    rules = json.loads(backend.to_str())
    del rules["post_processor"]  # only adds special tokens: `begin_ids`, which concern documents alone
    fingerprint = hashlib.blake2b(json.dumps([eos_id, rules]).encode(), digest_size=16).hexdigest()
    return Tokenizer(max(vocabulary.values()) + 1, eos_id, fingerprint, backend)


def _byte_backend() -> tokenizers.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet writes printable bytes as themselves and the others, in order, as characters from 256 on.
    others = iter(sorted(character for character in alphabet if ord(character) >= 256))
    vocabulary = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _trained(
    spec: str, texts: Callable[[], Iterator[str]], texts_fingerprint: str | None, cache_dir: Path
) -> tokenizers.Tokenizer:
    size = spec.removeprefix("train:")
    if not size.isdecimal() or not _MIN_VOCABULARY <= int(size) <= _MAX_VOCABULARY:
        raise _refused(spec, f"VOCAB must be an integer from {_MIN_VOCABULARY} to {_MAX_VOCABULARY}")
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{size} {tokenizers.__version__} {texts_fingerprint}\n".encode())
    if texts_fingerprint is None:
        for text in texts():
            encoded = text.encode()
            key.update(len(encoded).to_bytes(8, "little") + encoded)
    path = cache_dir / "tokenizers" / key.hexdigest() / "tokenizer.json"
    kept = _kept(path)
    if kept is None:
        documents = texts()
        # Who is to have the texts may have had to wait for another process that trained on them.
        kept = _kept(path)
    if kept is not None:
        return kept
    if path.exists():
        logger.warning("%s: damaged; the tokenizer is trained again", path)
    first = next(documents, None)
    if first is None:
        raise _refused(spec, "there is no training document to train it on")
    logger.info("training a byte-level BPE tokenizer with %s tokens", size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = itertools.chain.from_iterable(map(_pieces, itertools.chain([first], documents)))
    backend.train_from_iterator(pieces, trainer)
    trained = backend.to_str(pretty=True).encode()
    replace_file(path.with_name("digest"), _digest(trained))
    replace_file(path, trained)
    return backend


def _kept(path: Path) -> tokenizers.Tokenizer | None:
    """A tokenizer that was trained earlier; None: there is none, or it is damaged."""
    if not path.is_file():
        return None
    content, kept_digest = path.read_bytes(), path.with_name("digest")
    # Version 0.1.0 wrote no digest.
    if kept_digest.is_file() and kept_digest.read_bytes() != _digest(content):
        return None
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception:  # the library raises nothing narrower
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()
