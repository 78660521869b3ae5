"""Tokenizers of others: what their documents begin with, their files as they came, and each fault in one line."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
import transformers

from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.text.chat import ChatEncoder
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from tests.helpers import foreign_tokenizer
from tests.helpers.foreign_tokenizer import BEGIN, END, TOKENS, TURN_END

TEXTS = ["the other", "", "<|begin_of_text|>the"]


def load(spec, **options):
    return load_tokenizer(str(spec), texts=None, cache_dir=".", **options)


def json_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def changed(path, **fields):
    path.write_text(json.dumps(json_of(path) | fields), encoding="utf-8")


def fault(spec, **options):
    """The one line with which a tokenizer is refused."""
    with pytest.raises(InputError) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What documents begin with.


def test_documents_and_prompts_begin_as_transformers_has_it(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for spec in (folder, folder / "tokenizer.json"):
        tokenizer = load(spec)
        for text, prompt, document in zip(
            TEXTS[:2], tokenizer.encode_prompts(TEXTS), tokenizer.encode_documents(TEXTS), strict=False
        ):
            assert prompt == reference(text)["input_ids"]
            assert document == [*prompt, END]


def test_a_text_that_holds_the_token_is_characters_after_it(tmp_path):
    (ids,) = load(foreign_tokenizer.write(tmp_path / "t")).encode_prompts(["<|begin_of_text|>"])
    assert ids[0] == BEGIN
    assert not set(ids[1:]) & set(range(len(TOKENS)))


def test_a_chat_has_it_once_as_its_template_writes_it(tmp_path):
    tokenizer = load(foreign_tokenizer.write(tmp_path / "t"))
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "other"}]
    (encoded,) = ChatEncoder(tokenizer, tokenizer.chat_template).encode_batch([Conversation(messages)])
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert encoded.tokens.tolist() == reference.apply_chat_template(messages, return_dict=False)
    assert encoded.tokens.tolist().count(BEGIN) == 1


def renumbered(folder, number):
    """The folder, with `number(id, token)` for the ids of its tokens but for the control tokens."""
    rules = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    rules["model"]["vocab"] = {t: i if t in TOKENS else number(i, t) for t, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return folder


def test_a_vocabulary_with_holes_has_the_same_chats(tmp_path):
    messages = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "the lazy"}]
    folder = renumbered(foreign_tokenizer.write(tmp_path / "t"), lambda i, token: i + 3)
    tokenizer = load(folder)
    (encoded,) = ChatEncoder(tokenizer, tokenizer.chat_template).encode_batch([Conversation(messages)])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert encoded.tokens.tolist() == reference.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (lambda i, token: 2**31 if token == "q" else i, "token 'q' has the id 2147483648; it must be below"),
        (lambda i, token: i - (token == "the"), "the tokens 'th' and 'the' have the same id"),
    ],
)
def test_ids_that_no_model_has_and_those_of_two_tokens_are_refused(tmp_path, number, said):
    folder = renumbered(foreign_tokenizer.write(tmp_path / "t"), number)
    assert fault(folder).startswith(f"{folder / 'tokenizer.json'}: {said}")


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_option_wins_and_is_saved(tmp_path, adds, wanted):
    tokenizer = load(foreign_tokenizer.write(tmp_path / "t", begin=adds), begin_of_text=wanted)
    assert tokenizer.begin_ids == ((BEGIN,) if wanted else ())
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved") == tokenizer
    assert load(tmp_path / "t").fingerprint == tokenizer.fingerprint
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reference("the other")["input_ids"] == tokenizer.encode_prompts(["the other"])[0]
    same = (tmp_path / "saved" / "tokenizer.json").read_bytes() == (tmp_path / "t" / "tokenizer.json").read_bytes()
    assert same == (adds == wanted)


@pytest.mark.parametrize(("declared", "begin"), [(True, (BEGIN,)), (False, ()), (None, ())])
def test_a_class_of_its_own_goes_by_its_field(tmp_path, declared, begin):
    folder = foreign_tokenizer.write(
        tmp_path / "t", begin=False, tokenizer_class="LlamaTokenizerFast", add_bos_token=declared
    )
    for spec in (folder, folder / "tokenizer.json"):
        tokenizer = load(spec)
        assert tokenizer.begin_ids == begin
        tokenizer.save(tmp_path / "saved")
        assert load(tmp_path / "saved").begin_ids == begin


def test_made_tokenizers_have_no_token_to_begin_with(tmp_path):
    assert load("bytes").encode_prompts(["a"]) == [[97]]
    assert fault("bytes", begin_of_text=True) == (
        "config.data.begin_of_text = True: config.data.tokenizer = 'bytes' has no bos_token"
    )
    nameless = foreign_tokenizer.write(tmp_path / "t", begin=False, bos_token=None)
    assert "config.data.begin_of_text = True" in fault(nameless, begin_of_text=True)


# As they came.


def test_files_are_saved_as_they_came(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t")
    (folder / "special_tokens_map.json").write_text('{"bos_token":   "<|begin_of_text|>"}')
    load(folder).save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert json_of(tmp_path / "saved" / "generation_config.json") == {
        "bos_token_id": BEGIN,
        "eos_token_id": [END, TURN_END],
    }


def test_only_what_is_other_here_is_written_anew(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": TOKENS[END]}, "x": 1}))
    load(folder, eos_token="<|eot_id|>").save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json_of(tmp_path / "saved" / "tokenizer_config.json") == foreign_tokenizer.CONFIG | {
        "eos_token": "<|eot_id|>"
    }
    assert json_of(tmp_path / "saved" / "special_tokens_map.json") == {"eos_token": "<|eot_id|>", "x": 1}


def test_words_of_transformers_5_are_not_written(tmp_path):
    """Run folders of version 0.1.0 have them too."""
    folder = foreign_tokenizer.write(
        tmp_path / "t", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|eot_id|>"]
    )
    before = load(folder)
    before.save(tmp_path / "saved")
    config = json_of(tmp_path / "saved" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|eot_id|>"]
    assert load(tmp_path / "saved") == before


def test_a_class_that_only_config_json_names_is_written(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t", tokenizer_class=None)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    before = load(folder)
    before.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    assert json_of(tmp_path / "saved" / "tokenizer_config.json")["tokenizer_class"] == "Qwen2Tokenizer"
    assert load(tmp_path / "saved") == before


def test_a_hub_ids_files_come_from_its_snapshot(tmp_path, monkeypatch):
    folder = foreign_tokenizer.write(tmp_path / "t")
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tokenizer = load("someone/model")
    tokenizer.save(tmp_path / "saved")
    original = repository / "snapshots" / ("0" * 40) / "tokenizer.json"
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == original.read_bytes()


def test_a_byte_order_mark_is_passed_over(tmp_path):
    plain = load(foreign_tokenizer.write(tmp_path / "plain"))
    folder = foreign_tokenizer.write(tmp_path / "marked")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert load(folder) == load(folder / "tokenizer.json") == plain
    load(folder).save(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")


# Code.


def test_code_beside_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("it asks")

    monkeypatch.setattr("builtins.input", never)
    folder = foreign_tokenizer.write(
        tmp_path / "t", tokenizer_class="MyTok", auto_map={"AutoTokenizer": ["tokenization_my.MyTok", None]}
    )
    (folder / "tokenization_my.py").write_text("raise SystemExit('it ran')\nclass MyTok: pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "tokenization_my.C"}})
    )
    tokenizer = load(folder)  # by its tokenizer.json
    assert tokenizer.begin_ids == (BEGIN,)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved") == tokenizer
    assert "auto_map" not in json_of(tmp_path / "saved" / "tokenizer_config.json")
    (folder / "tokenizer.json").unlink()
    assert fault(folder) == (
        f"{folder}/tokenizer_config.json: a tokenizer with code of its own is not supported, none is ever run; a "
        "tokenizer.json is needed"
    )


def test_nothing_is_said_about_pytorch():
    code = "from dataflex_jax.data.text.pretrained import quiet_transformers as quiet; quiet().AutoTokenizer"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" not in run.stdout + run.stderr


# Faults.


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "': has no tokenizer; a tokenizer.json is needed, or vocab.json and merges.txt"),
        ({"config.json": '{"model_type": "qwen2"}'}, "': has no tokenizer; a tokenizer.json is needed"),
        ({"config.json": '{"model_type": "llama"}', "tokenizer_config.json": "{}"}, "': has no tokenizer; a tokenizer"),
        (
            {"tokenizer.model": "\n\x07<unk>"},
            "/tokenizer.model: a SentencePiece model alone; a tokenizer.json is needed",
        ),
        ({"vocab.json": '{"a": 0}'}, "': has no tokenizer; a tokenizer.json is needed"),
        (
            {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
            "/tokenizer.json: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder",
        ),
    ],
)
def test_a_folder_without_a_tokenizer(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert f"{tmp_path}{reason}" in fault(tmp_path)


WRONG = {
    "cut short": ("tokenizer_config.json", '{"eos_token": ', "not valid JSON (Expecting value"),
    "a list": ("tokenizer_config.json", "[]", "a JSON list; one object is expected"),
    "deep": ("tokenizer_config.json", '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "not valid JSON (nested deeper"),
    "digits": ("tokenizer_config.json", '{"a": ' + "1" * 6000 + "}", "not valid JSON (an integer with thousands"),
    "not UTF-8": ("tokenizer_config.json", b'{"a": "\xff"}', "not valid JSON ("),
    "eos_token": (
        "tokenizer_config.json",
        '{"eos_token": 5}',
        "eos_token must be a token or an object with its content",
    ),
    "content": ("tokenizer_config.json", '{"pad_token": {"content": []}}', "pad_token must be a token or an object"),
    "chat_template": ("tokenizer_config.json", '{"chat_template": 7}', "chat_template must be a text or named texts"),
    "templates": ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template must be a text or"),
    "class": ("tokenizer_config.json", '{"tokenizer_class": ["x"]}', "tokenizer_class must be a name but is ['x']"),
    "add_bos_token": ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true or false"),
    "special tokens": ("special_tokens_map.json", '{"bos_token": [1]}', "bos_token must be a token or an object"),
    "generation": (
        "generation_config.json",
        '{"eos_token_id": [1, true]}',
        "eos_token_id must be a token id or a list",
    ),
    "template file": ("chat_template.jinja", b"\xff\xfe{{", "not UTF-8"),
    "no tokenizer": ("tokenizer.json", '{"version": "1.0"}', "is not a tokenizer.json"),
    "cut tokenizer": (
        "tokenizer.json",
        '{"version": "1.0", "model": {"type": "BPE", "vocab"',
        "is not a tokenizer.json",
    ),
    "model config": ("config.json", "{", "not valid JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_file_is_named(tmp_path, name):
    file, text, reason = WRONG[name]
    folder = foreign_tokenizer.write(tmp_path / "t")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert fault(folder).startswith(f"{folder / file}: {reason}")
    if file != "config.json":
        assert fault(folder / "tokenizer.json").startswith(f"{folder / file}: {reason}")


def test_what_the_library_stumbles_over_names_the_folder(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t", added_tokens_decoder={"zero": 5})
    assert fault(folder).startswith(f"{folder}: its tokenizer files cannot be loaded (")


def test_a_file_of_another_kind_is_refused(tmp_path):
    folder = foreign_tokenizer.write(tmp_path / "t")
    (folder / "special_tokens_map.json").mkdir()
    assert fault(folder) == f"{folder}/special_tokens_map.json: not a file; a file is expected"
