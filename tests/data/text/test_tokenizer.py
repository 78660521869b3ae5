import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
import tokenizers

from dataflex_jax.data.text import tokenizer as tokenizer_module
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError

TEXTS = ["def f(x):\n    return x + 1\n", "The quick brown fox.", "naïve café — 東京 🦊", "", " \n\t"] * 5


def load(spec, cache_dir, texts=TEXTS, **options):
    return load_tokenizer(spec, texts=lambda: iter(texts), cache_dir=cache_dir, **options)


def write_word_level(path, tokens, **fields):
    """A tokenizer.json that splits at spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for option, value in fields.items():
        getattr(backend, option)(**value)
    backend.save(str(path))


@pytest.mark.parametrize("spec", ["bytes", "train:300"])
def test_text_comes_back(tmp_path, spec):
    tokenizer = load(spec, tmp_path)
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert all(0 <= i < tokenizer.vocab_size for ids in encoded for i in ids)
    assert not any(tokenizer.eos_id in ids for ids in encoded)


def test_bytes_are_the_bytes(tmp_path):
    tokenizer = load("bytes", tmp_path)
    text = bytes(range(128)).decode() + "é🦊"
    assert tokenizer.encode_batch([text]) == [list(text.encode())]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


@pytest.mark.parametrize("spec", ["bytes", "train:300"])
def test_text_never_becomes_a_control_token(tmp_path, spec):
    tokenizer = load(spec, tmp_path)
    (ids,) = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_training_happens_once_per_content(tmp_path):
    calls = []

    def texts(documents):
        calls.append(len(documents))
        return iter(documents)

    options = {"cache_dir": tmp_path, "texts_fingerprint": "content"}
    first = load_tokenizer("train:300", texts=lambda: texts(TEXTS), **options)
    again = load_tokenizer("train:300", texts=lambda: texts(TEXTS), **options)
    assert len(calls) == 1
    assert first == again
    other = load("train:300", tmp_path, ["other words here"] * 9)
    assert other.fingerprint != first.fingerprint
    assert first.vocab_size == 300


def test_training_is_the_same_in_every_process(tmp_path):
    words = [hashlib.md5(str(i % 97).encode()).hexdigest() for i in range(2000)]
    code = (
        "import hashlib, sys; from dataflex_jax.data.text.tokenizer import load_tokenizer\n"
        "words = [hashlib.md5(str(i % 97).encode()).hexdigest() for i in range(2000)]\n"
        "t = load_tokenizer('train:700', texts=lambda: iter(words), cache_dir=sys.argv[1])\n"
        "assert 'transformers' not in sys.modules\n"
        "print(t.fingerprint)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == load("train:700", tmp_path / "b", words).fingerprint


@pytest.mark.parametrize("spec", ["train:", "train:many", "train:256", "train:-1", "train:9999999999"])
def test_bad_vocabulary_size(tmp_path, spec):
    with pytest.raises(InputError, match="VOCAB must be an integer from 257"):
        load(spec, tmp_path)


def test_training_without_documents(tmp_path):
    with pytest.raises(InputError, match="no training document"):
        load("train:300", tmp_path, [])


@pytest.mark.parametrize("spec", ["bytes", "train:300"])
def test_saved_tokenizer_loads_as_the_same(tmp_path, spec):
    tokenizer = load(spec, tmp_path)
    tokenizer.save(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), tmp_path) == tokenizer
    assert load(str(tmp_path / "saved" / "tokenizer.json"), tmp_path) == tokenizer


def test_file_and_folder_with_their_end_of_text(tmp_path):
    write_word_level(tmp_path / "t" / "tokenizer.json", ["[UNK]", "a", "b", "</s>", "stop"])
    by_folder, by_file = load(str(tmp_path / "t"), tmp_path), load(str(tmp_path / "t" / "tokenizer.json"), tmp_path)
    assert by_folder == by_file
    assert (by_file.vocab_size, by_file.eos_id) == (5, 3)
    chosen = load(str(tmp_path / "t"), tmp_path, eos_token="stop")
    assert chosen.eos_id == 4
    assert chosen.fingerprint != by_file.fingerprint
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "b"}}))
    assert load(str(tmp_path / "t" / "tokenizer.json"), tmp_path).eos_id == 2


@pytest.mark.parametrize(("declared", "stops"), [(2, (3, 2)), ([2, 3, 4], (3, 2, 4)), (None, (3,)), (3, (3,))])
def test_generation_stops_where_the_model_says(tmp_path, declared, stops):
    write_word_level(tmp_path / "t" / "tokenizer.json", ["[UNK]", "a", "b", "</s>", "stop"])
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": declared, "top_p": 0.8}))
    by_file = load(str(tmp_path / "t" / "tokenizer.json"), tmp_path)
    assert (by_file.eos_id, by_file.stop_ids) == (3, stops)
    by_file.save(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), tmp_path).stop_ids == stops
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == {"eos_token_id": list(stops) if len(stops) > 1 else 3}


@pytest.mark.parametrize("text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, -2]}', "[true]", "{"])
def test_stop_tokens_that_are_none_are_refused(tmp_path, text):
    write_word_level(tmp_path / "t" / "tokenizer.json", ["[UNK]", "a", "</s>"])
    (tmp_path / "t" / "generation_config.json").write_text(text)
    with pytest.raises(
        InputError, match=r"generation_config.json: (eos_token_id must be|not valid JSON|a JSON list)"
    ) as caught:
        load(str(tmp_path / "t"), tmp_path)
    assert "\n" not in str(caught.value)


def test_end_of_text_that_is_unknown_or_absent(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_word_level(path, ["[UNK]", "a"])
    with pytest.raises(
        InputError, match=r"no known end-of-text token; name one of its tokens in config.data.eos_token"
    ):
        load(str(path), tmp_path)
    with pytest.raises(InputError, match=r"config.data.eos_token = 'z': not in the vocabulary"):
        load(str(path), tmp_path, eos_token="z")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_word_level(
        path, ["[UNK]", "a", "</s>"], enable_truncation={"max_length": 2}, enable_padding={"length": 8, "pad_id": 0}
    )
    assert load(str(path), tmp_path).encode_batch(["a a a a"]) == [[1, 1, 1, 1]]


@pytest.mark.parametrize("cut", ["\n", ""])
def test_long_texts_are_encoded_in_pieces(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 7)
    tokenizer = load("bytes", tmp_path)
    texts = [cut.join(["abcde"] * 5), "short", ""]
    assert tokenizer.encode_batch(texts) == [list(text.encode()) for text in texts]


def test_a_long_text_is_encoded_a_slice_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 7)
    monkeypatch.setattr(tokenizer_module, "_SLICE_CHARACTERS", 20)
    tokenizer = load("bytes", tmp_path)
    sizes = []

    class Backend:
        def encode_batch_fast(self, pieces, **options):
            sizes.append(sum(map(len, pieces)))
            return tokenizer._backend.encode_batch_fast(pieces, **options)

    texts = ["x" * 100, "", "short", "y" * 40]
    ids = dataclasses.replace(tokenizer, _backend=Backend()).encode_batch(texts)
    assert ids == [list(text.encode()) for text in texts]
    assert max(sizes) <= 26
    assert len(sizes) > 4


@pytest.mark.parametrize("spec", ["./nowhere", "/no/such/folder", "a b"])
def test_missing_path(tmp_path, spec):
    with pytest.raises(InputError, match="no such file or folder; accepted: a hub id"):
        load(spec, tmp_path)


def test_no_access_to_the_hub_is_one_line(tmp_path, monkeypatch):
    import transformers

    def offline(name):
        raise OSError("We couldn't connect to the hub\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"config.data.tokenizer = 'someone/model': cannot be loaded") as caught:
        load("someone/model", tmp_path)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer.json"):
        load(str(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"config.data.tokenizer: not set"):
        load("", tmp_path)


def test_variables_in_its_path_are_expanded(tmp_path, monkeypatch):
    write_word_level(tmp_path / "t" / "tokenizer.json", ["[UNK]", "a", "b", "</s>"])
    monkeypatch.setenv("TOKENIZERS", str(tmp_path))
    assert load("$TOKENIZERS/t", tmp_path) == load(str(tmp_path / "t"), tmp_path)
