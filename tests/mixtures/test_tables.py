"""The tables of swarms: what is written is read, those of others too, and bad ones are one line each."""

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.mixtures import tables

RUNS = 8


def lines(header, *columns):
    return "\n".join([header, *(",".join(map(str, row)) for row in zip(*columns, strict=True))]) + "\n"


def ratios(naming="run"):
    return lines(f"{naming},code,news", range(RUNS), [n + 1 for n in range(RUNS)], [1] * RUNS)


def metrics(naming="run"):
    return lines(f"{naming},pile,law", range(RUNS), np.linspace(2, 3, RUNS), [0.5 + n for n in range(RUNS)])


def read(folder, first=None, second=None, fitted=None):
    first, second = ratios() if first is None else first, metrics() if second is None else second
    for name, text in ((tables.RATIOS, first), (tables.METRICS, second)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tables.read(folder / tables.RATIOS, folder / tables.METRICS, fitted)


def test_what_is_written_is_read_to_the_last_bit_and_averaged_over_seeds(tmp_path):
    random = np.random.default_rng(0)
    weights, values = random.dirichlet(np.ones(3), RUNS), random.normal(size=(RUNS, 2, 2))
    names = [f"mixture {n}" for n in range(RUNS)]
    tables.write(tmp_path / "r.csv", ["run", "a", "b", "c"], [[n, *w] for n, w in zip(names, weights, strict=True)])
    rows = [[n, s, *v[s]] for n, v in zip(names, values, strict=True) for s in range(2)]
    tables.write(tmp_path / "m.csv", ["run", "seed", "nll/x", "bits_per_byte/x"], rows)
    runs = tables.read(tmp_path / "r.csv", tmp_path / "m.csv")
    assert (runs.names, runs.domains, runs.metrics) == (tuple(names), ("a", "b", "c"), ("bits_per_byte/x",))
    np.testing.assert_allclose(runs.weights, weights, rtol=1e-15)
    np.testing.assert_array_equal(runs.values[:, 0], values[:, :, 1].mean(axis=1))
    np.testing.assert_allclose(runs.deviation, np.sqrt(values[:, :, 1].var(axis=1, ddof=1).mean()))


@pytest.mark.parametrize("naming", ["index", "name", ""])
def test_tables_of_other_tools_are_read(tmp_path, naming):
    runs = read(tmp_path, ratios(naming), metrics(naming))
    assert (runs.domains, runs.metrics, runs.deviation) == (("code", "news"), ("pile", "law"), None)
    np.testing.assert_allclose(runs.weights[1], [2 / 3, 1 / 3])


def test_several_naming_columns_are_no_domains(tmp_path):
    both = lines("run,name,index,code,news", *[range(RUNS)] * 3, [1 + n for n in range(RUNS)], [1] * RUNS)
    assert read(tmp_path, both).domains == ("code", "news")


def test_target_groups_are_fitted_where_there_are_some(tmp_path):
    header = "run,nll/x,bits_per_byte/x,nll/target/t,bits_per_byte/target/t"
    text = lines(header, range(RUNS), *[np.linspace(1, 2, RUNS)] * 4)
    assert read(tmp_path, second=text).metrics == ("bits_per_byte/target/t",)
    assert read(tmp_path, second=text, fitted="nll/*").metrics == ("nll/x", "nll/target/t")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (b"", None, r"ratios.csv: nothing in it; a header and one line a run"),
        (b"\xff\xfe,a", None, r"ratios.csv: not a .csv table in UTF-8"),
        ('run,a,b\n"1,2,3\n', None, r"ratios.csv: not a .csv table in UTF-8"),
        ("run,a,b\n1,2\n", None, r"ratios.csv:2: 2 columns; the header has 3"),
        ("run,a,a\n1,2,3\n", None, r"ratios.csv: two columns are called 'a'"),
        ("run,a\n1,2\n", None, r"ratios.csv: 1 columns of domains; a mixture has two or more"),
        ("run,a,b\n1,2,x\n", None, r"ratios.csv:2: column 'b': 'x' is not a finite number"),
        ("run,a,b\n1,2,nan\n", None, r"ratios.csv:2: column 'b': 'nan' is not a finite number"),
        ("run,a,b\n1,2,3\n1,2,3\n", None, r"ratios.csv: two lines of run '1'"),
        (ratios().replace("\n3,4,1", "\n3,-4,1"), None, r"ratios.csv: run '3': the weights of a mixture are 0 or more"),
        (ratios().replace("\n3,4,1", "\n3,0,0"), None, r"ratios.csv: run '3': the weights of a mixture are 0 or more"),
        (None, metrics().replace("\n3,", "\n33,"), r"metrics.csv: no line of run '3', which the other table has"),
        (ratios().replace("\n3,4,1", ""), None, r"ratios.csv: no line of run '3', which the other table has"),
        (None, metrics("id"), r"metrics.csv: no column run, index or name that says which run of .*ratios.csv"),
        (None, metrics().replace("0.5", "half"), r"metrics.csv:2: column 'law': 'half' is not a finite number"),
        ("run,a,b\n1,2,3\n", "run,m\n1,2\n", r"ratios.csv: 1 runs; 8 or more are needed for a law"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, first, second, message):
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path, first, second)
    assert "\n" not in str(raised.value)


def test_a_pattern_without_metrics_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r"^--fit=nll/\*: no column of .*metrics.csv; it has 'pile, law'"):
        read(tmp_path, fitted="nll/*")
