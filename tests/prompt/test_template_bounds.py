"""A chat template is code from outside: what it may take of time and memory, and how its errors read."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
from refusing import refused
from transformers import AutoTokenizer

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve

HI = [{"role": "user", "content": "Hi"}]
GROWING = "{{% set ns = namespace(x={}) %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ ns.x }}}}"
LONG = "('a' * 100000)"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve("nano"), read_config(resolve("nano")))


def render(processor: Processor, template: object, **options) -> str:
    processor.tokenizer.chat_template = template
    return processor.render(HI, **options)


TOO_MUCH = {
    "a power": "{{ 2 ** (10 ** 9) }}",
    "a product of numbers": GROWING.format("3", "ns.x * ns.x"),
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ [0] * 10 ** 10 }}",
    "a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass all over": "{% for i in range(99999) %}{% for j in range(9999) if 0 %}{% endfor %}{% endfor %}",
    "loops in macros": "{% macro m() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "text doubled": GROWING.format("'ab'", "ns.x ~ ns.x"),
    "text added to itself": GROWING.format("'ab'", "ns.x + ns.x"),
    "lists of lists": GROWING.format("[0]", "[ns.x, ns.x]"),
    "mappings of mappings": GROWING.format("0", "dict(a=ns.x, b=ns.x)"),
    "views of views": GROWING.format("0", "{'a': ns.x, 'b': ns.x}.values()"),
    "lists nested": "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}",
    "a macro that calls itself": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "output of a macro": "{% macro m() %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ m() }}",
    "text of the template's own": "{% set x %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}",
    "a filter on a block": "{% macro m() %}{% for i in range(99999) %}{% filter replace('a', 'b' * 9999) %}aa"
    "{% endfilter %}{% endfor %}{% endmacro %}{{ m() }}",
    "a width": "{{ 'a'.ljust(10 ** 9) }}",
    "a filter's width": "{{ 'a' | center(10 ** 9) }}",
    "a width in %": "{{ '%999999999d' % 1 }}",
    "a computed width in %": "{{ '%*d' % (999999999, 1) }}",
    "a width in format": "{{ '{:999999999}'.format(1) }}",
    "a computed width in format": "{{ '{:{}}'.format(1, 999999999) }}",
    "a width in digits of another script": "{{ '{:٩٩٩٩٩٩٩٩٩}'.format(1) }}",
    "a width behind zeros": "{{ '{:000000000999999999}'.format(1) }}",
    "a width in a filter of a filter": "{{ ['%999999999d'] | map('format', 1) | list }}",
    "replacing": f"{{{{ {LONG}.replace('a', {LONG}) }}}}",
    "replacing nothing": f"{{{{ {LONG}.replace('', {LONG}) }}}}",
    "replacing in a list": f"{{{{ [{LONG}] | replace('', 'b' * 5000) }}}}",
    "replacing by a filter": f"{{{{ {LONG} | replace(new={LONG}, old='a') }}}}",
    "joining": f"{{{{ {LONG}.join(range(999) | map('string')) }}}}",
    "joining by a filter": f"{{{{ range(999) | join({LONG}) }}}}",
    "joining by a filter with a name": f"{{{{ range(999) | join(attribute='real', d={LONG}) }}}}",
    "indenting": "{{ ('\n' * 9999) | indent(9999) }}",
    "indenting other lines": "{{ ('\x0b' * 9999) | indent(9999, true, true) }}",
    "a long number": f"{{{{ ({LONG} | int(base=16)) // 3 > 0 }}}}",
    "indenting JSON": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "separating JSON": f"{{{{ (range(999) | list) | tojson(separators=({LONG}, ':')) }}}}",
    "tabs": "{{ ('\t' * 9999).expandtabs(9999) }}",
    "a number's bytes": "{{ (5).to_bytes(10 ** 9, 'little') }}",
    "translating": f"{{{{ {LONG}.translate({{97: {LONG}}}) }}}}",
    "adding lists": "{{ [[1]] | sum(start=[]) }}",
    "its own size": "x" * 300_000,
}  # fmt: skip


# These take their bounds to the end, which tracing makes slow.
LONG = {"lists of lists", "mappings of mappings", "views of views", "loops in loops", "loops in macros"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in LONG else []) for name in TOO_MUCH]
)
def test_a_template_that_takes_too_much_is_refused_before_it_has_taken_it(processor: Processor, name: str):
    tracemalloc.start()
    try:
        with refused("chat_template_refused"):
            render(processor, TOO_MUCH[name])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


WRONG = {
    "raise_exception": ("{{ raise_exception('No <think>\n for you') }}", "No <think> for you"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "overflow": ("{{ 10.0 ** 400 }}", "OverflowError"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "an absent key": ("{{ {}['a'].b }}", "'a'"),
    "an unknown name": ("{{ nothing.x }}", "'nothing' is undefined"),
    "an unknown filter": ("{{ 1 | nothing }}", "'nothing'"),
    "a syntax error": ("{% for %}", "Expected an expression"),
    "brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
    "a long sum": ("{{ " + "1 + " * 9999 + "1 }}", "RecursionError"),
    "blocks": ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "SyntaxError"),
    "Python's inner parts": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "changing the messages": ("{{ messages.clear() }}", "clear"),
    "a file": ("{% include '/etc/hosts' %}", "loader"),
    "a namespace's inner parts": ("{% set ns = namespace(_x=1) %}", "_x"),
    "no text": (5, "int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_in_a_template_is_one_sentence(processor: Processor, name: str):
    template, words = WRONG[name]
    with refused("chat_template_refused", words) as caught:
        render(processor, template)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_template_that_puts_its_control_tokens_together_is_refused_and_not_half_understood(processor: Processor):
    with refused("chat_template_refused", "<|im_start|>"):
        render(processor, "{{ '<|im_' ~ 'start|>' }}")
    with refused("chat_template_refused"):
        render(processor, "{% set x = '<think>' ~ messages[0].content %}{{ x.split('<think>')[1] }}")


# name: a template, which must render as transformers renders it
FEATURES = {
    "loop controls": "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "loop variables": "{% for i in [1, 2] %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{{ loop.length }}"
    "{% endfor %}",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "blanks": "  {% if true %}\n  a\n  {% endif %}\n{#- b -#}\n c",
    "JSON": "{{ {'b': '<é>', 'a': [2.5, none, true]} | tojson }}"
    "{{ {'b': 1, 'a': {}} | tojson(indent=2, sort_keys=true) }}",
    "namespace and dict": "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(a=1).get('a') }}",
    "call and set blocks": "{% macro m(x='d') %}{{ x }}{{ caller() }}{% endmacro %}{% set s %}{% call m() %}c"
    "{% endcall %}{% endset %}{{ s | upper }}",
    "filters": "{{ ' a,b ' | trim }}{{ [3, 1] | sort | join('-') }}"
    "{{ 'ab' | replace('a', '<think>') }}{{ x | d('d') }}",
    "filters of lists": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "methods": "{{ 'a-b'.split('-') }}{{ '%s %05.1f' % ('a', 2) }}{{ '{:>4}|{x}'.format(1, x='<think>') }}",
    "tags looked for": "{% set t = '<think>' %}{{ t in '<think>' }}{{ '<think>' == t }}{{ t is in [t] }}",
    "names of tokens": "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}",
    "options": "{{ add_generation_prompt }}{{ tools is none }}{{ enable_thinking is defined }}{{ documents }}",
    "slices": "{{ messages[::-1][0].content[0:1] }}{{ messages | length - 1 }}{{ messages[0]['role'] }}",
    "safe": "{{ '<b>' | safe }}{{ '<b>' | e }}",
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_what_templates_use_renders_as_in_transformers(processor: Processor, name: str):
    theirs = AutoTokenizer.from_pretrained(resolve("nano"))
    expected = theirs.apply_chat_template(HI, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=True)
    assert render(processor, FEATURES[name]) == expected


def test_the_year_is_at_hand(processor: Processor):
    assert render(processor, "{{ strftime_now('%Y') }}").isdigit()


def test_a_long_conversation_stays_within_the_bounds(processor: Processor):
    processor = Processor.from_folder(resolve("nano"), read_config(resolve("nano")))
    call = {"function": {"name": "f", "arguments": {"k": "\x01" * 500, "l": [1, 2]}}}
    turns = [
        {"role": "user", "content": "Q " * 100}, {"role": "assistant", "content": "A", "tool_calls": [call]},
        {"role": "tool", "content": "R " * 100},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": "\x01" * 500}} for i in range(20)]
    assert processor.render([*turns * 20, *HI], tools=tools).count("<|im_start|>") == 3 * 20 + 3


def test_an_option_that_the_template_does_not_read_is_refused(processor: Processor):
    assert render(processor, "{{ mood }}", mood="good") == "good"
    with refused("option_no_effect", "mood"):
        render(processor, "{{ messages[0].content }}", mood="good")


def test_of_named_templates_the_one_for_tools_is_used_with_tools(tmp_path: Path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("nano") / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = Processor.from_folder(tmp_path, read_config(tmp_path))
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert processor.render(HI) == "plain" and processor.render(HI, tools=tools) == "tools"
