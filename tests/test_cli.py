"""Bad input by the real command: exit code 2, one line that names the culprit, and the run folder as it was."""

import gzip
import re
import shutil
import sys
import warnings

import pytest

from dataflex_jax import __main__ as console
from dataflex_jax import __version__, cli
from tests.helpers import tiny
from tests.helpers.command import PROJECT, Starter, Trainer, contents, in_forks, the_error


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def run_folder(trainer, starter):
    """A finished run of 2 steps; no test may change it."""
    starter.done("--config.train_step=2", workdir=trainer.folder / "run")
    return trainer.folder / "run"


@pytest.fixture(scope="module")
def starter(trainer):
    starter = Starter(trainer)
    yield starter
    starter.close()


def _refused(run, run_folder):
    """A function that runs the command, which must refuse and leave the run folder alone; returns its one line."""

    def refused(*arguments, **options):
        before = contents(run_folder)
        result = run(*arguments, **{"workdir": run_folder, **options})
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        assert contents(run_folder) == before
        return the_error(result).removeprefix("error: ")

    return refused


@pytest.fixture
def refused(trainer, run_folder):
    return _refused(trainer.run, run_folder)


@pytest.fixture
def refused_fast(starter, run_folder):
    return _refused(starter.run, run_folder)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.bogus=3", "--config.bogus: no such field; accepted here: checkpoint_every, data, "),
        ("--config.bogus.x=3", "--config.bogus.x: no such field; accepted here: checkpoint_every, data, "),
        ("--config.data.sequence_len=3", "--config.data.sequence_len: no such field; accepted here: batch_size, "),
        ("--config.seed.x=3", "--config.seed.x: no such field; accepted here: none"),
        ("--config.data=3", "--config.data=3: not one field; give it whole, or its fields one by one"),
        ("--config.mixer.scale=3", "--config.mixer.scale: no such field; accepted here: alpha, initial_proportions, "),
        ("--config.mixer=static", "--config.mixer=static: .* --config=configs/base.py:mixer=static"),
        ("--config.mixer.name=static", "--config.mixer.name=static: .* --config=configs/base.py:mixer=static"),
        ("--config.mixer.alpha=1.5", r"config.mixer.alpha = 1.5: must be in \[0, 1\)"),
        ("--config.mixer.variant=exp4", "config.mixer.variant = 'exp4': must be one of official, paper, "),
        ("--config.train_step=many", "flag --config.train_step=many: invalid literal for int"),
        ("--config.update_step=0", "config.update_step = 0: must be an integer >= 1"),
        ("--config.mixer.update_step=0", "config.mixer.update_step = 0: must be >= 1"),
        ("--config.data=None", "--config.data: cannot be None"),
        ("--config.data.seq_len=None", "config.data.seq_len = None: must be an integer >= 2 and <= 16777216"),
        ("--config.data.domains=('a'", r"flag --config.data.domains=\('a': not a tuple, such as a,b or \('a', 'b'\)"),
        ("--config.data.root=$NOPE/x", r"config.data.root: \$NOPE/x: \$NOPE stands for nothing here; give the path"),
        ("--config.mixer.reward_scale=1e39", r"config.mixer.reward_scale = 1e\+39: must be a finite 32-bit number or"),
        (
            "--config.update_step=10000000000",
            r"config.update_step = 10000000000: must be an integer >= 1 and < 2\*\*31",
        ),
        (f"--config.seed={2**63}", f"config.seed = {2**63}: must be an integer >= 0 and < "),
        ("--config.plugins=('..',)", r"config.plugins = \('..',\): must be a tuple of distinct names of modules"),
        (
            "--config.data.proportions=(1.0,2.0)",
            r"config.data.proportions = \(1.0, 2.0\): has 2 entries; one for each of the 3 domains",
        ),
        ("--config.data.proportions=(1.0,2.0,-1.0)", r"config.data.proportions = \(1.0, 2.0, -1.0\): every entry must"),
        ("--config.data.proportions=(0.0,0.0,0.0)", r"config.data.proportions = \(0.0, 0.0, 0.0\): at least one entry"),
        (
            "--config.data.domains=('digits','nope')",
            "config.data.domains: 'nope' is not in .*; available: code, digits, ",
        ),
        (
            "--config.data.root=/no/such/folder",
            "config.data.root = '/no/such/folder': no such file or folder",
        ),
        ("--config.data.cache_dir=/proc/cache", "config.data.cache_dir: /proc/cache is not a writable folder"),
        ("--config.data.tokenizer=/no/such", "config.data.tokenizer = '/no/such': no such file or folder"),
        (
            "--config.data.text_field=body",
            r"\S*/code.jsonl:1: no field 'body' \(option text_field\); the record has text",
        ),
        ("--config.data.seq_len=100000", "domain 'code' has .* training tokens, less than one row"),
        ("--config.model.vocab_size=100", "the tokenizer has 257 tokens, but the model's vocab_size is 100"),
        ("--config.data.grad_accumulation=3", "config.data.batch_size = 8: must be a multiple of .*accumulation = 3"),
        (
            "--config.mesh.data=3",
            "mesh.data=3, mesh.fsdp=-1, mesh.expert=1, mesh.tensor=1: the product must be the number of devices",
        ),
        ("--coordinator=localhost:1", "--coordinator, --num_processes and --process_id: give all three or none"),
        ("--confg=3", "Unknown command line flag 'confg'"),
        ("digits", "unexpected argument 'digits'; options are written --name=value"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(refused_fast, argument, expected):
    assert re.match(expected, refused_fast(argument))


def test_rows_that_the_devices_cannot_share_equally(trainer, refused_fast):
    expected = r"config.data.batch_size .* = 5 / 1: must be a multiple of mesh.data x mesh.fsdp = 2 devices"
    assert re.match(expected, refused_fast("--config.data.batch_size=5", **trainer.environment(2, {})))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("mixer=nope", "unknown mixer 'nope'; known: ado, doge, "),
        ("mixr=odm", "--config=configs/base.py:mixr=odm: 'mixr=odm' is not mixer=NAME, selector=NAME, order=NAME"),
        ("plugins=no.such", "config.plugins: cannot import 'no.such': No module named 'no'"),
        ("plugins=..", "config.plugins = '..': a module's name is accepted, such as my_package.my_mixer"),
    ],
)
def test_a_variant_that_does_not_exist(refused_fast, variant, expected):
    assert re.match(expected, refused_fast(config=f"configs/base.py:{variant}"))


def test_the_field_of_a_policy_that_is_off(refused_fast):
    error = refused_fast("--config.mixer.alpha=0.5", config="configs/base.py")
    assert error.startswith(
        "--config.mixer.alpha: mixer is None; choose it by variant, --config=configs/base.py:mixer="
    )


GOOD = b'{"text": "0123456789 0123456789 0123456789 0123456789"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("code.jsonl", b"", "{root}/code.jsonl: the file is empty"),
        ("code.jsonl", b"\n \n", "domain 'code' has no training documents"),
        ("code.jsonl", GOOD + b'{"text": "torn\n', "{root}/code.jsonl:2: not valid JSON"),
        ("code.jsonl", GOOD + GOOD + b"[1]\n", "{root}/code.jsonl:3: not a JSON object but list"),
        ("code.jsonl", GOOD + b'{"body": "x"}\n', "{root}/code.jsonl:2: no field 'text' .*; the record has body"),
        ("code.jsonl", GOOD + b'{"text": 3}\n', "{root}/code.jsonl:2: field 'text' .* must be a string but is int"),
        (
            "more.jsonl.gz",
            gzip.compress(100 * GOOD, mtime=0)[:60],
            "{root}/more.jsonl.gz: cannot be read, or is trunc",
        ),
        ("more.parquet", b"PAR1", "{root}/more.parquet: cannot be read, or is truncated or corrupt"),
        ("more.txt", b"\xff\xfe", "{root}/more.txt: not valid UTF-8"),
    ],
    ids=("empty", "blank", "torn", "no object", "no text", "no string", "torn gzip", "torn parquet", "no UTF-8"),
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(refused_fast, tmp_path, name, content, expected):
    root = tiny.write_domains(tmp_path / "domains")
    (root / name).write_bytes(content)
    assert re.match(expected.format(root=root), refused_fast(f"--config.data.root={root}"))


def test_bad_records_are_skipped_and_counted_on_request(starter, tmp_path):
    root = tiny.write_domains(tmp_path / "domains")
    with (root / "code.jsonl").open("a") as file:
        file.write('{"text": "torn\n{"body": "x"}\n')
    options = (f"--config.data.root={root}", "--config.data.on_bad_record=skip", "--config.train_step=1")
    result = starter.run(*options, workdir=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "domain code: left out: 2 bad records" in result.stderr


def test_a_checkpoint_that_is_not_one(refused_fast, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert refused_fast(workdir=tmp_path).startswith(f"{folder}: not a folder of checkpoints (it holds 'notes.txt')")
    (folder / "notes.txt").unlink()
    (folder / "7").mkdir()
    assert refused_fast(workdir=tmp_path).startswith(f"{folder / '7'}: cannot be read")
    assert (folder / "7").is_dir()


def test_a_damaged_checkpoint(run_folder, refused_fast, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    for data in (tmp_path / "run/checkpoints/2/state/ocdbt.process_0/d").iterdir():
        data.write_bytes(data.read_bytes()[:1000])
    error = refused_fast("--config.train_step=4", workdir=tmp_path / "run")
    assert error.startswith(f"{tmp_path / 'run/checkpoints/2'}: cannot be read (")
    assert re.search(r"\); .*delete .* to start from the beginning$", error)


def test_a_run_folder_that_cannot_be(refused_fast, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
        ("/proc/run", "No such file or directory"),
    ):
        assert (
            refused_fast(workdir=workdir)
            == f"--workdir={workdir}: cannot be made as a folder ({reason}); choose another"
        )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_recipe_that_does_not_exist(refused_fast):
    # The package has a train.py, which is no recipe.
    for path in ("configs/nope.py", PROJECT / "configs", "train.py"):
        assert refused_fast(config=path) == f"--config={path}: no such file; recipes are in {PROJECT / 'configs'}"


def test_a_file_that_is_no_recipe(refused_fast, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("")
    assert refused_fast(config=recipe) == "--config: not a recipe, the file has no function get_config()"
    recipe.write_text("def get_config():\n    pass\n")
    assert refused_fast(config=recipe) == f"--config={recipe}: its get_config() returns nothing"


def test_an_error_in_a_recipe_keeps_its_traceback(starter, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config():\n    return undefined\n")
    result = starter.run("--config.seed=1", config=recipe, workdir=tmp_path / "run")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("NameError: name 'undefined' is not defined\n")
    assert f'File "{recipe}", line 2' in result.stderr


def test_no_recipe_at_all(trainer):
    result = trainer.run(config=None, workdir=trainer.folder / "none")
    assert result.returncode == 2
    assert the_error(result) == "error: --config is missing, e.g. --config=configs/odm.py"
    assert not (trainer.folder / "none").exists()


def test_a_recipe_is_found_from_any_folder_and_in_either_spelling(refused, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.py").write_text("")
    error = refused("--config.seed=-1", config="configs/base.py", cwd="/")
    assert error == "config.seed = -1: must be an integer >= 0 and < 2**63"
    # A file of the working directory comes first.
    error = refused("--config", "configs/base.py", "--config.seed=-1", config=None, cwd=tmp_path)
    assert error == "--config: not a recipe, the file has no function get_config()"


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, f"dataflex-jax {__version__}\n", ""),
        ([], 0, f"{console.__doc__.strip()}\n", ""),
        (["--help"], 0, f"{console.__doc__.strip()}\n", ""),
        (
            ["trian", "--help"],
            2,
            "",
            "error: unknown command 'trian'; known: "
            "train, select, validate, swarm, evaluate, generate, export, report, convert\n",
        ),
    ],
)
def test_the_console_command_itself(monkeypatch, capsys, arguments, code, out, err):
    monkeypatch.setattr(sys, "argv", ["dataflex-jax", *arguments])
    assert console.main() == code
    assert capsys.readouterr() == (out, err)


def test_the_console_command_runs_the_commands_and_shows_their_help(trainer, tmp_path):
    help_of_each = [("dataflex_jax", command, "--help") for command in console.COMMANDS]
    *shown, of_the_module, refused = in_forks(
        trainer,
        tmp_path,
        [
            *help_of_each,
            ("dataflex_jax.train", "--config=configs/odm.py", "--help"),
            ("dataflex_jax", "train", "--config=configs/base.py", "--config.seed=-1", "--workdir=run"),
        ],
    )
    for command, result in zip(console.COMMANDS, shown, strict=True):
        assert (result.returncode, result.stderr) == (0, "")
        assert f"    python -m dataflex_jax.{command} " in result.stdout
        lines = result.stdout.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 100
    train, generate = (shown[console.COMMANDS.index(name)].stdout for name in ("train", "generate"))
    assert train == of_the_module.stdout
    assert train.startswith("Trains a language model while policies decide what it trains on.\n")
    flags = [line.split()[0] for line in train.splitlines() if line.startswith("  --")]
    assert flags == ["--config", "--workdir", "--coordinator", "--num_processes", "--process_id", "--start_timeout"]
    assert "  --prompt          The text to continue; may be given several times.\n" in generate
    assert "  --max_new_tokens  Tokens at most, unless the text ends before. Default: 128.\n" in generate
    assert refused.returncode == 2
    assert the_error(refused) == "error: config.seed = -1: must be an integer >= 0 and < 2**63"


def test_what_users_can_do_nothing_about_is_not_shown(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli._silence_what_is_reported_elsewhere()
        warnings.warn("Some donated buffers were not usable: float32[3]", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]
