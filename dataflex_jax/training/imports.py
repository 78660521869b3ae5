"""A run folder made of a checkpoint from elsewhere: weights, a tokenizer, no data and no steps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import optim, resume, run_config
from dataflex_jax.training.checkpoint import FOLDER, Checkpoints, Contents
from dataflex_jax.training.ledger import Position
from dataflex_jax.training.locate import adapter_and_base
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.state import Start
from dataflex_jax.training.weights import (
    Origin,
    open_base,
    resolved_model,
    starting_params,
    trained_of,
)


def import_pretrained(source: str, config: ConfigDict, run_folder: Path) -> None:
    """Makes a run folder whose checkpoint of step 0 has the weights and the tokenizer of a checkpoint; needs no data.

    Args:
        source: a Hugging Face folder or hub id, or one in PEFT's format.
        config: the recipe to prepare it for; its model's shape and its tokenizer become those of `source`.
        run_folder: a folder without checkpoints.

    Raises:
        InputError: a source or a recipe that cannot be used, or a run folder in use.
        TrainingError: the checkpoint cannot be written.
    """
    if (run_folder / FOLDER).exists():
        raise InputError(f"--output={run_folder}: has checkpoints already; choose another folder")
    source = str(Path(source).absolute()) if Path(source).is_dir() else source
    adapter, base = adapter_and_base(source, "--import_from", config.lora.base_dtype, config.model.name_or_path)
    if adapter is not None:
        config.lora.update(name_or_path=source, **dataclasses.asdict(adapter))
    config.model.update(name_or_path=base, from_scratch=False)
    config.data.tokenizer = base
    imported(config, run_folder)


def imported(config: ConfigDict, run_folder: Path) -> None:
    """Writes the run folder of a configuration that names weights: its checkpoint of step 0, from which a run goes on.

    Raises:
        InputError: weights, a tokenizer or a configuration that cannot be used.
        TrainingError: the checkpoint cannot be written.
    """
    configuration.validate(config, data_is_read=False)
    mesh = make_mesh(config.mesh)
    with Checkpoints(run_folder, config.keep) as checkpoints, jax.set_mesh(mesh):
        data = config.data
        tokenizer = load_tokenizer(
            data.tokenizer,
            texts=lambda: iter(()),
            cache_dir=data.cache_dir,
            eos_token=data.eos_token,
            begin_of_text=data.begin_of_text,
        )
        model = resolved_model(config, tokenizer.vocab_size)
        trained = trained_of(model, config.model.trainable)
        origin = Origin.of(config)
        base = open_base(origin, model, trained, mesh)
        optimizer = optim.adamw(config.optim, optim.learning_rate(config.optim, config.train_step))
        start = Start(Model.shape(model), trained, optimizer)
        abstract = start.abstract(mesh)
        params = starting_params(origin, model, abstract.params, base)
        state = start.placed(jax.random.key(config.seed), abstract, params)
        fields = resume.model_fields(model, config.model.trainable, tokenizer)
        identity = Identity(fields, stores={}, initial_weights={}, base=base and base.identity())
        nothing = np.zeros(0, np.int64)
        position = Position(SamplerState(0, nothing, nothing.astype(np.float64)), 0, nothing)
        if jax.process_index() == 0:
            tokenizer.save(run_folder / "tokenizer")
            run_config.write(config, run_folder / "config.json")
        checkpoints.save(0, Contents(state, resume.to_json(identity, position)))
