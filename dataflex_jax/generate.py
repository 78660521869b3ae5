"""What a checkpoint writes when it is prompted.

    python -m dataflex_jax.generate --checkpoint=MODEL --prompt="Once upon a time" [--prompt=...]
        [--chat] [--max_new_tokens=128] [--temperature=0.8] [--top_k=50] [--top_p=0.95] [--seed=0]

--checkpoint is a run folder (its newest step), one step's folder, or a Hugging Face folder or
hub id. Prints each prompt with its continuation; greedy unless --temperature is given. With --chat
each prompt is a user's question, put into the model's chat template. A continuation ends with the
text, or with the turn where the model was tuned on conversations. The model is split over all
devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from dataflex_jax import cli
from dataflex_jax.data.text.chat import ChatEncoder
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import generate_texts
from dataflex_jax.training.locate import CHECKPOINTS
from dataflex_jax.training.weights import Opened, open_model


def continuations(opened: Opened, prompts: Sequence[str], *, chat: bool = False, **options: Any) -> list[str]:
    """The continuation of every prompt.

    Args:
        opened: whose model.
        prompts: texts.
        chat: they are questions, for the model's chat template.
        **options: those of `generation.generate.generate_texts`.

    Raises:
        InputError: no chat template, or an option outside its range.
    """
    tokenizer = opened.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise InputError(f"--chat: the tokenizer of {opened.source} has no chat template; leave --chat out")
        encoder = ChatEncoder(tokenizer, tokenizer.chat_template)
        prompts = [encoder.encode_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    with jax.set_mesh(opened.mesh):
        return generate_texts(opened.model, tokenizer, prompts, **options)


def define_flags() -> None:
    """The command's flags."""
    cli.define_path("checkpoint", None, f"The model: {CHECKPOINTS}.")
    flags.DEFINE_multi_string("prompt", None, "The text to continue; may be given several times.")
    flags.DEFINE_bool("chat", False, "The prompts are questions, to be put into the model's chat template.")
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
        raise InputError(f"--checkpoint is missing: {CHECKPOINTS}")
    if not options.prompt:
        raise InputError('--prompt is missing: the text to continue, e.g. --prompt="Once upon a time"')
    texts = continuations(
        open_model(options.checkpoint),
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        seeds=range(options.seed, options.seed + len(options.prompt)),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for prompt, continuation in zip(options.prompt, texts, strict=True):
        print(prompt, continuation, sep="\n" if options.chat else "", end="\n\n")


if __name__ == "__main__":
    cli.run(main, define_flags)
