import pytest

from dataflex_jax.data.sources import builtin_text
from dataflex_jax.errors import InputError


@pytest.mark.parametrize("domain", list(builtin_text.DOMAINS))
def test_documents_are_real_bounded_distinct_and_repeatable(domain):
    documents = builtin_text.documents(domain)
    size = sum(len(text.encode()) for text in documents)
    assert len(documents) >= 20
    assert 100_000 < size < builtin_text.DOMAIN_BYTES + 200_000
    assert len(set(documents)) == len(documents)
    assert builtin_text.documents(domain) == documents


def test_domains_share_no_document():
    documents = [text for domain in builtin_text.DOMAINS for text in builtin_text.documents(domain)]
    assert len(builtin_text.DOMAINS) >= 5
    assert len(set(documents)) == len(documents)


def test_installation_without_the_files_is_an_input_error(monkeypatch):
    monkeypatch.setitem(builtin_text.DOMAINS, "code", lambda: iter(()))
    with pytest.raises(InputError, match="no text for domain 'code'"):
        builtin_text.documents("code")


def test_cutting_loses_no_paragraph(monkeypatch):
    paragraphs = [f"paragraph {i} " + "x" * 300 for i in range(100)]
    monkeypatch.setitem(builtin_text.DOMAINS, "code", lambda: iter(["\r\n\r\n".join(paragraphs)]))
    documents = builtin_text.documents("code")
    assert len(documents) > 1
    assert "\n\n".join(documents).split("\n\n") == paragraphs
