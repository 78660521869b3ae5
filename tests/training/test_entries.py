"""What lies in a run folder under a run's names and is not what a run writes."""

import os
import re

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.training.entries import FILES, FOLDERS, check_entries
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import policy_runs, tiny


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_folder_in_place_of_a_file_or_a_file_in_place_of_a_folder(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name in FILES else path.touch()
    kind = "file" if name in FILES else "folder"
    line = f"{path}: not a {kind}, which a run writes there; move it away, or choose another --workdir"
    with pytest.raises(InputError, match=re.escape(line)):
        check_entries(tmp_path)


def test_a_folder_in_place_of_a_selection(tmp_path):
    (tmp_path / "selections" / "step_00000004.npz").mkdir(parents=True)
    with pytest.raises(InputError, match=r"selections/step_00000004.npz: not a file, which a run writes there"):
        check_entries(tmp_path)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written; change its permissions, or choose"):
        check_entries(tmp_path)


def test_what_a_run_leaves_is_right_and_a_broken_link_is_not(tmp_path):
    for name in FILES:
        (tmp_path / name).touch()
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    check_entries(tmp_path)
    (tmp_path / "policy.jsonl").unlink()
    (tmp_path / "policy.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"policy.jsonl: not a file"):
        check_entries(tmp_path)


def test_a_run_looks_before_it_writes(tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    config = policy_runs.config(tiny.write_domains(tmp_path / "domains"))
    with pytest.raises(InputError, match=r"metrics.jsonl: not a file, which a run writes there"):
        train_and_evaluate(config, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]
