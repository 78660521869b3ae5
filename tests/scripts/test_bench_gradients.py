"""The benchmark of per-example gradients at a tiny size: what it writes. Nothing here depends on speed."""

import json

import numpy as np
import pytest

from tests.scripts.test_bench import MACHINE, run


@pytest.mark.slow
def test_per_example_gradients(tmp_path):
    output = tmp_path / "per_example_gradients.json"
    run("per_example_gradients.py", "--small", f"--output={output}")
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    kinds = {"sketch adam", "sketch sgd", "kronecker sgd", "rademacher adam"}
    kinds |= {f"exact {count} adam blocks" for count in (1, 8, 57)} | {f"exact {count} adam all" for count in (1, 8)}
    assert result["over_training"].keys() == kinds
    assert result["seconds"].keys() == result["peak_bytes"].keys() == kinds | {"training"}
    for kind in kinds:
        expected = np.divide(result["seconds"][kind]["values"], result["seconds"]["training"]["values"])
        np.testing.assert_allclose(result["over_training"][kind]["values"], expected)
    layer = 4 * 4 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)
    assert result["one_layers_gradients_bytes"] == layer
    assert result["allowance_bytes"] == result["peak_bytes"]["training"] + layer + 4 * 4 * 64
    assert result["seconds_an_example_by_batch"].keys() == {"1", "2"}
    assert result["seconds_an_example_by_number"].keys() == {"8", "16"}
