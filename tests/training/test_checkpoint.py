"""Checkpoints by themselves: complete or not there, read as they were saved, and clear words where they are damaged."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.json_lines import Written
from dataflex_jax.training import checksums
from dataflex_jax.training.checkpoint import Checkpoints, Contents
from dataflex_jax.training.locate import locate
from dataflex_jax.training.state import TrainState
from tests.helpers.command import contents, copy_of, saved_steps

# TensorStore's reads that were under way when another one failed say so when they are done.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step: int, devices: int = 8) -> TrainState:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    weights = jax.random.normal(jax.random.key(step), (16, 512))
    return TrainState(
        step=jnp.int32(step),
        params={"split": jax.device_put(weights, NamedSharding(mesh, P("fsdp"))), "half": jnp.ones(3, jnp.bfloat16)},
        opt_state=(jnp.float32(0.1), ()),
        mixer=jnp.array([0.1, 0.9]),
        weighters=(),
        key=jax.random.key(7),
    )


def abstract(devices: int = 8) -> TrainState:
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, state(0, devices))


def save(folder, *steps, keep=None) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, Contents(state(step), {"step": step, "third": 1 / 3, "pending": [[5, {"a": 0.1}]]}))


def save_and_wait(checkpoints: Checkpoints, step: int, run: dict) -> None:
    checkpoints.save(step, Contents(state(step), run))
    checkpoints.wait()


def read(checkpoints: Checkpoints, step: int):
    return checkpoints.read_run(step), checkpoints.read_state(step, abstract())


def assert_equal(restored: TrainState, expected: TrainState) -> None:
    data = jax.random.key_data
    for ours, other in zip(*map(jax.tree.leaves, (restored._replace(key=0), expected._replace(key=0))), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float64), np.asarray(other, np.float64))
    np.testing.assert_array_equal(data(restored.key), data(expected.key))


@pytest.mark.parametrize("devices", [8, 2])
def test_read_as_saved_on_any_number_of_devices(tmp_path, devices):
    save(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, writable=False)
    restored = checkpoints.read_state(3, abstract(devices))
    assert_equal(restored, state(3))
    assert restored.params["split"].sharding == state(0, devices).params["split"].sharding
    assert restored.params["half"].dtype == jnp.bfloat16
    assert checkpoints.read_run(3) == {"step": 3, "third": 1 / 3, "pending": [[5, {"a": 0.1}]]}
    params = Checkpoints(tmp_path, writable=False).read_parts(3, params=abstract(devices).params)["params"]
    assert_equal(state(3)._replace(params=params), state(3))


def test_what_has_read_parts_may_save(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        params = checkpoints.read_parts(1, params=abstract().params)["params"]
        checkpoints.save(2, Contents(state(2)._replace(params=params), {}))
    assert saved_steps(tmp_path) == [1, 2]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        given = state(1)
        checkpoints.save(1, Contents(given, {}))
        jax.tree.map(lambda leaf: leaf.delete(), given)
        assert checkpoints.latest() in (None, 1)
    assert_equal(Checkpoints(tmp_path, writable=False).read_state(1, abstract()), state(1))


def test_the_newest_are_kept(tmp_path):
    save(tmp_path / "two", 1, 2, 3, keep=2)
    assert saved_steps(tmp_path / "two") == [2, 3]
    save(tmp_path / "all", 1, 2, 3)
    assert saved_steps(tmp_path / "all") == [1, 2, 3]


def test_a_half_written_one_is_no_checkpoint_and_is_left_to_its_writer(tmp_path):
    """`evaluate --checkpoint=RUN` may look into the folder of a run in progress."""
    save(tmp_path, 1)
    half_written = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "_CHECKPOINT_METADATA").write_text("{}")
    before = contents(tmp_path)
    assert locate(tmp_path) == (tmp_path, 1)
    assert Checkpoints(tmp_path, writable=False).latest() == 1
    assert contents(tmp_path) == before
    save(tmp_path, 2)
    assert saved_steps(tmp_path) == [1, 2]
    assert not half_written.exists()


def test_reading_makes_no_folder(tmp_path):
    with pytest.raises(InputError, match="neither a run folder"):
        locate(tmp_path)
    assert list(tmp_path.iterdir()) == []


def damaged(path, how: str, place: float = 0.5) -> None:
    """Damages a file: torn, gone, emptied, or one bit of it flipped."""
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        data[int(place * len(data))] ^= 1 << int(place * 8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if how == "torn" else b"")


FILES = [
    "state/manifest.ocdbt",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/*",
    "state/d/*",
    "state/ocdbt.process_0/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
    "run/metadata",
    "run/commit_success.txt",
    checksums.FILE,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 4, 8)
    return folder


@pytest.mark.parametrize("how", ["flipped", "torn", "gone", "emptied"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_with_the_way_out(tmp_path, saved, name, how, caplog):
    if name == checksums.FILE and how == "gone":
        pytest.skip("that is a checkpoint of an older version")
    folder = copy_of(saved, tmp_path / "run")
    files = list((folder / "checkpoints" / "8").glob(name))
    assert files
    for number, file in enumerate(files):
        damaged(file, how, (number + 0.5) / len(files))
    checkpoints = Checkpoints(folder, writable=False)
    way_out = rf"^{folder}/checkpoints/8: cannot be read \(.+\); .* delete .* to go back to step 4$"
    for call in (lambda: checkpoints.read_run(8), lambda: checkpoints.read_state(8, abstract())):
        with pytest.raises(InputError, match=way_out) as raised:
            call()
        assert any(str(file.relative_to(folder / "checkpoints" / "8")) in str(raised.value) for file in files)
    assert_equal(checkpoints.read_state(4, abstract()), state(4))

    with Checkpoints(folder) as going_on, caplog.at_level("WARNING", "dataflex_jax"):
        assert going_on.newest_sound() == going_on.latest() == 4
        going_on.save(8, Contents(state(8), {}))
    assert f"{folder}/checkpoints/8: damaged ({name.partition('*')[0]}" in caplog.text
    assert "going on from step 4" in caplog.text
    assert_equal(Checkpoints(folder, writable=False).read_state(8, abstract()), state(8))
    assert len(list((folder / "checkpoints").glob("8.damaged-*"))) == 1


@pytest.mark.parametrize("place", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", checksums.FILE])
def test_a_flipped_bit_anywhere_else_changes_no_number(tmp_path, saved, name, place):
    folder = copy_of(saved, tmp_path / "run")
    damaged(folder / "checkpoints" / "8" / name, "flipped", place)
    try:
        run, restored = read(Checkpoints(folder, writable=False), 8)
    except InputError:
        return
    assert run == {"step": 8, "third": 1 / 3, "pending": [[5, {"a": 0.1}]]}
    assert_equal(restored, state(8))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("state/manifest.ocdbt", "torn"),
        ("state/manifest.ocdbt", "gone"),
        ("state/_METADATA", "torn"),
        ("state/d/*", "torn"),
        ("state/ocdbt.process_0/d/*", "torn"),
        ("state/ocdbt.process_0/d/*", "gone"),
        ("run/metadata", "torn"),
        ("run/metadata", "gone"),
    ],
)
def test_one_of_an_older_version_has_no_checksums_and_what_cannot_be_read_is_still_said(tmp_path, saved, name, how):
    folder = copy_of(saved, tmp_path / "run")
    for step in (4, 8):
        (folder / "checkpoints" / str(step) / checksums.FILE).unlink()
    for file in (folder / "checkpoints" / "8").glob(name):
        damaged(file, how)
    checkpoints = Checkpoints(folder, writable=False)
    with pytest.raises(InputError, match=r"/8: cannot be read \(.+\); .* delete .* to go back to step 4$"):
        read(checkpoints, 8)
    gc.collect(1)  # so that the reads left behind complain here; all that a long session keeps need not be searched
    assert_equal(checkpoints.read_state(4, abstract()), state(4))
    assert checkpoints.lines(4) == {}
    assert checkpoints.newest_sound() == 4


def test_the_last_one_of_all_cannot_be_gone_back_from(tmp_path, saved):
    folder = copy_of(saved, tmp_path / "run")
    for step in ("4", "8"):
        damaged(folder / "checkpoints" / step / "run" / "metadata", "flipped")
    before = contents(folder)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(InputError, match=r"checkpoints/8: cannot be read \(run/metadata: not what was written\)"):
            checkpoints.newest_sound()
        with pytest.raises(InputError, match=r"delete .* to start from the beginning"):
            checkpoints.read_run(4)
    assert contents(folder).items() >= before.items()


def test_nobody_is_told_to_delete_a_sound_one(tmp_path, saved):
    other = abstract()._replace(mixer=jax.ShapeDtypeStruct((5, 5), jnp.float32, sharding=abstract().mixer.sharding))
    with pytest.raises(InputError, match=r"checkpoints/8: its state is sound, but cannot be read \(.*\)$") as raised:
        Checkpoints(saved, writable=False).read_state(8, other)
    assert "delete" not in str(raised.value)


def test_how_far_the_lines_had_come_is_kept_with_a_checkpoint(tmp_path):
    lines = {"metrics.jsonl": Written(120, 3, 7)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, Contents(state(1), {}, lines=lines))
        checkpoints.save(2, Contents(state(2), {}))
        checkpoints.wait()
        assert checkpoints.lines(1) == lines
        assert checkpoints.lines(2) == {}


def test_a_save_that_fails_names_the_last_good_one_and_the_next_may_succeed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, Contents(state(1), {}))
        with pytest.raises(TrainingError, match=rf"failed \(.*\); last good checkpoint: {tmp_path}/checkpoints/1$"):
            save_and_wait(checkpoints, 2, {"not JSON": object()})
        checkpoints.save(3, Contents(state(3), {}))
    assert saved_steps(tmp_path) == [1, 3]
    assert_equal(Checkpoints(tmp_path, writable=False).read_state(3, abstract()), state(3))


def test_the_save_under_way_counts_as_the_last_good_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_good() == "no checkpoint is complete yet"
        checkpoints.save(1, Contents(state(1), {}))
        assert checkpoints.last_good() == f"last good checkpoint: {tmp_path}/checkpoints/1"


def test_a_run_that_fails_completes_the_save_under_way(tmp_path):
    def fails():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, Contents(state(1), {}))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert saved_steps(tmp_path) == [1]


def test_a_run_that_is_refused_leaves_no_folder_but_what_was_there(tmp_path):
    def failing(folder, *files):
        with Checkpoints(folder):
            for name in files:
                (folder / name).write_text("{}")
            raise InputError("no data")

    def refused(*arguments):
        with pytest.raises(InputError, match="no data"):
            failing(*arguments)

    refused(tmp_path / "runs" / "new")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    refused(tmp_path / "mine")
    refused(tmp_path / "mine" / "runs" / "new")
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "mine" / "runs").exists()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(tmp_path / "runs" / "new", "config.json")
    assert (tmp_path / "runs" / "new" / "config.json").exists()


def test_only_a_folder_of_checkpoints_is_written_to(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(InputError, match="checkpoints: not a folder of checkpoints"):
        Checkpoints(tmp_path)
    assert (tmp_path / "checkpoints").read_text() == "mine"
    with pytest.raises(InputError, match=r"--workdir=.*: cannot be made as a folder \(Not a directory\)"):
        Checkpoints(tmp_path / "checkpoints" / "run")


def test_hidden_files_of_the_file_system_are_none_of_its_business(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".nfs0001").write_text("")
    save(tmp_path, 1)
    assert json.loads((tmp_path / "checkpoints/1/run/metadata").read_text())["step"] == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Checkpoints(tmp_path), pytest.raises(InputError, match="another run is using it"):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path), Checkpoints(tmp_path, writable=False):
        pass


def test_one_under_the_name_of_another_step_is_damaged(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            save_and_wait(checkpoints, step, {"sampler": {"step": step}})
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "9")
    with pytest.raises(InputError, match=r"9: cannot be read \(its folder was renamed, it is of step 4\)"):
        Checkpoints(tmp_path, writable=False).read_run(9)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_sound() == 2
    assert "its folder was renamed, it is of step 4); going on from step 2" in caplog.text
    assert saved_steps(tmp_path) == [2]
