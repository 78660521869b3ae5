"""Checkpoints in and out: golden files of transformers, live where torch is installed, round trips, bad files."""

import functools
import json
import re
import resource
import shutil
import tracemalloc

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.models import decoder
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf import folders
from dataflex_jax.models.hf import weights as hf
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.models.layout import param_shardings, placed
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from tests.models.make_golden import CHECKPOINT, GOLDEN, MODELS, random_params, random_tokens

OPTION = "config.model.name_or_path"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer("bytes", texts=iter, cache_dir=folder).save(folder)
    return folder


@pytest.fixture
def save(tokenizer, tmp_path):
    """Writes tmp_path/NAME with random weights on a mesh; returns the folder, the configuration and the weights."""

    def saved(name, folder="checkpoint", mesh=None, **options):
        cfg = from_hf(MODELS[name], dtype="float32")
        params = random_params(cfg, seed=3)
        mesh = make_mesh(mesh or {"fsdp": 4, "tensor": 2})
        on_mesh = jax.device_put(params, param_shardings(mesh, params))
        hf.save_pretrained(tmp_path / folder, cfg, on_mesh, tokenizer, **options)
        return tmp_path / folder, cfg, params

    return saved


def abstract(cfg, mesh=None):
    _, shapes = jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))
    return placed(make_mesh(mesh or {"data": 2, "fsdp": 4}), shapes)


def assert_equal_params(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers(name):
    params = random_params(from_hf(MODELS[name]), seed=0)
    golden = json.loads((GOLDEN / "hf_tensors.json").read_text())[name]
    assert {tensor.name: list(tensor.shape) for tensor in hf.hf_tensors(params)} == golden
    assert {tensor.name: list(tensor.value().shape) for tensor in hf.hf_tensors(params)} == golden


def test_a_checkpoint_of_transformers_gives_its_logits():
    golden = np.load(GOLDEN / f"{CHECKPOINT}.npz")
    cfg = from_hf(folders.read_config(GOLDEN / CHECKPOINT), dtype="float32")
    params = hf.load_params(str(GOLDEN / CHECKPOINT), abstract(cfg))
    assert_equal_params(params, random_params(cfg, int(golden["seed"])))
    hidden, _ = decoder.hidden_states(Model.shape(cfg).graphdef, params, golden["tokens"].astype(np.int32)[:, :-1])
    logits = hidden @ decoder.output_weight(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [hf.MAX_SHARD_BYTES, 3000])
def test_import_of_export_is_bit_exact(save, name, max_shard_bytes):
    folder, cfg, params = save(name, max_shard_bytes=max_shard_bytes)
    assert from_hf(folders.read_config(folder), dtype="float32") == cfg
    wanted = abstract(cfg)
    loaded = hf.load_params(str(folder), wanted)
    assert_equal_params(loaded, params)
    for leaf, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_shards_hold_at_most_what_was_asked_for_and_are_indexed(save):
    whole = load_file(save("qwen2_untied")[0] / "model.safetensors")
    folder = save("qwen2_untied", "sharded", max_shard_bytes=3000)[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(folder / file)[name], whole[name])
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(folder / file).values()) <= 3000
        with safe_open(folder / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_dtypes_are_cast_once(save):
    folder, cfg, params = save("qwen3", dtype="bfloat16")
    assert folders.read_config(folder)["torch_dtype"] == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    loaded = hf.load_params(str(folder), abstract(cfg))
    assert_equal_params(loaded, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    half = hf.load_params(str(folder), abstract(from_hf(MODELS["qwen3"], param_dtype="bfloat16")))
    assert_equal_params(half, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    with pytest.raises(InputError, match=r"param_dtype='int8' is not supported; accepted: 'bfloat16', 'float32'"):
        save("qwen3", "other", dtype="int8")


def test_the_ends_of_texts_are_the_tokenizers(save, tokenizer):
    folder = save("llama3")[0]
    config = folders.read_config(folder)
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 256)  # Llama's defaults are 1 and 2
    for file in tokenizer.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_each_device_reads_its_part_once(save, monkeypatch):
    """Of split tensors every element is read once over all devices; of replicated ones too."""
    read = {}

    class Counting:
        def __init__(self, file, framework):
            self.opened = safe_open(file, framework)

        def __enter__(self):
            self.opened.__enter__()
            return self

        def __exit__(self, *error):
            self.opened.__exit__(*error)

        def keys(self):
            return self.opened.keys()

        def get_slice(self, name):
            return Slice(name, self.opened.get_slice(name))

    class Slice:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

        def __getitem__(self, index):
            part = self.tensor[index]
            read.setdefault(self.name, []).append(part.size)
            return part

    folder, cfg, _ = save("qwen2_untied")
    monkeypatch.setattr(hf, "safe_open", Counting)
    hf.load_params(str(folder), abstract(cfg, {"data": 2, "fsdp": 2, "tensor": 2}))
    sizes = {tensor.name: tensor.size for tensor in hf.hf_tensors(abstract(cfg))}
    assert {name: sum(parts) for name, parts in read.items()} == sizes
    assert read["model.layers.1.mlp.up_proj.weight"] == [sizes["model.layers.1.mlp.up_proj.weight"] // 4] * 4
    assert read["model.norm.weight"] == [16]


def test_the_host_holds_one_tensor_at_a_time(tmp_path, tokenizer):
    """tracemalloc sees what NumPy and safetensors allocate, not what is on the (here virtual) devices."""
    cfg = ModelConfig(
        architecture="qwen2",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
    )
    wanted = abstract(cfg, {"fsdp": -1})
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, device=leaf.sharding), wanted)
    largest = 512 * 256 * 4
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 50 * largest
    hf.save_pretrained(tmp_path / "first", cfg, params, tokenizer)  # compiles

    assert peak(lambda: hf.save_pretrained(tmp_path / "second", cfg, params, tokenizer)) < 2.5 * largest
    hf.load_params(str(tmp_path / "second"), wanted)
    assert peak(lambda: hf.load_params(str(tmp_path / "second"), wanted)) < 2.5 * largest


def peak(call):
    """The most bytes that `call` had allocated at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_computed_or_tied_may_be_in_the_files_too(save):
    folder, cfg, params = save("qwen2_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert_equal_params(hf.load_params(str(folder), abstract(cfg)), params)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"'lm_head.weight' differs from the embedding, to which config.json ties it"):
        hf.load_params(str(folder), abstract(cfg))


def _edit(change):
    """A damage: a change to the tensors of a single file."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "missing tensor": (_edit(lambda t: t.pop(Q)), rf"/model\.safetensors: has no tensor '{Q}'"),
    "shape": (
        _edit(lambda t: t.update({Q: t[Q][:-1]})),
        rf"/model\.safetensors: tensor '{Q}' has shape \[15, 16\]; the configured model needs \[16, 16\]",
    ),
    "dtype": (
        _edit(lambda t: t.update({UP: t[UP].astype(np.int8)})),
        rf"/model\.safetensors: tensor '{UP}' has dtype I8; accepted: F32, BF16, F16",
    ),
    "extra tensor": (
        _edit(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].copy()})),
        r"/model\.safetensors: tensor 'model\.layers\.2\.mlp\.up_proj\.weight' is no part of the configured model",
    ),
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4]),
        r"/model\.safetensors: cut short or damaged",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"/checkpoint: has neither model\.safetensors nor .*index\.json; pytorch_model\.bin: only safetensors are read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_file_is_refused_by_its_name_and_the_tensors(save, kind):
    folder, cfg, _ = save("qwen2_untied")
    damage, message = DAMAGES[kind]
    damage(folder)
    with pytest.raises(InputError, match=message) as e:
        hf.load_params(str(folder), abstract(cfg))
    assert "\n" not in str(e.value)


def rename(index, file, other):
    """Has the index name another file."""
    index.write_text(index.read_text().replace(f'"{file}"', f'"{other}"'))


def claim(file, rows):
    """Has the header say that the one tensor has as many rows, and as many bytes as that takes."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[UP].update(shape=[rows, 16], data_offsets=[0, rows * 16 * 4])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard, _: shard.unlink(), rf"{{shard}}: no such file; .*index\.json places tensor '{UP}' there"),
        (
            lambda shard, _: shard.write_bytes(shard.read_bytes()[:-1]),
            rf"{{shard}}: cut short or damaged .*; .*index\.json places tensor '{UP}' there",
        ),
        (lambda shard, _: shard.write_bytes(b"version https://git-lfs"), r"{shard}: cut short or damaged"),
        (
            lambda shard, _: shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            r"{shard}: a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        (lambda shard, _: claim(shard, 1 << 40), r"{shard}: cut short or damaged"),
        (lambda shard, _: claim(shard, 1 << 20), r"{shard}: cut short or damaged"),
        (lambda shard, _: (shard.unlink(), shard.mkdir()), rf"{{shard}}: no such file; .* places tensor '{UP}' there"),
        (
            lambda shard, index: rename(index, shard.name, "../other.safetensors"),
            rf"index\.json: places tensor '{UP}' in '\.\./other\.safetensors'; the name of a file in its folder is acc",
        ),
        (
            lambda shard, index: rename(index, shard.name, "pytorch_model.bin"),
            rf"index\.json: places tensor '{UP}' in 'pytorch_model\.bin'; only safetensors are read; convert it",
        ),
        (
            lambda shard, index: rename(index, shard.name, "/etc/passwd"),
            rf"index\.json: places tensor '{UP}' in '/etc/passwd'; the name of a file in its folder is accepted",
        ),
        (
            lambda _, index: index.write_text(json.dumps({"weight_map": {UP: 3}})),
            rf"index\.json: places tensor '{UP}' in 3; the name of a file",
        ),
        (lambda shard, _: save_file({}, shard), rf"{{shard}}: has no tensor '{UP}', which .*index\.json places there"),
        (lambda _, index: index.write_text("{"), r"index\.json: not valid JSON"),
        (lambda _, index: index.write_text("{}"), r"index\.json: has no weight_map"),
        (
            lambda _, index: index.write_text(index.read_text().replace(f'"{UP}"', '"model.other.weight"')),
            r"{shard}: has no tensor 'model.other.weight', which .*index\.json places there",
        ),
    ],
)
def test_a_bad_shard_is_refused_by_its_name_and_the_tensors(save, damage, message):
    folder, cfg, _ = save("qwen2_untied", max_shard_bytes=1500)
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"][UP]
    assert list(load_file(shard)) == [UP]
    damage(shard, index)
    with pytest.raises(InputError, match=message.format(shard=re.escape(str(shard)))) as e:
        hf.load_params(str(folder), abstract(cfg))
    assert "\n" not in str(e.value)


def test_an_export_never_mixes_with_other_files(save, tmp_path, tokenizer):
    folder, cfg, params = save("qwen3")
    with pytest.raises(InputError, match=r"/checkpoint: holds '.*' already; choose a new or an empty folder"):
        hf.save_pretrained(folder, cfg, params, tokenizer)
    with pytest.raises(InputError, match=r"/nothing/tokenizer\.json: no such file"):
        hf.save_pretrained(tmp_path / "new", cfg, params, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"cannot be made as a folder"):
        hf.save_pretrained(folder / "config.json" / "new", cfg, params, tokenizer)


def test_a_full_disk_is_said_in_one_line(save, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"/checkpoint: cannot be written \(File too large\)") as e:
            save("qwen3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "checkpoint" / "config.json").exists()


def test_a_hub_id_is_read_from_the_cache(save, tmp_path, monkeypatch):
    folder, cfg, params = save("qwen3")
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_equal_params(hf.load_params("someone/tiny", abstract(cfg)), params)
    for name in ("someone/other", "/no/such/folder", "a//b"):
        with pytest.raises(
            InputError, match=f"{OPTION} = '{name}': no such folder, and not to be had from the hub"
        ) as e:
            hf.load_params(name, abstract(cfg))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_an_export_and_the_logits_agree(save, tmp_path, name):
    """Left-padded rows, longer than a kilobyte of tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, cfg, params = save(name, max_shard_bytes=4000)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = random_tokens(cfg, seed=9, length=1199)
    mask = np.arange(1200) >= np.array([[150], [0]])
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()

    graphdef, positions = Model.shape(cfg).graphdef, np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = decoder.hidden_states(graphdef, params, tokens, positions=positions, segment_ids=mask.astype(np.int32))
    logits = hidden @ decoder.output_weight(params)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-4)

    model.save_pretrained(tmp_path / "theirs")
    assert from_hf(folders.read_config(tmp_path / "theirs"), dtype="float32") == cfg
    assert_equal_params(hf.load_params(str(tmp_path / "theirs"), abstract(cfg)), params)
    assert model.config.eos_token_id == 256
