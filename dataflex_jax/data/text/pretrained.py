"""Tokenizers that others made: their files read and checked, loaded, and written again as they came.

No code of theirs ever runs. The files are read once, within limits, and copied without byte order marks to a folder of
our own, from which `transformers` makes the tokenizer.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import huggingface_hub
import tokenizers
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import processors

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import object_in, parse_json, read_bytes

TOKENIZER, CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE, SPECIAL_TOKENS, SENTENCEPIECE = "chat_template.jinja", "special_tokens_map.json", "tokenizer.model"
_MODEL_CONFIG = "config.json"  # for a tokenizer that does not name its class
_VOCABULARIES = ({"vocab.json", "merges.txt"}, {"vocab.txt"})
COPIED = (
    *(TOKENIZER, CONFIG, SPECIAL_TOKENS, TEMPLATE, SENTENCEPIECE),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
)
READ = (*COPIED, GENERATION_CONFIG, _MODEL_CONFIG)
GENERIC = "PreTrainedTokenizerFast"  # by tokenizer.json's own rules; "TokenizersBackend" since transformers 5
_GENERIC = (GENERIC, "TokenizersBackend")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_IDS = 1 << 24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TokenizerFiles(NamedTuple):
    """The files of a tokenizer, as they are but for byte order marks.

    Attributes:
        folder: where they were.
        paths: of each, by name.
        contents: of each.
        config: of tokenizer_config.json; {} without one.
        special_tokens: of special_tokens_map.json.
        template: the chat template, or None.
        stops: generation_config.json's ids of tokens at which generation stops.
        by_itself: tokenizer.json alone makes the tokenizer.
    """

    folder: Path
    paths: Mapping[str, Path]
    contents: dict[str, bytes]
    config: dict[str, Any]
    special_tokens: dict[str, Any]
    template: str | None
    stops: tuple[int, ...]
    by_itself: bool

    @property
    def template_source(self) -> Path:
        """Where the chat template was."""
        return self.folder / (TEMPLATE if TEMPLATE in self.contents else CONFIG)

    @property
    def has_code(self) -> bool:
        """Whether the tokenizer is a class in a Python file beside it."""
        named = self.config.get("auto_map")
        return bool(named.get("AutoTokenizer") if isinstance(named, dict) else named)


class Loaded(NamedTuple):
    """What files make.

    Attributes:
        backend: does the work.
        roles: {"eos_token": "</s>", ...}, for chat templates.
        begin_ids: of the tokens that documents and prompts begin with.
        files: as they are to be written, so that transformers 4.51 and later load them as they were loaded here.
    """

    backend: tokenizers.Tokenizer
    roles: dict[str, str]
    begin_ids: tuple[int, ...]
    files: TokenizerFiles


def quiet_transformers() -> ModuleType:
    """`transformers`, which does not say that PyTorch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def snapshot(name: str) -> Path:
    """The folder on this machine with the tokenizer's files of a hub id.

    Raises:
        OSError, ValueError, HfHubHTTPError: neither the hub nor its cache has them.
    """
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(READ)))


HUB_ERRORS = (OSError, ValueError, HfHubHTTPError)


# Reading.


def read_folder(folder: Path) -> TokenizerFiles:
    """The files of a folder.

    Raises:
        InputError: it has no tokenizer that can be loaded, or a file is not what it should be; names the file.
    """
    present = {name: folder / name for name in READ if (folder / name).exists()}
    files = _read(folder, present, by_itself=TOKENIZER in present and CONFIG not in present)
    if TOKENIZER in present or (not files.has_code and any(names <= present.keys() for names in _VOCABULARIES)):
        return files
    if SENTENCEPIECE in present:
        make = "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one"
        raise InputError(f"{folder / SENTENCEPIECE}: a SentencePiece model alone; a {TOKENIZER} is needed ({make})")
    if files.has_code:
        reason = f"a tokenizer with code of its own is not supported, none is ever run; a {TOKENIZER} is needed"
        raise InputError(f"{folder / CONFIG}: {reason}")
    reason = f"has no tokenizer; a {TOKENIZER} is needed, or vocab.json and merges.txt"
    raise InputError(reason, option="data.tokenizer", value=str(folder))


def read_file(path: Path) -> TokenizerFiles:
    """A tokenizer.json, whatever its name, with what lies beside it.

    Raises:
        InputError: a file is not what it should be; names the file.
    """
    beside = {name: path.parent / name for name in (CONFIG, TEMPLATE, SPECIAL_TOKENS, GENERATION_CONFIG)}
    present = {name: file for name, file in beside.items() if file.exists()}
    return _read(path.parent, {**present, TOKENIZER: path}, by_itself=True)


def _read(folder: Path, present: Mapping[str, Path], *, by_itself: bool) -> TokenizerFiles:
    contents = {name: read_bytes(path).removeprefix(_BYTE_ORDER_MARK) for name, path in present.items()}
    objects = {name: object_in(present[name], contents[name]) for name in _OBJECTS if name in contents}
    for name, values in objects.items():
        for field, (words, test) in _ACCEPTED.get(name, {}).items():
            if (value := values.get(field)) is not None and not test(value):
                raise InputError(f"{present[name]}: {field} must be {words} but is {one_line(repr(value), 80)}")
    config, generation = objects.get(CONFIG, {}), objects.get(GENERATION_CONFIG, {})
    template = _default_template(config.get("chat_template"))
    if TEMPLATE in contents:
        try:
            template = contents[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{present[TEMPLATE]}: not UTF-8 ({one_line(error)})") from error
    stops = generation.get("eos_token_id")
    stops = () if stops is None else tuple(stops) if isinstance(stops, list) else (stops,)
    special_tokens = objects.get(SPECIAL_TOKENS, {})
    return TokenizerFiles(folder, present, contents, config, special_tokens, template, stops, by_itself)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_template(value: Any) -> bool:
    if isinstance(value, list) and all(isinstance(named, dict) for named in value):
        return all(isinstance(named.get(part), str) for named in value for part in ("name", "template"))
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_ids(value: Any) -> bool:
    return all(map(_is_id, value)) if isinstance(value, list) else _is_id(value)


_OBJECTS = (CONFIG, SPECIAL_TOKENS, GENERATION_CONFIG, _MODEL_CONFIG)
_TOKENS = dict.fromkeys(_ROLES, ("a token or an object with its content", _is_token))
# Of each file the fields that are read here: what they must be unless they are null.
_ACCEPTED: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    CONFIG: {
        **_TOKENS,
        "chat_template": ("a text or named texts", _is_template),
        "tokenizer_class": ("a name", lambda value: isinstance(value, str)),
        "add_bos_token": ("true or false", lambda value: isinstance(value, bool)),
        "auto_map": ("an object or a list", lambda value: isinstance(value, dict | list)),
        "added_tokens_decoder": ("an object", lambda value: isinstance(value, dict)),
        "extra_special_tokens": ("an object or a list", lambda value: isinstance(value, dict | list)),
    },
    SPECIAL_TOKENS: _TOKENS,
    GENERATION_CONFIG: {"eos_token_id": ("a token id or a list of them", _are_ids)},
}


def _default_template(template: str | dict[str, str] | list[dict[str, str]] | None) -> str | None:
    """Of several templates the one named default."""
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    return template.get("default") if isinstance(template, dict) else template


def content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a token in a configuration."""
    return token["content"] if isinstance(token, dict) else token


# Loading.


def load(files: TokenizerFiles, begin_of_text: bool | None = None) -> Loaded:
    """The tokenizer that files make.

    Args:
        files: from `read_folder` or `read_file`.
        begin_of_text: whether documents begin with bos_token; None: as the files say.

    Raises:
        InputError: they make none, which names the file or the folder; or there is no bos_token to begin with.
    """
    backend, roles, class_name = _made(files)
    _check_ids(backend, files)
    # A tokenizer.json may carry the truncation and padding of the task that its model was tuned for.
    backend.no_truncation()
    backend.no_padding()
    begin = own = _begin_ids(files.config, backend, roles)
    if begin_of_text is not None and begin_of_text != bool(own):
        begin = _bos_ids(backend, roles) if begin_of_text else ()
        if begin_of_text and not begin:
            raise InputError(f"{files.folder} has no bos_token", option="data.begin_of_text", value=True)
    config, contents = _for_all_versions(files.config, class_name), dict(files.contents)
    if _begin_ids(config, backend, roles) != begin:
        bos = roles.get("bos_token")
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"] if begin else ["$A"], special_tokens=[(bos, begin[0])] if begin else []
        )
        config["add_bos_token"] = bool(begin)
        contents.pop(TOKENIZER, None)
    if TOKENIZER not in contents:
        contents[TOKENIZER] = backend.to_str(pretty=True).encode()
    if config != files.config:
        contents[CONFIG] = to_json(config)
    return Loaded(backend, roles, begin, files._replace(contents=contents, config=config))


def _made(files: TokenizerFiles) -> tuple[tokenizers.Tokenizer, dict[str, str], str]:
    """(the backend, its tokens by role, the class that `transformers` should load it as)."""
    backend = _own_backend(files) if TOKENIZER in files.contents else None
    if files.by_itself:
        given = {role: content(files.config.get(role)) for role in _ROLES[:2]}
        return backend, {role: token for role, token in given.items() if token is not None}, GENERIC
    transformers = quiet_transformers()
    # For some model types AutoTokenizer puts rules of its own in the place of tokenizer.json's.
    generic = backend is not None and (files.config.get("tokenizer_class") in _GENERIC or files.has_code)
    maker = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.contents.items():
            (Path(folder) / name).write_bytes(_without_code(data) if name in (CONFIG, _MODEL_CONFIG) else data)
        with _faults_said(f"{files.folder}: its tokenizer files cannot be loaded"):
            made = maker.from_pretrained(folder, trust_remote_code=False)
            roles = {role: token for role, token in made.special_tokens_map.items() if isinstance(token, str)}
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None or not backend.get_vocab(with_added_tokens=False):
        raise InputError(f"{files.folder}: has no fast tokenizer; a {TOKENIZER} is needed")
    return backend, roles, type(made).__name__


def _own_backend(files: TokenizerFiles) -> tokenizers.Tokenizer:
    with _faults_said(f"{files.paths[TOKENIZER]}: is not a {TOKENIZER}"):
        return tokenizers.Tokenizer.from_str(files.contents[TOKENIZER].decode())


def _check_ids(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Refuses ids that no embedding has a row for, or that the library gives to either of two tokens as it likes."""
    place, tokens = files.paths.get(TOKENIZER, files.folder), {}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i >= _MAX_IDS:
            raise InputError(f"{place}: token {one_line(repr(token), 80)} has the id {i}; it must be below {_MAX_IDS}")
        if (other := tokens.setdefault(i, token)) != token:
            both = " and ".join(one_line(repr(token), 80) for token in sorted((token, other)))
            raise InputError(f"{place}: the tokens {both} have the same id {i}")


@contextlib.contextmanager
def _faults_said(reason: str) -> Iterator[None]:
    """The libraries raise whatever they stumble over in the files, and Rust's panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{reason} ({type(error).__name__}: {one_line(error, 160)})") from error


def _without_code(data: bytes) -> bytes:
    config = parse_json(data)
    return json.dumps({name: value for name, value in config.items() if name != "auto_map"}).encode()


def _begin_ids(config: Mapping[str, Any], backend: tokenizers.Tokenizer, roles: Mapping[str, str]) -> tuple[int, ...]:
    """The tokens that a model of this tokenizer was trained to find before every text."""
    added = config.get("add_bos_token")
    if added is not None and config.get("tokenizer_class") not in (None, *_GENERIC):
        # Classes of their own, as LlamaTokenizer, go by this field and not by the post-processor.
        return _bos_ids(backend, roles) if added else ()
    return frame(backend)[0]


def frame(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a backend's own post-processor puts before a text, and those behind it."""
    if backend.post_processor is None:
        return (), ()
    one_word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    one_word.post_processor = backend.post_processor
    encoding = one_word.encode("a")
    word = encoding.sequence_ids.index(0)
    return tuple(encoding.ids[:word]), tuple(encoding.ids[word + 1 :])


def _bos_ids(backend: tokenizers.Tokenizer, roles: Mapping[str, str]) -> tuple[int, ...]:
    found = backend.token_to_id(roles.get("bos_token", ""))
    return () if found is None else (found,)


# Writing.


def exported(files: TokenizerFiles, changes: Mapping[str, str]) -> dict[str, bytes]:
    """The files by name, the same but for what is to change.

    Args:
        files: from `load`.
        changes: fields of tokenizer_config.json that are to have other values: eos_token, bos_token, chat_template.
    """
    kept = {name: data for name, data in files.contents.items() if name in COPIED}
    roles = {role: token for role, token in changes.items() if role in _ROLES}
    changed = {role: token for role, token in roles.items() if content(files.config.get(role)) != token}
    if changes.get("chat_template") != files.template:
        changed["chat_template"] = changes["chat_template"]
        kept.pop(TEMPLATE, None)  # it would win over the field
    if changed:
        kept[CONFIG] = to_json(files.config | changed)
    special = files.special_tokens
    if other := {role: token for role, token in roles.items() if role in special and content(special[role]) != token}:
        kept[SPECIAL_TOKENS] = to_json(special | other)
    return kept


def _for_all_versions(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """tokenizer_config.json without what is not known everywhere: code, and words of transformers 5."""
    config = {name: value for name, value in config.items() if name != "auto_map"}
    config = config or {"clean_up_tokenization_spaces": False}
    declared = config.get("tokenizer_class") or ""
    if class_name in _GENERIC:
        config["tokenizer_class"] = GENERIC
    elif declared.removesuffix("Fast") != class_name.removesuffix("Fast"):
        config["tokenizer_class"] = class_name
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def to_json(value: dict[str, Any]) -> bytes:
    """A value as a file's contents, readable."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
