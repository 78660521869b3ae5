"""A run in the tokens of others, whose texts begin with one of their own: kept, resumed, exported, loaded elsewhere."""

import json
import shutil
import subprocess
import sys

import pytest

from dataflex_jax.data.text.rendering import ChatTemplate
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.training import run_config
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.locate import use_tokenizer_of
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import foreign_tokenizer, tiny
from tests.helpers.foreign_tokenizer import BEGIN


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return foreign_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "t")


def config(root, tokenizer_folder, **fields):
    fields = {"data__tokenizer": str(tokenizer_folder), "train_step": 2, **fields}
    return tiny.config(root, mixer="", **fields)


@pytest.fixture(scope="module")
def trained(root, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_and_evaluate(config(root, tokenizer_folder), folder)
    return folder


@pytest.fixture(scope="module")
def old(root, tokenizer_folder, tmp_path_factory):
    """A run of version 0.1.0: without the token, although its tokenizer adds it, and without the field."""
    folder = tmp_path_factory.mktemp("old")
    train_and_evaluate(config(root, tokenizer_folder, data__begin_of_text=False), folder)
    saved = json.loads((folder / "config.json").read_text())
    del saved["config"]["data"]["begin_of_text"]
    (folder / "config.json").write_text(json.dumps(saved))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


def test_the_files_are_kept_and_exported_as_they_came(trained, tokenizer_folder, tmp_path):
    export_checkpoint(trained, tmp_path / "hf")
    for folder in (trained / "tokenizer", tmp_path / "hf"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == BEGIN
    assert open_model(trained).tokenizer.begin_ids == (BEGIN,)


def test_an_older_run_goes_on_without_the_token(old, root, tokenizer_folder, tmp_path):
    run = shutil.copytree(old, tmp_path / "run")
    train_and_evaluate(config(root, tokenizer_folder, train_step=3), run)
    assert run_config.read(run).data.begin_of_text is False
    assert len(tiny.records(run, "metrics.jsonl")) == 3
    assert open_model(run).tokenizer.begin_ids == ()
    data = config(root, "any").data
    use_tokenizer_of(data, run)
    assert (data.tokenizer, data.begin_of_text) == (str(run / "tokenizer"), False)
    with pytest.raises(InputError, match=r"its text, tokenizer, data.begin_of_text or held-out split is not what"):
        train_and_evaluate(config(root, tokenizer_folder, data__begin_of_text=True), run)


CHAT = [{"role": "user", "content": "the"}]
READ = f"""
import json, sys, transformers
chat = {CHAT}
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None
    print(json.dumps([tokenizer("the other 12\\n")["input_ids"], tokenizer.eos_token, tokenizer.bos_token, rendered]))
"""


@pytest.mark.slow
def test_transformers_4_loads_what_is_written(trained, old, tokenizer_folder, tmp_path):
    """In an environment of its own; vLLM and llama.cpp's converter read the folder with it."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    install = [python, "-m", "pip", "install", "-q", "transformers>=4.57,<5", "jinja2>=3.1"]
    made = subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"transformers 4 cannot be installed here: {made.stderr[-300:]}")

    five = foreign_tokenizer.write(
        tmp_path / "five", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|eot_id|>"]
    )
    folders = [tmp_path / "trained", tmp_path / "old"]
    export_checkpoint(trained, folders[0])
    export_checkpoint(old, folders[1])
    texts = ["the other 12\n"] * 3
    for name, spec in (("five", five), ("bytes", "bytes"), ("train", "train:300"), ("file", five / "tokenizer.json")):
        folders.append(tmp_path / "saved" / name)
        load_tokenizer(str(spec), texts=lambda: iter(texts), cache_dir=tmp_path).save(folders[-1])

    read = subprocess.run([python, "-c", READ, *map(str, folders)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    for folder, line in zip(folders, read.stdout.splitlines(), strict=True):
        ours = load_tokenizer(str(folder), texts=None, cache_dir=tmp_path)
        ids, eos, bos, rendered = json.loads(line)
        assert [ids] == ours.encode_prompts(texts[:1]), folder
        assert (eos, bos) == (ours.eos_token, ours.bos_token)
        own = ours.chat_template and ChatTemplate(ours.chat_template, ours.template_variables, 100).render(CHAT)
        assert rendered == own
