"""What the name of a checkpoint stands for: a step of a run, or a checkpoint in Hugging Face's format."""

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.text.tokenizer import DEFAULT
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.training import run_config
from dataflex_jax.training.checkpoint import FOLDER, Checkpoints

logger = logging.getLogger(__name__)

CHECKPOINTS = "a run folder, the folder of one step in it, or a Hugging Face folder or hub id"


class RunStep(NamedTuple):
    """A checkpoint of a run."""

    folder: Path
    step: int


def run_at(source: str | Path, option: str = "--checkpoint") -> RunStep | None:
    """The checkpoint of a run that `source` names, a run folder (its newest step) or the folder of one step, if any.

    Args:
        source: of a checkpoint of whatever kind.
        option: what the user set to `source`, for messages.

    Raises:
        InputError: a run without a complete checkpoint.
    """
    path = Path(expanded(source)).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER and path.is_dir():
        return RunStep(path.parent.parent, int(path.name))
    if not os.path.isdir(path / FOLDER):  # pathlib's raises where a name is too long
        return None
    with Checkpoints(path, writable=False) as checkpoints:
        step = checkpoints.latest()
    if step is None:
        raise InputError(f"no complete checkpoint in {path / FOLDER}", option=option, value=str(path))
    return RunStep(path, step)


def locate(source: str | Path, option: str = "--checkpoint") -> RunStep | None:
    """`run_at`, where None stands for a Hugging Face checkpoint: a folder, or what may be a hub id.

    Raises:
        InputError: `source` is none of these.
    """
    run, path = run_at(source, option), Path(expanded(source)).absolute()
    if run is not None or _is_model(path) or os.path.isfile(path / peft.CONFIG):
        return run
    if not os.path.lexists(path) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        return None
    raise InputError(
        f"neither a run folder (with {FOLDER}/), nor a step's folder in one, nor a Hugging Face folder or hub id",
        option=option,
        value=str(path),
    )


def tokenizer_of(source: str | Path, option: str = "--checkpoint") -> str:
    """Where the tokenizer of a model is, as a value of `config.data.tokenizer`; does not read the model.

    An adapter that has none has its base's.
    """
    own, base = _tokenizer_or_base(str(source), option)
    if base is not None:
        own, _ = _tokenizer_or_base(base, option)  # once: adapters that name each other would never end
    return own


def _tokenizer_or_base(source: str, option: str) -> tuple[str, str | None]:
    """(where the tokenizer of a model would be; the base of an adapter that has none)."""
    run = locate(source, option)
    if run is not None:
        return str(run.folder / "tokenizer"), None
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG, "tokenizer*", "*.jinja"], option)
    adapted = (folder / peft.CONFIG).is_file() and not (folder / "tokenizer.json").is_file()
    return source, peft.base_name(folder) if adapted else None


def adapter_and_base(
    source: str, option: str, base_dtype: str, base: str | None = None
) -> tuple[LoraConfig | None, str]:
    """(the adapter that a Hugging Face checkpoint is, or None; the weights that it or the model is made of).

    Args:
        source: a folder or hub id, of a model or in PEFT's format.
        option: what the user set to `source`, for messages.
        base_dtype: of the adapter's frozen parameters.
        base: of an adapter; None: the one that it names.

    Raises:
        InputError: no such checkpoint, or an adapter without a base.
    """
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG], option)
    if not (folder / peft.CONFIG).is_file():
        return None, source
    adapter, named = peft.read_lora_config(source, option, base_dtype)
    if base is None and named is None:
        raise InputError(f"{folder / peft.CONFIG}: does not name its base; give it as --config.model.name_or_path")
    return adapter, base or named


def use_tokenizer_of(data: ConfigDict, source: str | Path, option: str = "--checkpoint") -> None:
    """Sets `config.data.tokenizer` to a model's, and where that is a run's, how its documents begin."""
    data.tokenizer = tokenizer_of(source, option)
    run = run_at(source, option)
    if run is not None:
        keep_begin_of_text(data, run_config.read(run.folder))


def choose_tokenizer(config: ConfigDict) -> None:
    """Sets a `config.data.tokenizer` that is None to that of the weights, or without weights to the usual one."""
    if config.model.from_scratch:
        config.data.tokenizer = DEFAULT
        return
    use_tokenizer_of(config.data, config.model.name_or_path, "model.name_or_path")
    logger.info("config.data.tokenizer is that of the weights, %s.", config.data.tokenizer)


def keep_begin_of_text(data: ConfigDict, of_run: ConfigDict) -> None:
    """Sets `config.data.begin_of_text` to that of a run's configuration, where it is not set."""
    if data.begin_of_text is None:
        data.begin_of_text = of_run.data.begin_of_text


def _is_model(folder: Path) -> bool:
    return os.path.lexists(folder / folders.CONFIG) and "model_type" in folders.read_config(folder)
