"""A run of LESS on tiny_chat.py's questions, whose checkpoints are selected with."""

from pathlib import Path

from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny_chat

SELECTOR = {"selector": "less", "selector__group_agg": "mean"}


def train(root: Path, folder: Path) -> Path:
    """Checkpoints after 2, 4 and 5 steps, choices after 2 and 4; the learning rate falls. Returns `folder`."""
    schedule = {"warmup_step": 2, "update_step": 2, "checkpoint_every": 2, "train_step": 5}
    train_and_evaluate(tiny_chat.config(root, **SELECTOR, **schedule, optim__schedule="linear"), folder)
    return folder
