"""Templates of others: rendered as `transformers` does, and stopped, by name, where they take too much."""

import dataclasses

import jinja2
import pytest
import transformers

from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.text import rendering
from dataflex_jax.data.text.chat import ChatEncoder, template_text
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from tests.helpers import foreign_tokenizer

MESSAGES = [
    {"role": "system", "content": "<b> & 'naïve' 東京"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho\n", "reasoning_content": "hm"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ALL_OF_IT = """
{%- macro line(text, n=2) %}
    {%- for i in range(n) %}{{ text }}{{ loop.index0 if not loop.last }}{% endfor %}
{%- endmacro %}
{%- set ns = namespace(seen=0, last=none) %}
  {%- for tool in tools or [] %}{{ tool | tojson }}{{ tool | tojson(indent=2) }}{% endfor %}
{% for message in messages recursive %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}{{ line(message.content) }} {{ loop.length }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message['thinking'] }}{{ message.content }}
    {%- endgeneration %}{% endif %}
    {%- if ns.seen > 9 %}{% break %}{% endif %}
{%- endfor %}
{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ dict(a=1).a }}{{ ns.seen }}{{ documents }}
{%- if add_generation_prompt %}|{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = foreign_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "t")
    return load_tokenizer(str(folder), texts=None, cache_dir=".")


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_renders_as_with_transformers(tokenizer, tools, prompt):
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.copy_of_backend(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    template = rendering.ChatTemplate(ALL_OF_IT, tokenizer.template_variables, 1000)
    assert template.render(MESSAGES, tools, generation_prompt=prompt) == reference.apply_chat_template(
        MESSAGES, tools=tools, chat_template=ALL_OF_IT, add_generation_prompt=prompt, tokenize=False
    )


BAD = {
    "division": ("{{ 1/0 }}", "fails: ZeroDivisionError: division by zero"),
    "index": ("{{ messages[0].content.index('no such') }}", "fails: ValueError"),
    "huge range": ("{% for i in range(10**9) %}x{% endfor %}", "computes with integers beyond 268,435,456"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "a long range": ("{% for i in range(10**6) %}x{% endfor %}", "fails: OverflowError: Range too big"),
    "memory": (
        "{% set ns = namespace(s='xx') %}{% for i in range(20) %}{% set ns.s = ns.s.replace('x', 'xxxxxxxx') %}"
        "{% endfor %}",
        "takes more than 1 GiB of memory for short conversations",
    ),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 100,000 steps for short conversations",
    ),
    "a branching macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "takes more than 100,000 steps for short conversations",
    ),
    "time": ("{{ 5 | round(-100000000) }}", "takes more than 3 s for short conversations"),
    "nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not valid: RecursionError"),
    "cut short": ("\n{% if messages", "is not valid: line 2: unexpected end of template"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_one_line_that_names_its_file(tokenizer, name):
    template, reason = BAD[name]
    with pytest.raises(InputError) as caught:
        ChatEncoder(dataclasses.replace(tokenizer, chat_template=template), template)
    assert str(caught.value).startswith(f"{tokenizer.template_source}: the chat template {reason}")
    assert tokenizer.template_source.endswith("/t/tokenizer_config.json")
    assert "\n" not in str(caught.value)


def test_a_template_that_loops_in_one_conversation_alone(tokenizer, monkeypatch):
    """What short conversations do not show stops the run, and does not pass for one bad record after another."""
    template = foreign_tokenizer.TEMPLATE + (
        "{% if 'loop' in messages[0].content %}{% for i in range(9999) %}{% for j in range(9999) %}"
        "{% endfor %}{% endfor %}{% endif %}{% if 'divide' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    )
    monkeypatch.setattr(rendering, "MAX_STEPS", 20_000)
    encoder = ChatEncoder(tokenizer, template)

    def asked(text):
        return Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}])

    (encoded, refused) = encoder.encode_batch([asked("hi"), asked("divide")])
    assert encoded.targets.any()
    source = tokenizer.template_source
    assert refused == f"the chat template of {source} fails on it: ZeroDivisionError: division by zero"
    with pytest.raises(InputError, match=r"tokenizer_config.json: the chat template takes more than 20,000 steps"):
        encoder.encode_batch([asked("loop")])


@pytest.mark.parametrize(
    "too_much",
    [
        *(
            "'a' * 10**9",
            "'a' * 99999 * 99999",
            "[0] * 99999 * 99999",
            "2 ** 10**8",
            "9 ** 99 ** 99",
            "'a'.center(10**10)",
        ),
        *("'%999999999d' % 5", "'%*d' % (268435456, 5)", "'a' | center(9999999999)"),
    ],
)
def test_what_is_too_large_in_one_conversation_alone_is_not_computed(tokenizer, too_much):
    """Neither while the template is compiled, where short conversations pass over it."""
    rest = "{% if 'x' in messages[0].content %}{{ " + too_much + " }}{% endif %}"
    conversation = Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}])
    with pytest.raises(InputError, match=r"tokenizer_config.json: the chat template (computes|makes)"):
        ChatEncoder(tokenizer, foreign_tokenizer.TEMPLATE + rest).encode_batch([conversation])


@pytest.mark.parametrize("sign", "+~")
def test_a_text_that_doubles_is_bounded(sign):
    text = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s " + sign + " n.s %}{% endfor %}"
    with pytest.raises(rendering.TooMuch, match="makes a text or a list longer than 256 Mi"):
        rendering.ChatTemplate(text, {}, 1000).render(MESSAGES)


def test_operations_are_jinjas():
    text = (
        "{{ 1 + 2 }}{{ 'a' ~ 1 ~ none }}{{ 'a' * 3 }}{{ '%s%%%03d' % ('x', 7) }}{{ 7 % 4 }}{{ 2 ** -1 }}{{ [1] + [2] }}"
    )
    assert rendering.ChatTemplate(text, {}, 1000).render(MESSAGES) == jinja2.Template(text).render()


def test_a_template_cannot_write_without_end(tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_CHARACTERS", 1 << 20)
    template = rendering.ChatTemplate("{% for i in range(5000) %}{{ 'x' * 1000 }}{% endfor %}", {}, 10_000)
    with pytest.raises(rendering.TooMuch, match="writes more than 1 Mi characters"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__ }}", "{{ messages.append(1) }}", "{% set n = namespace(_x=1) %}", "{{ cycler.__init__ }}"],
)
def test_the_sandbox_holds(template):
    assert "class" not in _rendered_or_refused(template)


def _rendered_or_refused(template):
    try:
        return rendering.ChatTemplate(template, {}, 1000).render(MESSAGES)
    except jinja2.TemplateError:
        return ""


def test_a_built_in_template_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "tried", None)
    tokenizer = load_tokenizer("bytes", texts=None, cache_dir=tmp_path)
    ChatEncoder(tokenizer, template_text("alpaca", tokenizer))
