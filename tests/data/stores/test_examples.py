"""The examples store holds every conversation once; rows, batches and packing show the model just that."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.configs import base
from dataflex_jax.data.batch import collated
from dataflex_jax.data.domains import buckets, example_domains, open_domains
from dataflex_jax.data.loader import Loader, held_out_batches, segment_slots
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import ExampleRows, PackedRows, bucket_of, pack
from dataflex_jax.data.sampler import Plan
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.stores import build
from dataflex_jax.data.stores.examples import open_example_stores
from dataflex_jax.data.stores.writer import DomainWriter
from dataflex_jax.data.text.chat import ChatEncoder, template_text
from dataflex_jax.data.window import Sequences
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from tests.helpers import tiny


def record(i, length):
    return {"instruction": f"Question {i}?", "output": "word " * length, "meta": {"subject": f"s{i % 3}"}}


RECORDS = [record(i, 1 + 7 * i % 40) for i in range(40)]


@pytest.fixture
def root(tmp_path):
    """a.json with 40 examples; b.jsonl with 3, of which the last is held out by its own file."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(RECORDS))
    for name, records in (("b", RECORDS[:2]), ("b.valid", RECORDS[2:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config(root, **fields):
    return tiny.config(root, data__formatting="alpaca", data__template="qwen", data__cutoff_len=512, **fields).data


def opened(root, **fields):
    return open_example_stores(config(root, **fields), progress=False)


def stored(examples):
    return [examples.example(i) for i in range(examples.num_documents)]


def encoded(tokenizer, records, **options):
    reader = ConversationReader.usual("alpaca")
    chat = ChatEncoder(tokenizer, template_text("qwen", tokenizer), **options)
    return chat.encode_batch([reader.conversation(r) for r in records])


def test_the_store_holds_every_conversation_once_with_its_record_number(root):
    (a, b), tokenizer = opened(root)
    assert (a.name, b.name) == ("a", "b")
    assert sorted([*a.train.ids, *a.valid.ids]) == list(range(40))
    assert 2 <= a.valid.num_documents <= 16  # a fifth, by hash
    for store, split, ids in (
        (a, a.train, a.train.ids),
        (a, a.valid, a.valid.ids),
        (b, b.train, [0, 1]),
        (b, b.valid, [2]),
    ):
        records = [RECORDS[i] for i in ids]
        chats = encoded(tokenizer, records, cutoff_len=512)
        for (tokens, targets), chat in zip(stored(split), chats, strict=True):
            np.testing.assert_array_equal(tokens, chat.tokens)
            np.testing.assert_array_equal(targets, chat.targets)
        assert split.num_bytes == sum(chat.target_bytes for chat in chats) == sum(len(r["output"]) for r in records)
        assert split.num_targets == sum(chat.targets.sum() for chat in chats)
        assert split.lengths.tolist() == [len(chat.tokens) for chat in chats]
        assert store.skipped_records == 0
    with pytest.raises(IndexError, match="example 2 of 2"):
        b.train.example(2)


def test_records_and_their_fields_are_found_again(root):
    (a, b), _ = opened(root)
    assert [r["instruction"] for r in a.records("train")] == [f"Question {i}?" for i in a.train.ids]
    assert a.values("valid", "meta.subject") == [f"s{i % 3}" for i in a.valid.ids]
    assert b.values("valid", "meta.subject") == ["s2"]
    with pytest.raises(InputError, match=r"domain 'b', valid example 0: no field 'meta.group'; the record has instr"):
        b.values("valid", "meta.group")


def test_examples_without_a_target_are_dropped_and_counted(root, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "dataflex_jax.data.stores.cache.logger.warning", lambda message, *values: warnings.append(message % values)
    )
    _, tokenizer = opened(root)
    prompt = min(int(np.flatnonzero(chat.targets)[0]) for chat in encoded(tokenizer, RECORDS))
    data = config(root)
    data.cutoff_len = prompt + 1  # of the prompts "Question i?" the ten with one digit leave room for one target
    (a, _), _ = open_example_stores(data, progress=False)
    assert sorted([*a.train.ids, *a.valid.ids]) == list(range(10))
    assert all(targets.sum() == 1 and len(tokens) == prompt + 1 for tokens, targets in stored(a.train))
    assert "domain a: left out: 30 examples without a target, or without one within data.cutoff_len" in warnings
    data.cutoff_len = prompt
    with pytest.raises(InputError, match=r"domain 'a' has no training documents; 40 examples have no target"):
        open_example_stores(data, progress=False)


def test_an_empty_response_teaches_nothing(root, monkeypatch):
    """Of a conversation it is passed over; an example with no other is dropped and counted."""
    warnings = []
    monkeypatch.setattr("dataflex_jax.data.stores.cache.logger.warning", lambda text, *a: warnings.append(text % a))
    records = [record(0, 3), record(1, 0), {"instruction": "?", "output": " \n"}]
    (root / "a.json").write_text(json.dumps(records))
    (a, _), _ = opened(root, data__valid_fraction=0.0)
    assert a.train.ids.tolist() == [0]
    assert "domain a: left out: 2 examples without a target, or without one within data.cutoff_len" in warnings


def test_a_record_that_the_template_refuses_is_named_or_skipped(root):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    lines = [{"conversations": turns}, {"conversations": [*turns, {"from": "human", "value": "f"}, call]}]
    for path in root.iterdir():
        path.unlink()
    (root / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = config(root, data__valid_fraction=0.0)
    data.update(formatting="sharegpt", template="llama3")
    with pytest.raises(InputError, match=rf"{root}/c.jsonl:2: the chat template refuses it: the built-in template"):
        open_example_stores(data, progress=False)
    data.on_bad_record = "skip"
    (c,), _ = open_example_stores(data, progress=False)
    assert (c.train.num_documents, c.skipped_records) == (1, 1)


def test_bad_records_name_file_and_record(root):
    (root / "a.json").write_text(json.dumps([*RECORDS, {"instruction": "q", "answer": "a"}]))
    place = rf"{root}/a.json: record 40: no field 'output' \(column 'response'\); the record has instruction, answer"
    with pytest.raises(InputError, match=place):
        opened(root)
    (root / "a.json").write_text(json.dumps(RECORDS)[:-20])
    with pytest.raises(InputError, match=rf"{root}/a.json: record 39 \(line 1\): not valid JSON, or truncated"):
        opened(root)


def test_a_store_is_built_once_and_options_make_another(root, monkeypatch):
    (a, _), _ = opened(root)
    keys = {a.key}
    for fields in ({"data__mask_history": True}, {"data__train_on_prompt": True}, {"data__valid_fraction": 0.4}):
        keys.add(opened(root, **fields)[0][0].key)
    assert len(keys) == 4
    monkeypatch.setattr(
        "dataflex_jax.data.sources.parts.read_records", lambda *_: pytest.fail("an input file was read")
    )
    again, _ = opened(root)
    assert again[0] == a
    assert pickle.loads(pickle.dumps(a.train)) == a.train


def test_stopped_after_every_commit_the_store_is_the_same(root, tmp_path, monkeypatch):
    (whole, _), _ = opened(root)
    monkeypatch.setattr(build, "_BATCH_RECORDS", 7)
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)
    commit, commits = DomainWriter.commit, []

    def cut_off(writer, *arguments):
        commits.append(writer.name)
        commit(writer, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(DomainWriter, "commit", cut_off)
    while True:
        try:
            (a, _), _ = opened(root, data__cache_dir=str(tmp_path / "again"))
            break
        except KeyboardInterrupt:
            if len(commits) > 20:
                monkeypatch.setattr(DomainWriter, "commit", commit)
    assert commits.count("a") > 5
    for (tokens, targets), (same, same_targets) in zip(stored(a.train), stored(whole.train), strict=True):
        np.testing.assert_array_equal(tokens, same)
        np.testing.assert_array_equal(targets, same_targets)
    np.testing.assert_array_equal(a.train.ids, whole.train.ids)


def test_buckets():
    data = base.get_config().data
    assert buckets(data) == (256, 512, 1024, 2048)
    data.cutoff_len = 20
    assert buckets(data) == (8, 16, 24)
    data.buckets = (10, 20)
    assert buckets(data) == (10, 20)
    assert [bucket_of(n, (10, 20)) for n in (0, 1, 10, 11, 20)] == [10, 10, 10, 20, 20]
    with pytest.raises(ValueError, match="longer than the largest bucket, 20"):
        bucket_of(21, (10, 20))


@pytest.mark.parametrize("capacity", [16, 40])
def test_packing_places_every_sequence_once_and_wastes_little(capacity):
    lengths = np.random.default_rng(capacity).integers(1, 17, 500)
    order, starts = pack(lengths, capacity)
    assert sorted(order) == list(range(500))
    filled = np.add.reduceat(lengths[order], starts[:-1])
    assert filled.max() <= capacity
    assert np.sort(filled)[1] > capacity / 2
    assert len(filled) <= 1.05 * lengths.sum() / capacity + 1
    with pytest.raises(ValueError, match="more than a row of 15"):
        pack(np.array([16]), 15)
    order, starts = pack(np.array([], np.int64), 8)
    assert (len(order), starts.tolist()) == (0, [0])


MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.3,
    dtype="float32",
    remat="none",
)


def all_rows(rows):
    """Every row in one batch of 512 inputs."""
    return collated([rows.row(i) for i in range(rows.num_rows)], 512, [0] * rows.num_rows, packed=rows.packed)


def test_packed_examples_have_the_losses_that_they_have_alone(root):
    """Attention across examples would change them: without the segment ids they differ."""
    (a, _), _ = opened(root)
    rows = PackedRows(a.train, 512)
    model = Model.random(MODEL, jax.random.key(0))
    batch = all_rows(rows)
    packed = np.asarray(model.token_losses(batch).losses)
    members = [rows.members(i) for i in range(rows.num_rows)]
    assert max(map(len, members)) >= 4
    assert sorted(np.concatenate(members)) == list(range(a.train.num_documents))
    single = ExampleRows(a.train, (512,))
    alone_batch = all_rows(single)
    alone = np.asarray(model.token_losses(alone_batch).losses)
    apart = np.asarray(model.token_losses(dataclasses.replace(batch, segment_ids=None, positions=None)).losses)
    largest_difference = 0.0
    for r, row in enumerate(members):
        at = 0
        for i in row:
            n = single.length(i)
            np.testing.assert_allclose(packed[r, at : at + n], alone[i, :n], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(batch.mask[r, at : at + n], alone_batch.mask[i, :n])
            largest_difference = max(largest_difference, np.abs(apart[r, at : at + n] - alone[i, :n]).max())
            at += n + 1
            if at <= rows.length(r):
                assert batch.mask[r, at - 1] == 0  # the end of one example does not predict the next one's beginning
    assert largest_difference > 0.1
    assert batch.mask.sum() == a.train.num_targets


def test_no_token_of_a_packed_row_depends_on_another_example(root):
    """The gradient of one example's losses with respect to the others' embeddings is exactly zero."""
    (a, _), _ = opened(root)
    rows = PackedRows(a.train, 512)
    i = int(np.argmax([len(rows.members(i)) for i in range(rows.num_rows)]))
    batch = collated([rows.row(i)], 512, [0], packed=True)
    segments = batch.segment_ids[0]
    model = Model.random(MODEL, jax.random.key(1))
    table = model.params["embed_tokens"]["embedding"]
    # Every position gets an embedding of its own, so that gradients are by position.
    numbered = dataclasses.replace(batch, tokens=np.arange(513)[None])
    by_position = {**model.params, "embed_tokens": {"embedding": table[batch.tokens[0]]}}

    def loss(embedding, segment):
        own = {**by_position, "embed_tokens": {"embedding": embedding}}
        hidden = model.having(own).hidden_states(numbered)
        return jnp.sum(jnp.where(segments[None, :, None] == segment, hidden, 0) ** 2)

    gradient = jax.jit(jax.grad(loss))(by_position["embed_tokens"]["embedding"], 2)
    touched = np.abs(np.asarray(gradient[:-1])).max(axis=1) > 0
    np.testing.assert_array_equal(touched, segments == 2)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_padded_to_the_smallest_bucket_and_hold_the_planned_examples(root, packing):
    (a, b), _ = opened(root)
    domains = example_domains((a, b), (128, 256, 512), packing=packing)
    assert (domains[0].key == a.key) != packing
    pool = Pool(domains)
    loader, sequences = Loader(pool, make_mesh({"fsdp": 8})), Sequences(pool.groups(by_domain=True), 0)
    seen = {}
    for step in range(a.train.num_documents):
        positions = np.arange(8) % 2 if packing else np.full(8, step)
        plan = Plan(1, np.zeros(8, np.int64), positions, np.array([1.0, 0.0]))
        batch = jax.device_get(loader.load(sequences.ids(plan), plan.drawn_with))
        length = batch.mask.shape[1]
        assert length == bucket_of(int(batch.lengths.max()), domains[0].train.buckets)
        assert batch.tokens.shape == (8, length + 1)
        assert (batch.segment_ids is not None) == packing
        for tokens, mask, n in zip(batch.tokens, batch.mask, batch.lengths, strict=True):
            assert not mask[n:].any()
            assert not tokens[n + 1 :].any()
            seen[tuple(tokens[: n + 1].tolist())] = int(mask.sum())
        if packing:
            break
    if not packing:
        expected = {tuple(tokens.tolist()): int(targets.sum()) for tokens, targets in stored(a.train)}
        assert seen == expected
        assert {length for length in (128, 256, 512) if any(n <= length for n in a.train.lengths - 1)} == {
            128,
            256,
            512,
        }


def test_of_packed_rows_gpus_are_told_how_many_segments_there_are_at_most(root, monkeypatch):
    (a, b), _ = opened(root)
    pool, mesh = Pool(example_domains((a, b), (512,), packing=True)), make_mesh({"fsdp": 8})
    ids = np.arange(8) % pool.num_rows
    assert Loader(pool, mesh).load(ids).most_segments is None
    loader = Loader(pool, mesh)
    monkeypatch.setattr(loader, "_count_segments", True)  # as on a GPU
    batch = jax.device_get(loader.load(ids))
    segments = [len(set(row.tolist())) for row in batch.segment_ids]
    assert max(segments) <= batch.most_segments == segment_slots(max(pool.examples(i) for i in ids))
    assert [segment_slots(examples) for examples in (0, 1, 7, 8, 31, 32)] == [8, 8, 8, 16, 32, 64]


def test_held_out_examples_are_each_predicted_once(root):
    (a, b), _ = opened(root)
    domains = example_domains((a, b), (128, 256, 512), packing=True)
    batches = list(held_out_batches(domains, 8, 1000, make_mesh({"fsdp": 8})))
    targets = [sum(float(np.asarray(b.mask)[np.asarray(b.domain) == k].sum()) for b in batches) for k in (0, 1)]
    assert targets == [a.valid.num_targets, b.valid.num_targets]
    assert domains[0].valid.bytes_per_target == a.valid.num_bytes / a.valid.num_targets


def test_open_domains_knows_both_kinds_of_data(root, tmp_path):
    instruction, tokenizer = open_domains(config(root), progress=False)
    assert [type(domain.train).__name__ for domain in instruction] == ["ExampleRows"] * 2
    assert tokenizer.chat_template == template_text("qwen", tokenizer)
    documents, _ = open_domains(tiny.config(tiny.write_domains(tmp_path / "text")).data, progress=False)
    assert [type(domain.train).__name__ for domain in documents] == ["DocumentRows"] * 3
    with pytest.raises(InputError, match=r"less than one row of config.data.seq_len"):
        open_domains(tiny.config(tmp_path / "text", data__seq_len=100_000).data, progress=False)


def test_a_tokenizer_is_trained_on_what_is_said_not_on_the_json(root):
    _, tokenizer = opened(root, data__tokenizer="train:300")
    tokens = {tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    assert "word" in {token.strip() for token in tokens}
    assert not any("instruction" in token or "content" in token for token in tokens)
    assert {"<|im_start|>", "<|im_end|>"} <= tokens
