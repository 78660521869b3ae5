"""What a checkpoint writes when it is prompted.

    python -m dataflex_jax.generate --checkpoint=RUN_DIR --prompt="Once upon a time" [--prompt=...]
        [--chat] [--max_new_tokens=128] [--temperature=0.8] [--top_k=50] [--top_p=0.95] [--seed=0]

--checkpoint is a run folder (its newest step) or one step's folder. Prints each prompt with its
continuation; greedy unless --temperature is given. With --chat each prompt is a user's question,
put into the run's chat template. A continuation ends with the text, or with the turn where the
model was tuned on conversations. The model is split over all devices.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from dataflex_jax import cli
from dataflex_jax import config as configuration
from dataflex_jax.data.text.chat import ChatEncoder
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import generate_texts
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training.checkpoint import Checkpoints, locate
from dataflex_jax.training.weights import read_checkpoint


def generate_from_checkpoint(
    run_folder: Path, step: int, prompts: Sequence[str], *, chat: bool = False, **options
) -> list[str]:
    """The continuation of every prompt.

    Args:
        run_folder: of the checkpoint.
        step: of the checkpoint.
        prompts: texts.
        chat: they are questions, for the run's chat template.
        **options: those of `dataflex_jax.models.generation.generate.generate_texts`.

    Raises:
        InputError: a checkpoint that cannot be read or has no chat template, or an option outside its range.
    """
    trained = configuration.read(run_folder)
    tokenizer = load_tokenizer(str(run_folder / "tokenizer"), texts=lambda: iter(()), cache_dir=run_folder)
    if chat:
        if tokenizer.chat_template is None:
            raise InputError(f"--chat: the tokenizer of {run_folder} has no chat template; leave --chat out")
        encoder = ChatEncoder(tokenizer, tokenizer.chat_template)
        prompts = [encoder.encode_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    mesh = make_mesh({"fsdp": -1})
    with Checkpoints(run_folder, writable=False) as checkpoints, jax.set_mesh(mesh):
        _, graphdef, params = read_checkpoint(checkpoints, step, trained, mesh)
        return generate_texts(graphdef, params, tokenizer, prompts, **options)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, "A run folder, or the folder of one step in it.")
    flags.DEFINE_multi_string("prompt", None, "The text to continue; may be given several times.")
    flags.DEFINE_bool("chat", False, "The prompts are questions, to be put into the run's chat template.")
    flags.DEFINE_integer("max_new_tokens", 128, "Tokens at most, unless the text ends before.")
    flags.DEFINE_float("temperature", 0.0, "0: greedy; else the logits are divided by it.")
    flags.DEFINE_integer("top_k", None, "Draw from this many most likely tokens; default: from all.")
    flags.DEFINE_float("top_p", None, "Draw from the most likely tokens that have this much probability.")
    flags.DEFINE_integer("seed", 0, "Of the first prompt's draws; the next prompt has the next seed.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if options.checkpoint is None:
        raise InputError("--checkpoint is missing: a run folder, or the folder of one step in it")
    if not options.prompt:
        raise InputError('--prompt is missing: the text to continue, e.g. --prompt="Once upon a time"')
    run_folder, step = locate(options.checkpoint)
    continuations = generate_from_checkpoint(
        run_folder,
        step,
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        seeds=range(options.seed, options.seed + len(options.prompt)),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for prompt, continuation in zip(options.prompt, continuations, strict=True):
        print(prompt, continuation, sep="\n" if options.chat else "", end="\n\n")


if __name__ == "__main__":
    cli.run(main, define_flags)
