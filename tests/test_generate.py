"""The command that prompts a checkpoint."""

import importlib.util
import json
import subprocess
import sys

import pytest

from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.generate import continuations
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import command, tiny

PROMPTS = ["012", "aei"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return command.Trainer(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run_folder(trainer):
    train_and_evaluate(tiny.config(trainer.root, train_step=30), trainer.folder / "run")
    return trainer.folder / "run"


def generate(trainer, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dataflex_jax.generate", *arguments],
        cwd=command.PROJECT,
        env=trainer.environment(1, {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_continues_in_the_language_of_the_prompt(trainer, run_folder):
    options = {"max_new_tokens": 6, "temperature": 0.3, "seeds": [5, 6]}
    texts = continuations(open_model(run_folder), PROMPTS, **options)
    for continuation, alphabet in zip(texts, (tiny.DOMAINS["digits"], tiny.DOMAINS["vowels"]), strict=True):
        assert len(continuation) == 6
        assert set(continuation) <= set(alphabet)
    flags = [f"--prompt={prompt}" for prompt in PROMPTS] + ["--max_new_tokens=6", "--temperature=0.3", "--seed=5"]
    result = generate(trainer, f"--checkpoint={run_folder}", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{p}{c}\n\n" for p, c in zip(PROMPTS, texts, strict=True))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run that has learnt to say "yes." to everything and then to end its turn."""
    folder = tmp_path_factory.mktemp("tuned")
    questions = [{"instruction": f"Is {i} a number?", "output": "yes."} for i in range(60)]
    (folder / "data").mkdir()
    (folder / "data" / "questions.json").write_text(json.dumps(questions))
    fields = {"formatting": "alpaca", "cutoff_len": 160, "buckets": (160,)}
    config = tiny.config(folder / "data", train_step=30, **{f"data__{name}": value for name, value in fields.items()})
    train_and_evaluate(config, folder / "run")
    return folder / "run"


def test_a_tuned_model_ends_its_turn(trainer, tuned, tmp_path):
    options = {"max_new_tokens": 12, "chat": True}
    assert continuations(open_model(tuned), ["Is 7 a number?", "Is 77?"], **options) == ["yes.", "yes."]
    result = generate(trainer, f"--checkpoint={tuned}", "--prompt=Is 7 a number?", "--chat", "--max_new_tokens=12")
    assert (result.returncode, result.stdout) == (0, "Is 7 a number?\nyes.\n\n"), result.stderr

    export_checkpoint(tuned, tmp_path / "hf")
    declared = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path / "hf"), texts=iter, cache_dir=tmp_path)
    assert [tokenizer.decode([i]) for i in declared["eos_token_id"]] == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.stop_ids == tuple(declared["eos_token_id"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra torch")  # before it is trained
def test_transformers_ends_the_turn_of_an_exported_model(tuned, tmp_path):
    import torch
    import transformers

    export_checkpoint(tuned, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "Is 7 a number?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(tokens) == "yes.<|im_end|>"


def test_bad_options_are_refused(trainer, run_folder, tmp_path):
    messages = {
        ("--prompt=a",): "--checkpoint is missing: a run folder, the folder of one step in it, or a Hug",
        ("--checkpoint=RUN",): "--prompt is missing: the text to continue",
        ("--checkpoint=RUN", "--prompt=a", "--chat"): "--chat: the tokenizer of RUN has no chat templ",
        ("--checkpoint=RUN", "--prompt=a", "--top_p=2"): "top_p=2.0: must be a finite number from 0 to 1",
    }
    calls = [[argument.replace("RUN", str(run_folder)) for argument in arguments] for arguments in messages]
    results = command.in_forks(trainer, tmp_path, [("dataflex_jax.generate", *call) for call in calls])
    for result, message in zip(results, messages.values(), strict=True):
        assert result.returncode == 2
        assert command.the_error(result).startswith(f"error: {message}".replace("RUN", str(run_folder)))
