"""Requests of lm-evaluation-harness a second, beside its own Hugging Face backend on the same device.

    python scripts/bench/evaluate.py --mmlu_root=DIR [--subjects=law,...] [--num_fewshot=5] [--limit=20]

Needs the extras `eval` and `torch`, and accelerate. Each backend runs in a process of its own, and answers the same
questions of MMLU in turns with the same exported model: by default a random one, float32, with --tokenizer;
--checkpoint names another. The first turn of each, in which it compiles, is not counted; its answers are
compared.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import results
from absl import flags
from contestants import Contestant, Failed, Peak

# JAX and torch are imported in functions only, because both processes import this module first.


def _exported(folder: Path, mmlu_root: str, tokenizer: str) -> str:
    """A random model in Hugging Face's format."""
    from dataflex_jax.configs import base
    from dataflex_jax.training.exporting import export_checkpoint
    from dataflex_jax.training.setup import train_and_evaluate

    config = base.get_config()
    config.update(train_step=1, eval_rows=1, tensorboard=False)
    config.data.update(source="local", root=f"{mmlu_root}/dev", formatting="mmlu", template="qwen")
    config.data.update(tokenizer=tokenizer, batch_size=1)
    config.model.update(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    config.model.update(intermediate_size=1024, max_position_embeddings=4096, dtype="float32", tie_word_embeddings=True)
    train_and_evaluate(config, folder / "run")
    export_checkpoint(str(folder / "run"), folder / "model")
    return str(folder / "model")


def _requests(task: dict[str, Any], opened: Any) -> tuple[Any, list]:
    """(the model as the harness asks it, what the harness asks)."""
    from dataflex_jax.harness.tasks import Settings, Tasks

    names = tuple(f"mmlu_{subject}" for subject in task["subjects"])
    settings = Settings(names, task["num_fewshot"], task["limit"], mmlu_root=task["mmlu_root"])
    tasks, asked = Tasks(settings, opened.tokenizer, opened.mesh), []
    ours = tasks.language_model

    def recorded(requests: list) -> list:
        asked.extend(requests)
        return [(0.0, False)] * len(requests)

    ours.loglikelihood = recorded
    for name in names:
        tasks.results(name, opened.model)
    del ours.loglikelihood
    return ours, asked


@contextlib.contextmanager
def backend_in_process(task: dict[str, Any]):
    """A block of all requests; its first answers are put into task["about"]."""
    import jax

    from dataflex_jax.configs import base
    from dataflex_jax.reporting import hardware
    from dataflex_jax.training import run_config
    from dataflex_jax.training.weights import How, open_model

    opened = open_model(task["checkpoint"], how=How(dtype="float32"))
    model, asked = _requests(task, opened)
    if task["backend"] == "transformers":
        import transformers
        from lm_eval.models.huggingface import HFLM

        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(task["checkpoint"])
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        options = {"dtype": "float32", "batch_size": task["batch_size"], "tokenizer": tokenizer, "device": device}
        model = HFLM(pretrained=task["checkpoint"], **options)

    def block() -> float:
        start = time.perf_counter()
        model.loglikelihood(asked, disable_tqdm=True)
        return time.perf_counter() - start

    def peak() -> Peak:
        measured = hardware.peak_memory_bytes()
        return measured.bytes, measured.measure

    task["about"] = {
        "answers": [tuple(answer) for answer in model.loglikelihood(asked, disable_tqdm=True)],
        "resolved": run_config.resolved(base.get_config()),
        "parameters": opened.model.config.num_params(),
    }
    yield block, peak


def measure(task: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The result.

    Raises:
        Failed: a backend cannot run.
    """
    seconds: dict[str, list[float]] = {"dataflex_jax": [], "transformers": []}
    with contextlib.ExitStack() as stack:
        backends = {}
        for name in seconds:
            backends[name] = Contestant(backend_in_process, task | {"backend": name})
            stack.callback(backends[name].stop)
        for i in range(rounds):
            for name in list(backends)[:: -1 if i % 2 else 1]:
                seconds[name].append(backends[name].seconds())
    ours, theirs = (backends[name].about["answers"] for name in seconds)
    about = backends["dataflex_jax"].about
    return {
        **results.describe(about["resolved"]),
        **task,
        "parameters": about["parameters"],
        "rounds": rounds,
        "requests": len(ours),
        "requests_per_second": {name: results.spread(len(ours) / np.array(each)) for name, each in seconds.items()},
        "speed_over_transformers": results.spread(np.divide(seconds["transformers"], seconds["dataflex_jax"])),
        "largest_difference_in_nats": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)),
        "greedy_flags_that_differ": sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True)),
    }


def main(argv: list[str]) -> None:
    from dataflex_jax import cli
    from dataflex_jax.errors import InputError, TrainingError

    cli.no_positional(argv)
    options = flags.FLAGS
    if options.mmlu_root is None:
        raise InputError("--mmlu_root is missing: the folder with MMLU's csv files")
    task = {name: options[name].value for name in ("mmlu_root", "subjects", "num_fewshot", "limit", "batch_size")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or _exported(Path(folder), options.mmlu_root, options.tokenizer)
        try:
            result = measure(task | {"checkpoint": checkpoint}, options.rounds)
        except Failed as failure:
            raise TrainingError(str(failure)) from failure
    result |= {"checkpoint": options.checkpoint, "tokenizer": options.tokenizer}
    results.write(options.output, result)
    print(f"{result['speed_over_transformers']['median']:.2f} times the requests a second of transformers")


if __name__ == "__main__":
    from dataflex_jax import cli

    cli.define_path("checkpoint", None, "A model in Hugging Face's format; by default a random one of 7M parameters.")
    cli.define_path("tokenizer", "train:4096", "Of a random model; by default one that is trained on the questions.")
    cli.define_path("mmlu_root", None, "The folder with MMLU's csv files.")
    subjects = ["abstract_algebra", "high_school_us_history", "professional_law", "virology"]
    flags.DEFINE_list("subjects", subjects, "Subjects whose questions are asked.")
    flags.DEFINE_integer("num_fewshot", 5, "Examples before each question.", lower_bound=0)
    flags.DEFINE_integer("limit", 20, "Questions of each subject.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Of the Hugging Face backend.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds; each has all requests once a backend.", lower_bound=1)
    cli.define_path("output", f"{results.FOLDER}/evaluate.json", "The result.")
    cli.run(main)
