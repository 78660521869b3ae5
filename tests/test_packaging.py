"""What the wheel holds, and that an installation of it works in any folder."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.command import PROJECT, the_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the clone."""
    with zipfile.ZipFile(_built(PROJECT, tmp_path_factory.mktemp("wheel"))) as file:
        yield file


@pytest.fixture(scope="module")
def wheel_of_sdist(tmp_path_factory):
    """The wheel of a source distribution, as `python -m build` makes it."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(build, cwd=PROJECT, check=True, timeout=300)
    (sdist,) = folder.iterdir()
    with zipfile.ZipFile(_built(sdist, tmp_path_factory.mktemp("wheel"))) as file:
        yield file


def _built(source, folder):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True, timeout=300)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_has_one_package_with_the_recipes_and_the_console_command(wheel):
    names = wheel.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dataflex_jax"}
    recipes = {name.rpartition("/")[2] for name in names if name.startswith("dataflex_jax/configs/")}
    assert recipes == {path.name for path in (PROJECT / "configs").glob("*.py")}
    for data in ("reporting/report.html.jinja", "data/text/chat_templates/qwen.jinja", "aot/cards/h100.txtpb"):
        assert f"dataflex_jax/{data}" in names
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert "dataflex-jax = dataflex_jax.__main__:main" in wheel.read(entry_points).decode()


def test_a_source_distribution_leads_to_the_same_wheel(wheel, wheel_of_sdist):
    assert sorted(wheel_of_sdist.namelist()) == sorted(wheel.namelist())


def test_recipes_are_found_beside_a_project_s_own_package_configs(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    (project / "configs/__init__.py").write_text('raise ImportError("of the project")\n')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def refusal(*arguments):
        command = [sys.executable, "-m", "dataflex_jax.train", *arguments]
        result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2, result.stderr
        return the_error(result)

    # The recipe was read, its imports too.
    error = refusal("--config=configs/odm.py", "--config.seed=-1")
    assert error == "error: config.seed = -1: must be an integer >= 0 and < 2**63"
    recipes = tmp_path / "installed/dataflex_jax/configs"
    assert (
        refusal("--config=configs/nope.py")
        == f"error: --config=configs/nope.py: no such file; recipes are in {recipes}"
    )
    assert recipes.is_dir()
