"""A Jinja environment for the templates of checkpoints, code from outside: bounded in time, output and recursion.

Jinja's own sandbox keeps a template from Python's inner parts. This one also counts every step, and knows the size of
anything large before it is built, see limits.py. It lists what a template may use, and refuses everything else.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import ext, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mlx_qwen35.prompt.limits import Exceeded, RenderLimits, check_operands, estimated

LIMITS = "the limits"  # their name in a context: none that a template can write
SOURCE_LIMIT = 200_000  # characters of a template; the published one has 8,000
_DEPTH = 100  # macros and recursive loops in each other
_INDENT = 100

# Methods of strings, and filters, whose result is about as long as what goes in, or is estimated before.
_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper zfill".split()
)
_FILTERS = (
    "abs capitalize center count d default dictsort e escape first float forceescape format groupby indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort "
    "string sum title trim truncate unique upper urlencode wordcount".split()
)
_WRITING = frozenset(("default", "d", "format", "format_map", "join"))  # these write their arguments


# --- what templates call -------------------------------------------------------------------------------------------


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _Dict:
    """dict(...) and dict.fromkeys(...), without Python's type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any):
        for name in dict(*args[1:], **kwargs):
            _check_field(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_field(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_field(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace must not have a field named {name}")


def _to_json(
    limits: RenderLimits, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """JSON as Hugging Face's templates expect it: letters as they are, no HTML escapes."""
    limits.size(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if isinstance(indent, int) and indent > _INDENT:
        raise Exceeded(f"it indents JSON by more than {_INDENT}")
    if indent is None and separators is None:
        return limits.take(encoder.encode(value))
    return limits.take("".join(limits.take(piece) for piece in encoder.iterencode(value)))


def _written(limits: RenderLimits, value: Any) -> str:
    """What {{ value }} writes."""
    return limits.take(value if isinstance(value, str) else str(value))


def _joined(limits: RenderLimits, values: list[Any]) -> str:
    """a ~ b ~ c."""
    texts = [value if isinstance(value, str) else str(value) for value in values]
    limits.check(sum(map(len, texts)))
    return limits.take("".join(texts))


# --- the environment -----------------------------------------------------------------------------------------------


class _Generation(ext.Extension):
    """{% generation %}, with which templates for training enclose what is learnt: here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of a chat template.

    Args:
        mark: marks every text of the template's own.
        unmark: removes marks where the template compares a text with others, or searches it in them.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, mark: Callable[[str], str], unmark: Callable[[str], str]):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self._mark = mark

        def compared(limits: RenderLimits, value: Any = None) -> Any:
            """A text, or each of a list of them, without marks."""
            limits.step()
            if isinstance(value, str):
                return unmark(value)
            texts = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            return type(value)(map(unmark, value)) if texts else value

        ours = {
            "tojson": _to_json, "written": _written, "joined": _joined, "made": RenderLimits.take, "compared": compared
        }  # fmt: skip
        self.filters = {name: _bounded(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {name: _limited(function) for name, function in ours.items()}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | {
            "raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict(),
            "namespace": _Namespace,
        }  # fmt: skip

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE_LIMIT:
            raise Exceeded(f"it must have at most {SOURCE_LIMIT:,} characters, and has {len(source):,}")
        return _Counting(self._mark).visit(super()._parse(source, name, filename)).set_environment(self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits = context.parent[LIMITS]
        check_operands(limits, operator, left, right)
        return limits.take(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __called: Any, *args: Any, **kwargs: Any) -> Any:
        limits = __context.parent[LIMITS]
        given = {name: kwargs[name] for name in kwargs if name not in ("_loop_vars", "_block_vars")}  # Jinja's own
        limits.size((args, given))
        method = getattr(__called, "__wrapped__", __called)  # format and format_map are wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__ not in _METHODS:
                raise SecurityError(f"a template must not call the method {method.__name__} of a text")
            args = estimated(limits, method.__name__, owner, args, given)
        elif isinstance(owner, bytes | int | float):
            raise SecurityError(f"a template must not call a method of {type(owner).__name__}")
        limits.depth += 1
        if limits.depth > _DEPTH:
            raise Exceeded(f"its macros call each other more than {_DEPTH} deep")
        try:
            return limits.take(super().call(__context, __called, *args, **kwargs))
        finally:
            limits.depth -= 1


# Filters ask for the context, so Jinja never runs one while it compiles, where nothing is counted.


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of our filters, which counts by itself."""

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        return function(context.parent[LIMITS], *args, **kwargs)

    return run


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters, counted."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    of_context = {"context": lambda c: c, "eval_context": lambda c: c.eval_ctx, "environment": lambda c: c.environment}

    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        limits = context.parent[LIMITS]
        value = list(value) if name == "join" else value
        args = estimated(limits, name, value, args, kwargs)
        first = (of_context[wanted](context),) if wanted else ()
        return limits.take(function(*first, value, *args, **kwargs))

    return run


class _Counting(NodeTransformer):
    """Counts each step of a parsed template and marks each of its own texts."""

    def __init__(self, mark: Callable[[str], str]):
        self._mark = mark

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        return nodes.Const(self._mark(node.value), lineno=node.lineno) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.TemplateData:
        return nodes.TemplateData(self._mark(node.data), lineno=node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [_filtered(child, "written") for child in node.nodes]
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.test = _filtered(node.test, "compared") if node.test else None
        step = _filtered(nodes.Const(None, lineno=node.lineno), "compared")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "made") if getattr(node, "ctx", "load") == "load" else node

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "compared")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "compared")
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Call:
        self.generic_visit(node)
        if isinstance(node.node, nodes.Getattr):  # a method; macros and functions take texts as they are
            _compare_arguments(node, node.node.attr)
        return node

    def visit_Filter(self, node: nodes.Filter | nodes.Test) -> nodes.Expr:
        self.generic_visit(node)
        _compare_arguments(node, node.name)
        if isinstance(node, nodes.Test) and node.args:
            node.node = _filtered(node.node, "compared")
        return node

    visit_Test = visit_Filter

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        if isinstance(node.arg, nodes.Const):
            node.node = self.visit(node.node)
        else:
            self.generic_visit(node)
        return node


def _compare_arguments(node: Any, name: str) -> None:
    """Compare the arguments that a method, filter or test searches; the ones that it writes stay as they are."""
    if name not in _WRITING:
        looked_for = 1 if name in ("replace", "get") else len(node.args)
        node.args[:looked_for] = [_filtered(one, "compared") for one in node.args[:looked_for]]


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
