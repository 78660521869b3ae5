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
from typing import Any

import huggingface_hub
import tokenizers
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import replace_file, replace_json

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
GENERATION_CONFIG = "generation_config.json"
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
    """

    vocab_size: int
    eos_id: int
    fingerprint: str
    _backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    _pretrained: Any = dataclasses.field(repr=False, compare=False, default=None)  # the transformers tokenizer, if any
    chat_template: str | None = dataclasses.field(repr=False, default=None)
    bos_token: str | None = None
    turn_end_ids: tuple[int, ...] = ()

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

    def copy_of_backend(self) -> tokenizers.Tokenizer:
        """A backend of one's own to change; as here, it encodes control tokens that stand in a text as characters."""
        copied = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copied.encode_special_tokens = True
        return copied

    def pretrained(self) -> Any:
        """The `transformers` tokenizer; it too encodes control tokens that stand in a text as characters."""
        if self._pretrained is not None:
            return self._pretrained
        import transformers

        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=self._backend, eos_token=self.eos_token, bos_token=self.bos_token
        )

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

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer, and where generation stops, in Hugging Face's layout.

        `load_tokenizer(folder, ...)` loads it again.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._pretrained is not None:
            self._pretrained.save_pretrained(folder)
        else:
            self._backend.save(str(folder / "tokenizer.json"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            replace_json(folder / "tokenizer_config.json", config, indent=2, ensure_ascii=False)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["eos_token"] = self.eos_token
        if self.bos_token is not None:
            config["bos_token"] = self.bos_token
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the field
        replace_json(folder / "tokenizer_config.json", config, indent=2, ensure_ascii=False)
        bos = {} if self.bos_token is None else {"bos_token_id": self._backend.token_to_id(self.bos_token)}
        stops = self.eos_id if self.stop_ids == (self.eos_id,) else list(self.stop_ids)
        replace_json(folder / GENERATION_CONFIG, {**bos, "eos_token_id": stops}, indent=2)


def load_tokenizer(
    spec: str,
    *,
    texts: Callable[[], Iterator[str]],
    cache_dir: str | os.PathLike,
    eos_token: str | None = None,
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
        texts_fingerprint: identifies the content of `texts()`; None: found by reading them.
        special_tokens: further control tokens for "bytes" and "train:VOCAB", with the ids after the vocabulary.

    Raises:
        InputError: no such tokenizer, no access to the hub, no end-of-text token, or a generation_config.json whose
            eos_token_id is no token id and no list of them.
    """
    if not spec:
        raise InputError(f"not set; accepted: {_ACCEPTED}", option="data.tokenizer")
    if is_made(spec):
        made = _byte_backend() if spec == "bytes" else _trained(spec, texts, texts_fingerprint, Path(cache_dir))
        made.add_special_tokens(list(special_tokens))
        return _from_backend(made, spec, eos_token or END_OF_TEXT)
    path = Path(spec).expanduser()
    if (path / "checkpoints").is_dir() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.is_file():
        return _from_file(path, spec, eos_token)
    if path.is_dir() and not (path / "tokenizer_config.json").is_file() and (path / "tokenizer.json").is_file():
        return _from_file(path / "tokenizer.json", spec, eos_token)
    if not path.is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        raise _refused(spec, f"no such file or folder; accepted: {_ACCEPTED}")
    return _from_pretrained(str(path) if path.is_dir() else spec, spec, eos_token)


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


def _from_file(path: Path, spec: str, eos_token: str | None) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise _refused(spec, f"{path} is not a tokenizer.json: {one_line(error)}") from error
    config_path, template_path = (path.parent / name for name in ("tokenizer_config.json", "chat_template.jinja"))
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    eos, bos = (
        token["content"] if isinstance(token, dict) else token for token in map(config.get, ("eos_token", "bos_token"))
    )
    template = template_path.read_text(encoding="utf-8") if template_path.is_file() else config.get("chat_template")
    tokenizer = _from_backend(backend, spec, eos_token or eos)
    return dataclasses.replace(
        tokenizer,
        chat_template=_default_template(template),
        bos_token=bos,
        turn_end_ids=_turn_end_ids(path.parent / GENERATION_CONFIG, tokenizer.eos_id),
    )


def _from_pretrained(name: str, spec: str, eos_token: str | None) -> Tokenizer:
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        pretrained = transformers.AutoTokenizer.from_pretrained(name)
        if get_tokenizer_config(name).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            # For some model types AutoTokenizer puts rules of its own in the place of tokenizer.json's.
            pretrained = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _refused(
            spec,
            "cannot be loaded, neither from a local folder nor from the hub or its cache (offline? accepted: "
            f"{_ACCEPTED}): {one_line(error, 160)}",
        ) from error
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise _refused(spec, "has no fast tokenizer (tokenizer.json); choose a model that ships one")
    tokenizer = _from_backend(backend, spec, eos_token or pretrained.eos_token)
    return dataclasses.replace(
        tokenizer,
        _pretrained=pretrained,
        chat_template=_default_template(pretrained.chat_template),
        bos_token=pretrained.bos_token,
        turn_end_ids=_turn_end_ids(_generation_config(name), tokenizer.eos_id),
    )


def _generation_config(name: str) -> Path:
    """Where the generation_config.json of a folder or hub id would lie."""
    if (folder := Path(name)).is_dir():
        return folder / GENERATION_CONFIG
    try:
        return Path(huggingface_hub.hf_hub_download(name, GENERATION_CONFIG))
    except EntryNotFoundError:  # many models have none
        return folder / GENERATION_CONFIG


def _turn_end_ids(path: Path, eos_id: int) -> tuple[int, ...]:
    """The ids in a generation_config.json's eos_token_id other than `eos_id`; none without such a file."""
    if not path.is_file():
        return ()
    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {one_line(error)}") from error
    ids = declared.get("eos_token_id") if isinstance(declared, dict) else declared
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"{path}: eos_token_id must be a token id or a list of them but is {ids!r}")
    return tuple(dict.fromkeys(i for i in ids if i != eos_id))


def _default_template(template: str | dict[str, str] | list[dict[str, str]] | None) -> str | None:
    """Of several templates the one named default."""
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    return template.get("default") if isinstance(template, dict) else template


def _from_backend(backend: tokenizers.Tokenizer, spec: str, eos_token: str | None) -> Tokenizer:
    # A tokenizer.json may carry the truncation and padding of the task that its model was tuned for.
    backend.no_truncation()
    backend.no_padding()
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
    del rules["post_processor"]  # only adds special tokens, which are never asked for
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
    if path.is_file():
        return tokenizers.Tokenizer.from_file(str(path))
    documents = texts()
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
    replace_file(path, backend.to_str(pretty=True).encode())
    return backend
