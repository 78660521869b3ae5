"""The command `python -m dataflex_jax.report`."""

import re
import subprocess
import sys

from tests.helpers.synthetic_run import write_run


def test_command(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    command = [sys.executable, "-m", "dataflex_jax.report"]
    done = subprocess.run([*command, str(run), f"--output={tmp_path / 'r.html'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'r.html'}\nFigures and tables: {tmp_path / 'r_files'}\n"
    assert (tmp_path / "r_files" / "figures" / "loss.csv").stat().st_size > 100
    assert (tmp_path / "r.html").stat().st_size > 10_000

    output = tmp_path / "refused.html"
    refused = subprocess.run([*command, str(tmp_path), f"--output={output}"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert re.fullmatch(
        r"error: \S+: not a run folder; config\.json or metrics\.jsonl is expected in it\n", refused.stderr
    )
    assert not output.exists()
