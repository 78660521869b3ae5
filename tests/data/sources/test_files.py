import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dataflex_jax.data.sources import files as records_module
from dataflex_jax.data.sources.files import read_records
from dataflex_jax.data.sources.names import split_format
from dataflex_jax.errors import InputError, one_line

RECORDS = [{"text": f"document {i}", "n": i} for i in range(3000)]
JSONL = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def write(folder, suffix):
    path = folder / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(JSONL)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(JSONL))
    elif suffix == ".jsonl.bz2":
        path.write_bytes(bz2.compress(JSONL))
    elif suffix == ".jsonl.xz":
        path.write_bytes(lzma.compress(JSONL))
    elif suffix == ".jsonl.zst":
        # Two frames, as tools that compress in chunks write them.
        half = JSONL.index(b"\n", len(JSONL) // 2) + 1
        path.write_bytes(zstandard.compress(JSONL[:half]) + zstandard.compress(JSONL[half:]))
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=1100)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
@pytest.mark.parametrize("start", [0, 1, 1100, 1101, 2999, 3000])
def test_every_format_reads_the_same_records_from_any_start(tmp_path, suffix, start):
    records = list(read_records(write(tmp_path, suffix), ["text"], start))
    assert [record.fields["text"] for record in records] == [record["text"] for record in RECORDS[start:]]
    assert [record.index for record in records] == list(range(start, 3000))
    positions = [record.position for record in records]
    assert positions == sorted(positions)
    if records:
        assert positions[-1] == (tmp_path / f"a{suffix}").stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_file_is_an_error_not_a_short_read(tmp_path, suffix, kept):
    path = write(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match="truncated or corrupt") as caught:
        list(read_records(path, ["text"]))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
def test_file_of_another_format_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(JSONL)
    with pytest.raises(InputError, match="corrupt"):
        list(read_records(path, ["text"]))


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.jsonl: "):
        list(read_records(path, ["text"]))


def test_bad_lines_carry_their_problem_and_reading_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "b"}')
    records = list(read_records(path, ["text"]))
    assert [record.index for record in records] == [0, 2, 3, 4, 5, 6]
    assert [record.problem is None for record in records] == [True, False, False, False, False, True]
    assert records[1].problem.startswith("not valid JSON: ")
    assert records[2].problem.startswith("not a JSON object but list")
    assert all("\n" not in (record.problem or "") for record in records)


def test_missing_parquet_column_lists_the_columns(tmp_path):
    with pytest.raises(InputError, match="no column 'content'; it has text, n"):
        list(read_records(write(tmp_path, ".parquet"), ["content"]))


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\ntwo é\n".encode())
    (record,) = read_records(path, ["body"])
    assert record.fields == {"body": "one\n\ntwo é\n"}
    assert list(read_records(path, ["body"], start=1)) == []
    path.write_bytes(b"caf\xe9")
    (record,) = read_records(path, ["body"])
    assert record.problem.startswith("not valid UTF-8")


def test_split_format():
    assert split_format("a.b.valid.jsonl.gz") == ("a.b.valid", ".jsonl.gz")
    assert split_format("notes.tsv") is None
    assert split_format(".hidden.jsonl") is None


def test_one_line_shortens_and_joins_lines():
    assert one_line("a\n b") == "a b"
    assert one_line("x" * 400) == "x" * 297 + "..."


def test_a_json_array_reads_like_lines_of_json(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "_READ_BYTES", 16)  # records that span several reads
    path = tmp_path / "a.json"
    for text in (json.dumps(RECORDS[:50]), json.dumps(RECORDS[:50], indent=2), "\ufeff" + JSONL.decode()):
        path.write_text(text)
        for start in (0, 7):
            found = list(read_records(path, ["text"], start))[: 50 - start]
            assert [record.fields for record in found] == RECORDS[start:50]
            assert [record.index for record in found] == list(range(start, 50))
    path.write_text(" [ ] ")
    assert list(read_records(path, ["text"])) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": }]', r"a.json: record 1 \(line 2\): not valid JSON, or truncated: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', r"a.json: record 0 \(line 2\): not valid JSON, or truncated: ',' or '\]' expected"),
        ('[{"a": 1}, {"a"', r"a.json: record 1 \(line 1\): not valid JSON, or truncated"),
        ("[" * 100_000, r"a.json: record 0 \(line 1\): not valid JSON, or truncated: nested deeper than 128"),
        ("", "the file is empty"),
    ],
)
def test_a_bad_json_array_names_record_and_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_records(path, ["a"]))


def test_an_object_over_several_lines_is_refused_with_what_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"text": "a"\n}\n')
    assert next(read_records(path, ["text"])).problem.endswith("; a .json file holds arrays, or one object a line")


def test_what_a_json_array_holds_beside_objects_is_a_bad_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, [2], {"a": 3}]')
    assert [record.problem is None for record in read_records(path, ["a"])] == [True, False, True]


def test_optional_columns_are_read_where_they_are(tmp_path):
    records = read_records(write(tmp_path, ".parquet"), ["text"], 0, ["n", "none"])
    assert next(records).fields == RECORDS[0]


def test_arrays_that_were_joined_are_all_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}]\n[ ]\n[{"a": 2},\n {"a": 3}] \n')
    for start in range(4):
        found = [record.fields["a"] for record in read_records(path, ["a"], start)]
        assert found == [1, 2, 3][start:]


@pytest.mark.parametrize("more", ['{"a": 2}', "x", "]", ","])
def test_other_text_after_an_array_is_refused(tmp_path, more):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}]\n' + more)
    with pytest.raises(InputError, match=r"a.json: record 1 \(line 2\): .*further text after the array"):
        list(read_records(path, ["a"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".txt"])
def test_a_record_is_never_held_beyond_the_limit(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 1 << 12)
    monkeypatch.setattr(records_module, "_READ_BYTES", 1 << 10)
    longest, text = json.dumps({"text": "x" * 4000}), json.dumps({"text": "x" * (1 << 16)})
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text(text)
        (record,) = read_records(path, ["text"])
        assert "split it into several" in record.problem
    elif suffix == ".json":
        path.write_text(f"[{longest}, {text}]")
        with pytest.raises(InputError, match=r"a.json: record 1 \(line 1\): .*split it into several"):
            list(read_records(path, ["text"]))
    else:
        content = f"{longest}\n{text}\n{longest}\n{text}".encode()
        packed = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix](content)
        path.write_bytes(packed)
        records = list(read_records(path, ["text"]))
        assert [record.problem is None for record in records] == [True, False, True, False]
        assert [record.index for record in records] == [0, 1, 2, 3]


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_damaged_stream_after_a_whole_one_is_an_error_not_the_end(tmp_path, suffix, pack):
    first, second = pack(b'{"text": "a"}\n'), pack(b'{"text": "b"}\n')
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(first + second + (b"\0" * 4 if suffix == ".xz" else b""))
    assert [record.fields["text"] for record in read_records(path, ["text"])] == ["a", "b"]
    path.write_bytes(first + b"?" + second[1:])
    with pytest.raises(InputError, match="truncated or corrupt"):
        list(read_records(path, ["text"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet"])
def test_a_git_lfs_pointer_is_no_data(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match=f"a{suffix}: a Git LFS pointer"):
        list(read_records(tmp_path / f"a{suffix}", ["text"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_deep_nesting_and_endless_numbers_are_bad_records(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for value in ("[" * 200 + "]" * 200, "[" * 100_000, "1" * 5000):
        path.write_text('{"text": ' + value + '}\n{"text": "b"}\n')
        records = list(read_records(path, ["text"]))
        assert [record.problem is None for record in records] == [False, True]
        path.with_suffix(".json").write_text('[{"text": ' + value + "}]")
        with pytest.raises(InputError, match=r"a.json: record 0 \(line 1\): not valid JSON"):
            list(read_records(path.with_suffix(".json"), ["text"]))


def test_values_of_a_table_that_python_has_no_form_for_are_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "when": pa.array([2**62], pa.timestamp("us"))}), path)
    with pytest.raises(InputError, match=r"a.parquet: cannot be read, or is truncated or corrupt: date value out of"):
        list(read_records(path, ["when"]))
    assert [record.fields for record in read_records(path, ["text"])] == [{"text": "x"}]


def test_rows_of_long_texts_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet")
    monkeypatch.setattr(records_module, "_PARQUET_BYTES", 100)
    asked = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, rows, **more: asked.append(rows) or iter_batches(self, rows, **more),
    )
    assert len(list(read_records(path, ["text"], 2900))) == 100
    assert 1 <= asked[0] < 10
