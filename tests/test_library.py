"""The library's face: every docstring's example runs, and what it gives is what the parts give."""

import dataclasses
import doctest
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dataflex_jax as df
from dataflex_jax import library
from dataflex_jax.models.hf.weights import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`df.example()` as Hugging Face would have it."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("example"), df.example()
    tokenizer.save(folder / "tokenizer")
    save_pretrained(folder / "model", model.config, model.params, folder / "tokenizer")
    return folder / "model"


def examples():
    """Of every function, and of the classes that are called rather than returned or filled in."""
    found = doctest.DocTestFinder(recurse=False).find
    names = {"dataclasses": dataclasses, "df": df, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    for name in df.__all__:
        member = getattr(library, name)
        if inspect.isfunction(member) or member is df.TrainStep:
            yield from found(member, name, globs=names)


@pytest.mark.parametrize("example", [pytest.param(e, id=e.name) for e in examples()])
def test_example(example, folder):
    assert example.examples, f"{example.name} has no example"
    example.globs["folder"] = folder
    said = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)


def test_the_face_is_lazy_and_complete():
    assert df.__all__ == library.__all__
    assert set(df.__all__) <= set(dir(df))
    for name in df.__all__:
        assert getattr(df, name) is getattr(library, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = df.no_such_thing


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    """In a fork each: no module needs another one to be imported before it."""
    modules = [module.name for module in pkgutil.walk_packages(df.__path__, "dataflex_jax.")]
    code = (
        "import importlib, os, sys\n"
        "import jax, optax, grain, transformers, matplotlib.figure, orbax.checkpoint, pyarrow.parquet\n"
        "from flax import nnx\n"
        "for module in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        importlib.import_module(module)\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0, module\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(df.__path__[0]).parent)}
    subprocess.run([sys.executable, "-c", code, *modules], check=True, env=environment)


def test_losses_and_embeddings_do_not_depend_on_the_other_rows():
    model, tokenizer = df.example()
    texts = ["Ada", "Grace Hopper wrote the first compiler", "x"]
    together = df.rows(texts, tokenizer)
    for i, text in enumerate(texts):
        alone = df.rows([text], tokenizer)
        np.testing.assert_allclose(df.losses(model, together)[i], df.losses(model, alone)[0], rtol=1e-5)
        np.testing.assert_allclose(df.embeddings(model, together)[i], df.embeddings(model, alone)[0], atol=1e-5)


def test_alignments_are_inner_products_of_gradients():
    model, tokenizer = df.example()
    rows = df.rows(["Ada", "Grace Hopper"], tokenizer)
    batch = df.batch(rows)

    def loss(params, i):
        losses = model.having(params).token_losses(batch).losses[i]
        return jnp.sum(losses * batch.mask[i]) / jnp.sum(batch.mask[i])

    gradients = [jax.grad(loss)(model.params, i) for i in range(2)]

    def product(x, y):
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        return sum(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)

    expected = [[product(g, direction) for direction in gradients] for g in gradients]
    np.testing.assert_allclose(df.alignments(model, rows, gradients), expected, rtol=1e-4)


def test_gradients_may_be_of_all_that_is_trained():
    model, tokenizer = df.example()
    found = df.gradients(model, df.rows(["Ada"], tokenizer), projection=df.Projection("none"), parameters="all")
    assert found.shape == (1, sum(leaf.size for leaf in jax.tree.leaves(model.params)))


def test_bad_rows_are_one_line():
    _, tokenizer = df.example()
    with pytest.raises(df.InputError, match="give a list of texts"):
        df.rows("one text", tokenizer)
    with pytest.raises(df.InputError, match="item 1 has nothing to predict"):
        df.rows(["a text", ""], tokenizer)
    with pytest.raises(df.InputError, match="no hyperparameter 'alpah'; it has alpha, "):
        df.mixer("odm", alpah=0.5)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(capsys):
    page = Path(__file__).parents[1] / "docs/library.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code, str(page), "exec"), names := {})
    assert names["influence"].shape == (2, 1)
    assert "what ODM would draw" in capsys.readouterr().out
    assert int(names["state"].step) == 3
