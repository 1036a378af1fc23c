"""Branches that a run's knobs decide: the other side of each is left out of its script.

Knobs are read as attributes of a name or attribute `config`, or of `c`. Tests are decided and, in a packed script,
values stand in place of reads.
"""

import ast
import operator
from collections.abc import Collection, Mapping
from typing import Any

from pgolf.script.trees import Transformer

UNKNOWN = object()
COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
LITERALS = (bool, int, float, str)
GROUP_PROPERTIES = ("model", "data", "train", "regularizer", "export", "eval")
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Folding(Transformer):
    """Decide tests by knobs: name -> value. names: variable -> the values that it may have.

    kept_errors: an `if` or `except` that only raises another error is left out. literal: put values in
    place of reads of knobs too. absent: attributes of self that are None. in_config: self is the config.
    """

    def __init__(
        self, knobs: Mapping[str, Any], names: Mapping[str, tuple], kept_errors: Collection[str], literal: bool
    ):
        self.knobs, self.names, self.kept_errors, self.literal = knobs, names, kept_errors, literal
        self.absent: set[str] = set()
        self.in_config = False
        self.loops = 0  # around the node that is visited
        self.function: ast.FunctionDef | None = None  # the outermost one around

    def value(self, node: ast.expr) -> Any:
        """The constant that an expression is, or UNKNOWN."""
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name) if len(self.names.get(name, ())) == 1:
                return self.names[name][0]
            case ast.Attribute(ast.Name("self"), name) if name in self.absent:
                return None
            case ast.Attribute(ast.Name(base) | ast.Attribute(attr=base), name) if f"{base}.{name}" in self.names:
                return self.names[f"{base}.{name}"][0]
            case ast.Attribute(base, name):
                while isinstance(base, ast.Attribute) and base.attr in GROUP_PROPERTIES:
                    base = base.value
                own = ("config", "c", "self") if self.in_config else ("config", "c")
                is_config = isinstance(base, ast.Name) and base.id in own
                is_config |= isinstance(base, ast.Attribute) and base.attr == "config"
                return self.knobs.get(name, UNKNOWN) if is_config else UNKNOWN
            case ast.Tuple(elements):
                values = [self.value(element) for element in elements]
                return UNKNOWN if UNKNOWN in values else tuple(values)
            case ast.UnaryOp(ast.Not(), operand):
                known = self.truth(operand)
                return known if known is UNKNOWN else not known
            case ast.Compare(ast.Name(name), [comparison], [right]) if len(self.names.get(name, ())) > 1:
                if (other := self.value(right)) is UNKNOWN:
                    return UNKNOWN
                known = {_compared(comparison, each, other) for each in self.names[name]}
                return known.pop() if len(known) == 1 else UNKNOWN
            case ast.Compare(left, [comparison], [right]) if type(comparison) in COMPARISONS:
                values = self.value(left), self.value(right)
                return UNKNOWN if UNKNOWN in values else _compared(comparison, *values)
            case ast.BoolOp():
                return self.truth(node)
        return UNKNOWN

    def truth(self, test: ast.expr) -> Any:
        """True or False if knobs decide a test, else UNKNOWN."""
        if not isinstance(test, ast.BoolOp):
            known = self.value(test)
            return known if known is UNKNOWN else bool(known)
        truths, deciding = [self.truth(value) for value in test.values], isinstance(test.op, ast.Or)
        if deciding in [known for known in truths if known is not UNKNOWN]:
            return deciding
        return UNKNOWN if UNKNOWN in truths else not deciding

    def test(self, test: ast.expr) -> ast.expr:
        """A test without the operands that knobs decide."""
        if isinstance(test, ast.BoolOp):
            test.values = [self.test(value) for value in test.values if self.truth(value) is UNKNOWN] or test.values
            return test.values[0] if len(test.values) == 1 else test
        return test

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """Drop leading operands that do not decide the value; end at one that does."""
        deciding = isinstance(node.op, ast.Or)
        while len(node.values) > 1 and (known := self.truth(node.values[0])) is not UNKNOWN:
            node.values = node.values[:1] if known == deciding else node.values[1:]
        return self.generic_visit(node) if len(node.values) > 1 else self.visit(node.values[0])

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if self.literal and isinstance(known := self.value(node), LITERALS):
            return ast.Constant(known)
        if self.literal and node.attr in GROUP_PROPERTIES and "config" in vars(node.value).values():
            return self.generic_visit(node.value)  # every group of knobs is the config
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        known = self.truth(node.test)
        if known is UNKNOWN:
            node.test = self.test(node.test)
            return self.generic_visit(node)
        return self.visit(node.body if known else node.orelse)

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt] | None:
        if not node.orelse and self._only_raises(node.body) and not self.loops:  # it may be a loop's only exit
            assigned = {each.target.id for each in ast.walk(node.test) if isinstance(each, ast.NamedExpr)}
            if not assigned & self._read_outside(node):
                return None
        known = self.truth(node.test)
        if known is UNKNOWN:
            node.test = self.test(node.test)
            node = self.generic_visit(node)
            node.body, node.orelse = reachable(node.body), reachable(node.orelse, empty=True)
            return node
        return [s for each in (node.body if known else node.orelse) for s in _listed(self.visit(each))]

    def visit_Try(self, node: ast.Try) -> ast.stmt | list[ast.stmt]:
        node = self.generic_visit(node)
        node.handlers = [handler for handler in node.handlers if not self._only_raises(handler.body)]
        if not node.handlers and not node.finalbody and not node.orelse:
            return node.body
        node.body = reachable(node.body)
        return node

    def _only_raises(self, body: list[ast.stmt]) -> bool:
        """True if the body only assigns and then raises an error outside kept_errors."""
        *before, last = body or [None]
        if not isinstance(last, ast.Raise) or last.exc is None or not all(isinstance(s, ast.Assign) for s in before):
            return False
        error = last.exc
        while isinstance(error, ast.Call | ast.Attribute):
            error = error.func if isinstance(error, ast.Call) else error.value
        return isinstance(error, ast.Name) and error.id not in self.kept_errors

    def _read_outside(self, branch: ast.If) -> set[str]:
        """Names that the function around a branch reads outside of it."""
        inside = {id(node) for node in ast.walk(branch)}
        nodes = ast.walk(self.function) if self.function else ()
        return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in inside}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        around, self.function = self.function, self.function or node
        node = self.generic_visit(node)
        node.body, self.function = reachable(node.body), around
        return node

    def visit_With(self, node: ast.With | ast.For | ast.While) -> ast.stmt:
        node = self.generic_visit(node)
        node.body = reachable(node.body)
        return node

    def visit_While(self, node: ast.While) -> ast.stmt:
        self.loops += 1
        node = self.visit_With(node)
        self.loops -= 1
        return node

    visit_For = visit_With


def _compared(comparison: ast.cmpop, left: Any, right: Any) -> Any:
    """What a comparison gives, UNKNOWN if it fails; the script fails there too."""
    try:
        return COMPARISONS[type(comparison)](left, right)
    except TypeError:
        return UNKNOWN


def _listed(statements: ast.stmt | list[ast.stmt] | None) -> list[ast.stmt]:
    return statements if isinstance(statements, list) else [statements] if statements else []


def reachable(body: list[ast.stmt], empty: bool = False) -> list[ast.stmt]:
    """Statements up to the first that ends the block; `pass` if none is left, unless it may be empty."""
    for i, statement in enumerate(body):
        if isinstance(statement, ENDS):
            return body[: i + 1]
    return body or ([] if empty else [ast.Pass()])
