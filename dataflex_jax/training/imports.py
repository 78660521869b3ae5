"""A run folder made of a checkpoint from elsewhere: weights, a tokenizer, no data and no steps."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import optim, resume, run_config
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.ledger import Position
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.state import Start
from dataflex_jax.training.weights import open_base, resolved_model, starting_params, trained_of


def adapter_and_base(source: str, config: ConfigDict, option: str) -> tuple[LoraConfig | None, str]:
    """(the adapter that `source` holds, if it is one, and the weights that it or the model is made of).

    Args:
        source: a Hugging Face folder or hub id, or one in PEFT's format.
        config: names the base of an adapter that does not name it, as `config.model.name_or_path`.
        option: what the user set to `source`, for messages.

    Raises:
        InputError: no such checkpoint, or an adapter without a base.
    """
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG], option)
    if not (folder / peft.CONFIG).is_file():
        return None, source
    adapter, named = peft.read_lora_config(source, option, config.lora.base_dtype)
    base = config.model.name_or_path or named
    if base is None:
        raise InputError(f"{folder / peft.CONFIG}: does not name its base; give it as --config.model.name_or_path")
    return adapter, base


def imported(config: ConfigDict, run_folder: Path) -> None:
    """Writes the run folder of a configuration that names weights: its checkpoint of step 0, from which a run goes on.

    Raises:
        InputError: weights, a tokenizer or a configuration that cannot be used.
        TrainingError: the checkpoint cannot be written.
    """
    configuration.validate(config)
    mesh = make_mesh(config.mesh)
    with Checkpoints(run_folder, config.keep) as checkpoints, jax.set_mesh(mesh):
        tokenizer = load_tokenizer(config.data.tokenizer, texts=lambda: iter(()), cache_dir=config.data.cache_dir)
        model = resolved_model(config, tokenizer.vocab_size)
        trained = trained_of(model, config.model.trainable)
        base = open_base(config, model, trained, mesh)
        optimizer = optim.adamw(config.optim, optim.learning_rate(config.optim, config.train_step))
        start = Start(Model.shape(model), trained, optimizer)
        abstract = start.abstract(mesh)
        named, adapter = config.model.name_or_path, config.lora.name_or_path
        params = starting_params(model, abstract.params, config.seed, named, adapter, base)
        state = start.placed(jax.random.key(config.seed), abstract, params)
        fields = resume.model_fields(model, config.model.trainable, tokenizer)
        identity = Identity(fields, stores={}, initial_weights={}, base=base and base.identity())
        nothing = np.zeros(0, np.int64)
        position = Position(SamplerState(0, nothing, nothing.astype(np.float64)), 0, nothing)
        if jax.process_index() == 0:
            tokenizer.save(run_folder / "tokenizer")
            run_config.write(config, run_folder / "config.json")
        checkpoints.save(0, state, resume.to_json(identity, position))
