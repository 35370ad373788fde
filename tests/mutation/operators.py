"""The rules that create faults, one function per kind of node. Each yields (first byte, byte after the last, new text).

`candidates` decides where a rule applies. Invariant: a rule changes one place, the result is still valid Python, and
the name of the rule says what it changes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from tests.mutation.faults import Source

Change = tuple[str, int, int, str]
"""Operator, first byte, byte after the last, new text."""
Rule = Callable[[Source, ast.AST], Iterator[Change]]

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: (r"\*\*", "*"),
    ast.BitOr: (r"\|", "&"),
    ast.BitAnd: ("&", "|"),
}
SWAPPED_CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}


def comparison(source: Source, node: ast.AST) -> Iterator[Change]:
    """`a < b` becomes `a <= b`, `is` becomes `is not`, and so on."""
    if isinstance(node, ast.Compare):
        for left, operation, right in zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True):
            pattern, text = COMPARISONS[type(operation)]
            yield from _between(source, left, right, pattern, text, "comparison")


def boolean(source: Source, node: ast.AST) -> Iterator[Change]:
    """`and` becomes `or` and the reverse."""
    if isinstance(node, ast.BoolOp):
        pattern, text = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values[:-1], node.values[1:], strict=True):
            yield from _between(source, left, right, pattern, text, "boolean")


def negation(source: Source, node: ast.AST) -> Iterator[Change]:
    """`not x` becomes `x`, `-x` becomes `+x`."""
    if isinstance(node, ast.UnaryOp):
        start, end = source.span(node)
        if isinstance(node.op, ast.Not):
            found = re.match(r"not\s*", source.text(start, end))
            assert found is not None
            yield "negation", start, start + len(found[0].encode()), ""
        elif isinstance(node.op, ast.USub):
            yield "negation", start, start + 1, "+"


def arithmetic(source: Source, node: ast.AST) -> Iterator[Change]:
    """`+` becomes `-`, `*` becomes `/`, `//` and `%` change too, `|` becomes `&`. The same for `+=` and similar."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _joins_text(node):
        pattern, text = ARITHMETIC[type(node.op)]
        yield from _between(source, node.left, node.right, pattern, text, "arithmetic")
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        pattern, text = ARITHMETIC[type(node.op)]
        yield from _between(source, node.target, node.value, f"{pattern}=", f"{text}=", "arithmetic")


def constant(source: Source, node: ast.AST) -> Iterator[Change]:
    """A number is increased by one or becomes 0. True becomes False and the reverse."""
    if not isinstance(node, ast.Constant):
        return
    start, end = source.span(node)
    if isinstance(node.value, bool):
        yield "constant", start, end, str(not node.value)
    elif isinstance(node.value, int | float):
        yield "constant", start, end, repr(node.value + 1)
        if node.value not in (0, -1):
            yield "constant", start, end, "0" if isinstance(node.value, int) else "0.0"


def condition(source: Source, node: ast.AST) -> Iterator[Change]:
    """The condition of an `if`, a conditional expression or a filter is always or never true. `while` is never entered.

    A loop that is always entered would not end, so it is not planted.
    """
    tests: list[ast.expr] = []
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    for test in tests:
        if not isinstance(test, ast.Constant):
            start, end = source.span(test)
            if not isinstance(node, ast.While):
                yield "condition", start, end, "True"
            yield "condition", start, end, "False"


def result(source: Source, node: ast.AST) -> Iterator[Change]:
    """`return x` becomes `return None`."""
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "result", *source.span(node), "return None"


def removed_call(source: Source, node: ast.AST) -> Iterator[Change]:
    """A call whose result is not used is removed."""
    if isinstance(node, ast.Expr):
        value = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(value, ast.Call):
            yield "removed call", *source.span(node), "pass"


def removed_raise(source: Source, node: ast.AST) -> Iterator[Change]:
    """`raise` is removed."""
    if isinstance(node, ast.Raise):
        yield "removed raise", *source.span(node), "pass"


def left_loop(source: Source, node: ast.AST) -> Iterator[Change]:
    """`continue` becomes `break`."""
    if isinstance(node, ast.Continue):
        yield "left loop", *source.span(node), "break"


def swapped_call(source: Source, node: ast.AST) -> Iterator[Change]:
    """`min` becomes `max`, `any` becomes `all`, and the reverse."""
    if isinstance(node, ast.Call):
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name in SWAPPED_CALLS:
            end = source.span(function)[1]
            yield "swapped call", end - len(name), end, SWAPPED_CALLS[name]


def bound(source: Source, node: ast.AST) -> Iterator[Change]:
    """A slice starts or ends one later. Numeric bounds belong to `constant`."""
    if isinstance(node, ast.Slice):
        for limit in (node.lower, node.upper):
            if limit is not None and not isinstance(limit, ast.Constant):
                yield "bound", *source.span(limit), f"({source.text_of(limit)}) + 1"


def text_default(source: Source, node: ast.AST) -> Iterator[Change]:
    """The default text of a parameter changes. Default numbers belong to `constant`."""
    if isinstance(node, ast.arguments):
        for default in (*node.defaults, *node.kw_defaults):
            if isinstance(default, ast.Constant) and isinstance(default.value, str):
                yield "default", *source.span(default), repr(f"{default.value}x")


RULES: tuple[Rule, ...] = (
    comparison,
    boolean,
    negation,
    arithmetic,
    constant,
    condition,
    result,
    removed_call,
    removed_raise,
    left_loop,
    swapped_call,
    bound,
    text_default,
)


def _between(
    source: Source, left: ast.expr, right: ast.expr, pattern: str, text: str, operator: str
) -> Iterator[Change]:
    """Replace the operator between two operands. Otherwise there are only parentheses, spaces and comments."""
    start, end = source.span(left)[1], source.span(right)[0]
    gap = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0].encode()), source.text(start, end))
    edge = r"\b" if pattern[0].isalpha() else ""
    found = re.search(f"{edge}{pattern}{edge}", gap)
    assert found is not None, f"{source.file}:{left.lineno}: no {pattern} in {gap!r}"
    yield operator, start + found.start(), start + found.end(), text


def _joins_text(node: ast.BinOp) -> bool:
    """Whether an operand is a text or a list, which has no other operator."""
    kinds = (ast.JoinedStr, ast.List, ast.Tuple)
    return any(
        isinstance(operand, kinds) or (isinstance(operand, ast.Constant) and isinstance(operand.value, str))
        for operand in (node.left, node.right)
    )
