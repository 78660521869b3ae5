"""A run folder's summary, and what is read back of it."""

import json
import math
import os

import numpy as np
import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.reporting.run_folder import RunRecords, write_summary


def test_summary(tmp_path):
    path = write_summary(tmp_path / "run", {"loss": np.float32(0.1), "eval": {"mfu": math.nan}})
    assert path == tmp_path / "run" / "summary.json"
    assert json.loads(path.read_text()) == {"loss": float(np.float32(0.1)), "eval": {"mfu": None}}
    with pytest.raises(TrainingError, match=r"summary\.json: eval\.nll is inf"):
        write_summary(tmp_path / "run", {"eval": {"nll": math.inf}})
    write_summary(tmp_path / "run", {"loss": 0})
    assert json.loads(path.read_text()) == {"loss": 0}
    assert os.listdir(path.parent) == ["summary.json"]


def test_run_records_refuse_a_malformed_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert RunRecords.load(tmp_path).metrics == []
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary\.json: a JSON list; one object is expected"):
        RunRecords.load(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not valid JSON"):
        RunRecords.load(tmp_path)
