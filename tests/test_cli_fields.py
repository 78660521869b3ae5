"""Values of fields and paths on the command line, read as the commands read them."""

import pytest

from dataflex_jax import cli, evaluate, export, generate, report, select, train
from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError
from tests.helpers.command_line import chosen, parsed

LOCAL = ("--config=configs/odm.py:local", "--config.data.root=DIR")


@pytest.mark.parametrize("nothing", ["", "None", "null"])
def test_nothing_is_none_for_every_optional_field(nothing):
    given = {"data.domains": "a", "data.template": "qwen", "data.buckets": "64,4096", "lora.alpha": "3", "order": None}
    given |= {"model.vocab_size": "512", "model.tie_word_embeddings": "true", "mixer.min_exploration_rate": "0.1"}
    set_ = [f"--config.{name}={value}" for name, value in given.items() if value]
    unset = [f"--config.{name}={nothing}" for name in given]
    for config, is_none in ((chosen(*LOCAL, *set_), False), (chosen(*LOCAL, *set_, *unset), True)):
        values = dict(configuration.fields(config)) | {"mixer.min_exploration_rate": config.mixer.min_exploration_rate}
        assert [values[name] is None for name, value in given.items() if value] == [is_none] * (len(given) - 1)


def test_a_policy_of_a_recipe_can_be_left_out():
    assert chosen(*LOCAL, "--config.mixer=None").mixer is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        ("a, b-c.d", ("a", "b-c.d")),
        ("('a','b')", ("a", "b")),
        ("['a', 'b']", ("a", "b")),
        ("'a,b'", ("a,b",)),
        ("layers/attention/*,lm_head/*", ("layers/attention/*", "lm_head/*")),
    ],
)
def test_names_may_be_written_with_commas_between(text, value):
    assert chosen(*LOCAL, f"--config.data.domains={text}").data.domains == value


def test_numbers_may_be_written_with_commas_between():
    config = chosen(*LOCAL, "--config.data.buckets=64,4096", "--config.data.proportions=1,0.5")
    assert (config.data.buckets, config.data.proportions) == ((64, 4096), (1, 0.5))


@pytest.mark.parametrize("field", ["data.proportions", "mixer.initial_proportions"])
def test_proportions_by_name(field):
    section, name = field.split(".")
    config = chosen(*LOCAL, f'--config.{field}={{"a.en": 0.7, "b": 0.3}}')
    assert config[section][name] == (("a.en", 0.7), ("b", 0.3))
    with pytest.raises(InputError, match=r"config.data.proportions = \(\('a', 'b'\),\): must be a tuple of numbers"):
        chosen(*LOCAL, '--config.data.proportions={"a": "b"}')


def test_formatting_of_a_recipe_s_targets_can_be_unset():
    arguments = ("--config=configs/less.py:lora", "--config.data.root=DIR", "--config.targets.root=DIR")
    arguments += ("--config.targets.source=dataset_info",)
    with pytest.raises(InputError, match=r"config.targets.formatting: not with source .* set it to None"):
        chosen(*arguments)
    assert chosen(*arguments, "--config.targets.formatting=None").targets.source == "dataset_info"


def test_every_field_with_a_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    paths = {name: "~/x.json" for name in configuration.PATHS}
    overrides = [f"--config.{name}={path}" for name, path in paths.items()]
    policies = "mixer=doremi,order=sorting,weighter=rho1"
    config = chosen(
        f"--config=configs/base.py:{policies}",
        *overrides,
        "--config.lora.rank=8",
        "--config.mixer.reference=~/x.json",
        "--config.mixer.sampling=$DATA/x.json",
        "--config.order.scores=${DATA}/x.npy",
        "--config.weighter.reference=$DATA/x",
    )
    values = dict(configuration.fields(config))
    assert {name: values[name] for name in paths} == dict.fromkeys(paths, "/home/me/x.json")
    assert (config.mixer.reference, config.mixer.sampling) == ("/home/me/x.json", "/data/x.json")
    assert (config.order.scores, config.weighter.reference) == ("/data/x.npy", "/data/x")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (train, ["workdir"]),
        (select, ["output", "records"]),
        (evaluate, ["checkpoint"]),
        (export, ["checkpoint", "import_from", "output"]),
        (generate, ["checkpoint"]),
        (report, ["output"]),
    ],
)
def test_every_flag_with_a_path_is_expanded(monkeypatch, command, names):
    monkeypatch.setenv("HOME", "/home/me")
    with parsed(*(f"--{name}=~/x" for name in names), command=command) as found:
        assert [found[name].value for name in names] == ["/home/me/x"] * len(names)
    refused = pytest.raises(InputError, match=f"--{names[0]}=.NOPE/x: .*NOPE stands for nothing here")
    with refused, parsed(f"--{names[0]}=$NOPE/x", command=command):
        pass


def test_several_checkpoints_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with parsed("--checkpoint=~/a,b,org/c", command=select) as found:
        assert found["checkpoint"].value == ["/home/me/a", "b", "org/c"]
    with parsed(command=select) as found:
        assert found["checkpoint"].value == []


def test_a_script_that_starts_others_says_where_their_options_stand():
    def main(argv):
        """Nothing."""

    with pytest.raises(InputError, match=r"^Unknown command line flag 'config.seed'.*; they stand after --$"):
        cli.parse(["script", "--config.seed=1"], main, "they stand after --")


def test_a_second_recipe_is_refused():
    line = r"^--config is given twice; a run has one recipe, and --config.FIELD=VALUE sets a field$"
    with pytest.raises(InputError, match=line):
        chosen("--config=configs/odm.py", "--config.seed=1", "--config=configs/doge.py")


def test_a_recipe_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from dataflex_jax.configs import odm\nget_config = odm.get_config\n")
    assert chosen("--config=~/mine.py:quickstart,order=folding").order.name == "folding"
