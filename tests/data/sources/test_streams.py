import json

import datasets
import pytest
from ml_collections import ConfigDict

from dataflex_jax.data.sources.table import open_source
from dataflex_jax.errors import InputError


def config(**fields):
    return ConfigDict(
        {
            "source": "local",
            "root": None,
            "domains": None,
            "domain_field": None,
            "domain_values": None,
            "max_samples": None,
            "weight_key": None,
            "hub_config": None,
            "hub_split": "train",
            "text_field": "text",
            "formatting": None,
        }
        | fields
    )


def write_jsonl(path, *texts, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))


def texts(stream, parts):
    return [document.text for part in parts for document in stream.documents(part)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    write_jsonl(root / "b.jsonl", "b0")
    write_jsonl(root / "b.valid.jsonl", "b1")
    write_jsonl(root / "a" / "2.jsonl", "a2")
    write_jsonl(root / "a" / "1.jsonl", "a1")
    write_jsonl(root / "a" / "3.valid.jsonl", "a3")
    (root / "c.txt").write_text("c0")
    (root / "readme.md").write_text("not data")
    (root / "provenance").mkdir()
    return root


def test_local_files_and_folders_are_domains(folder):
    a, b, c = open_source(config(root=str(folder)))
    assert [stream.domains for stream in (a, b, c)] == [{None: "a"}, {None: "b"}, {None: "c"}]
    assert [texts(stream, stream.train) for stream in (a, b, c)] == [["a1", "a2"], ["b0"], ["c0"]]
    assert [texts(stream, stream.valid) for stream in (a, b, c)] == [["a3"], ["b1"], []]


def test_domains_are_chosen_and_ordered(folder):
    streams = open_source(config(root=str(folder), domains=("c", "a")))
    assert [stream.domains for stream in streams] == [{None: "c"}, {None: "a"}]


def test_unknown_domain_lists_the_available_ones(folder):
    with pytest.raises(InputError, match=r"'d' is not in .*; available: a, b, c"):
        open_source(config(root=str(folder), domains=("a", "d")))


def test_two_inputs_for_one_domain_are_refused(folder):
    write_jsonl(folder / "c.jsonl", "c1")
    with pytest.raises(InputError, match=r"'c' has several inputs \(c.jsonl, c.txt\)"):
        open_source(config(root=str(folder)))


def test_held_out_file_without_training_file_is_refused(folder):
    write_jsonl(folder / "d.valid.jsonl", "d")
    with pytest.raises(InputError, match=r"d.valid.jsonl: held-out file of domain 'd'"):
        open_source(config(root=str(folder)))


@pytest.mark.parametrize("field", [None, "meta.set"])
@pytest.mark.parametrize("name", ["missing", "empty"])
def test_missing_or_empty_folder(tmp_path, name, field):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        open_source(config(root=str(tmp_path / name), domain_field=field))


@pytest.mark.parametrize("name", ["d.jsonl", "d", "a/4.jsonl"])
@pytest.mark.parametrize("field", [None, "meta.set"])
def test_a_link_to_nothing_is_refused(folder, name, field):
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(InputError, match=rf"{name}: a link to .*/gone, which does not exist; repair or delete") as e:
        open_source(config(root=str(folder), domain_field=field))
    assert "\n" not in str(e.value)
    (folder / "gone").mkdir()
    (folder / "gone" / "x.jsonl").write_text('{"text": "x"}\n')
    open_source(config(root=str(folder), domain_field=field))


def test_hidden_links_and_links_to_data_are_taken_as_they_are(folder):
    (folder / ".#lock").symlink_to(folder / "gone")
    (folder / "d.jsonl").symlink_to(folder / "b.jsonl")
    stream = open_source(config(root=str(folder)))[-1]
    assert (stream.domains, texts(stream, stream.train)) == ({None: "d"}, ["b0"])


def test_domain_field_makes_one_stream_of_all_files(tmp_path):
    write_jsonl(tmp_path / "train" / "x.jsonl", "x", meta={"set": "X"})
    write_jsonl(tmp_path / "train" / "y.jsonl", "y", meta={"set": "Y"})
    write_jsonl(tmp_path / "validation" / "v.jsonl", "v", meta={"set": "Y"})
    write_jsonl(tmp_path / "train" / "w.valid.jsonl", "w", meta={"set": "X"})
    write_jsonl(tmp_path / "test" / "t.jsonl", "t", meta={"set": "X"})
    (stream,) = open_source(
        config(root=str(tmp_path), domain_field="meta.set", domains=("one", "two"), domain_values=("Y", "X"))
    )
    assert stream.domains == {"Y": "one", "X": "two"}
    assert texts(stream, stream.train) == ["x", "y"]
    assert texts(stream, stream.valid) == ["w", "v"]
    assert [d.value for part in stream.train for d in stream.documents(part)] == ["X", "Y"]


def test_problems_name_line_field_and_what_there_is(tmp_path):
    lines = [
        '{"body": "x", "id": 1, "meta": {"set": "X"}}',
        '{"text": 3, "meta": {"set": "X"}}',
        '{"text": "x", "meta": {}}',
        '{"text": "x", "meta": {"set": 1.5}}',
        '{"text": "\\ud800", "meta": {"set": "X"}}',
        "{",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    (stream,) = open_source(config(root=str(path), domain_field="meta.set"))
    problems = [document.problem for document in stream.documents(stream.train[0])]
    assert problems[0] == f"{path}:1: no field 'text' (option text_field); the record has body, id, meta"
    assert problems[1] == f"{path}:2: field 'text' (option text_field) must be a string but is int"
    assert problems[2] == f"{path}:3: no field 'meta.set' (option domain_field); field 'meta' has none"
    assert (
        problems[3] == f"{path}:4: field 'meta.set' (option domain_field) must be a string or an integer but is float"
    )
    assert problems[4] == f"{path}:5: the text holds an unpaired surrogate (character 0)"
    assert problems[5].startswith(f"{path}:6: not valid JSON: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "web"}, "config.data.source = 'web': must be one of 'builtin', 'local', 'hub', 'dataset_info'"),
        ({"root": None}, "config.data.root: needed for source 'local'"),
        ({"domains": ("a", "a")}, "name each domain once"),
        ({"domains": ()}, "at least one"),
        (
            {"domain_values": ("X",)},
            "config.data.domain_values = .*: must have one value for each of config.data.domains",
        ),
        (
            {"domain_field": "f", "domains": ("a", "b"), "domain_values": ("X",)},
            "config.data.domain_values = .*: must have one value for each of config.data.domains, all distinct",
        ),
        ({"source": "builtin", "domain_field": "f"}, "config.data.domain_field: not with source 'builtin'"),
        ({"source": "builtin", "domains": ("poetry",)}, "'poetry' is not in the builtin corpus; available: code"),
    ],
)
def test_options_that_do_not_fit(folder, fields, message):
    with pytest.raises(InputError, match=message):
        open_source(config(**({"root": str(folder)} | fields)))


ROWS = [{"text": f"row {i}", "meta": {"set": "XY"[i % 2]}} for i in range(2500)]


def test_saved_dataset_dict_with_held_out_split(tmp_path):
    train, valid = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:3])
    datasets.DatasetDict(train=train, validation=valid).save_to_disk(str(tmp_path / "corpus"))
    (stream,) = open_source(config(source="hub", root=str(tmp_path / "corpus"), domain_field="meta.set"))
    assert stream.domains is None
    assert texts(stream, stream.train) == [row["text"] for row in ROWS]
    assert texts(stream, stream.valid) == ["row 0", "row 1", "row 2"]
    later = list(stream.documents(stream.train[0], start=1200))
    assert [document.text for document in later] == [row["text"] for row in ROWS[1200:]]
    assert [later[0].index, later[0].value] == [1200, "X"]
    with pytest.raises(InputError, match=r"config.data.hub_split = 'dev': .* has train, validation"):
        open_source(config(source="hub", root=str(tmp_path / "corpus"), hub_split="dev"))


def test_saved_dataset_is_a_domain_of_its_name_and_its_content_counts(tmp_path):
    fingerprints = set()
    for name, rows in (("one", ROWS[:9]), ("two", ROWS[1:10]), ("three", ROWS[:9])):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
        (stream,) = open_source(config(source="hub", root=str(tmp_path / name)))
        assert stream.domains == {None: name}
        fingerprints.add(stream.train[0].fingerprint(lambda path: str(hash(path.read_bytes()))))
    assert len(fingerprints) == 2
    (stream,) = open_source(config(source="hub", root=str(tmp_path / "one"), text_field="body"))
    with pytest.raises(InputError, match=r"no column 'body'; it has text, meta"):
        texts(stream, stream.train)


def test_dataset_files_load_through_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "corpus" / "train.jsonl", "a", "b")
    write_jsonl(tmp_path / "corpus" / "validation.jsonl", "c")
    (stream,) = open_source(config(source="hub", root=str(tmp_path / "corpus")))
    assert (texts(stream, stream.train), texts(stream, stream.valid)) == (["a", "b"], ["c"])


def test_dataset_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(InputError, match="cannot be loaded as a Hugging Face dataset") as caught:
        open_source(config(source="hub", root=str(tmp_path / "corpus")))
    assert "\n" not in str(caught.value)
