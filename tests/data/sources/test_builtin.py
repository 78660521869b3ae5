import pytest

from dataflex_jax.data.sources import builtin
from dataflex_jax.errors import InputError


@pytest.mark.parametrize("domain", list(builtin.DOMAINS))
def test_documents_are_real_bounded_distinct_and_repeatable(domain):
    documents = builtin.documents(domain)
    size = sum(len(text.encode()) for text in documents)
    assert len(documents) >= 20
    assert 100_000 < size < builtin.DOMAIN_BYTES + 200_000
    assert len(set(documents)) == len(documents)
    assert builtin.documents(domain) == documents


def test_domains_share_no_document():
    documents = [text for domain in builtin.DOMAINS for text in builtin.documents(domain)]
    assert len(builtin.DOMAINS) >= 5
    assert len(set(documents)) == len(documents)


def test_installation_without_the_files_is_an_input_error(monkeypatch):
    monkeypatch.setitem(builtin.DOMAINS, "code", lambda: iter(()))
    with pytest.raises(InputError, match="no text for domain 'code'"):
        builtin.documents("code")


def test_cutting_loses_no_paragraph(monkeypatch):
    paragraphs = [f"paragraph {i} " + "x" * 300 for i in range(100)]
    monkeypatch.setitem(builtin.DOMAINS, "code", lambda: iter(["\r\n\r\n".join(paragraphs)]))
    documents = builtin.documents("code")
    assert len(documents) > 1
    assert "\n\n".join(documents).split("\n\n") == paragraphs
