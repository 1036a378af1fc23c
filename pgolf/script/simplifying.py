"""A function's code made smaller by itself: constants decide, variables with one value go."""

import ast
import operator
from collections import Counter
from keyword import iskeyword
from typing import Any

from pgolf.script.folding import UNKNOWN, Folding
from pgolf.script.program import (
    COMPREHENSIONS,
    Replace,
    Scope,
    Substitute,
    bindings,
    is_constant,
    is_new,
    is_none,
    own_values,
    pairs_of,
    quotes,
    reads,
    reassigned,
    scan,
    scopes,
)
from pgolf.script.purity import Purity
from pgolf.script.reach import KEPT_ERRORS
from pgolf.script.trees import Transformer, copied, walk

ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.LShift: operator.lshift, ast.Pow: operator.pow,
}  # fmt: skip


class Simplify(Transformer):
    """Work out what constants decide. purity: says whether an expression may be left out."""

    def __init__(self, purity: Purity):
        self.pure = purity.pure
        self.folding = Decide()
        self.guarded = False  # inside a try with handlers, which may be there for an error of any expression

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        node = self.generic_visit(node)
        known = self.folding.value(node)
        return node if known is UNKNOWN else ast.Constant(known)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        node = self.generic_visit(node)
        negated = isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant)
        return ast.Constant(not node.operand.value) if negated else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        node = self.generic_visit(node)
        match node:
            case ast.BinOp(ast.Constant(int() | float() as a), op, ast.Constant(int() | float() as b)):
                value = _worked_out(op, a, b)
                return ast.Constant(value) if value >= 0 and len(repr(value)) <= len(ast.unparse(node)) else node
            case ast.BinOp(left, ast.BitOr(), ast.Dict(keys=[])) | ast.BinOp(ast.Dict(keys=[]), ast.BitOr(), left):
                return left if is_new(left) else node
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node = self.generic_visit(node)
        spread = [each for keyword in node.keywords for each in _spread(keyword)]
        if len({each.arg for each in spread}) == len(spread):
            node.keywords = spread
        match node:
            case ast.Call(ast.Name("getattr"), [base, ast.Constant(str(name))]) if _is_name(name):
                return ast.Attribute(base, name, ast.Load())
            case ast.Call(ast.Name("max" | "min" as name), [ast.Constant(int(a)), ast.Constant(int(b))], []):
                return ast.Constant(max(a, b) if name == "max" else min(a, b))
            case ast.Call(
                ast.Attribute(ast.Constant(str(text)), "replace"), [ast.Constant(str(a)), ast.Constant(str(b))]
            ):
                return ast.Constant(text.replace(a, b))
            case ast.Call(ast.Name("sorted"), [ast.List([]) as nothing], []):
                return nothing
            case ast.Call(ast.Name("isinstance"), [each, ast.Constant(None)]) if self.pure(each):
                return ast.Constant(False)
            case ast.Call(ast.Constant(None) | ast.Attribute(ast.Constant(None))):
                return ast.Constant(None)  # knobs leave it out, so nothing calls it
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node = self.generic_visit(node)
        match node:
            case ast.Subscript(ast.Tuple(elements), ast.Constant(int(i)), ast.Load()) if i < len(elements):
                starred = any(isinstance(each, ast.Starred) for each in elements)
                return elements[i] if not starred and all(map(self.pure, elements)) else node
        return node

    def visit_ListComp(self, node: ast.ListComp | ast.DictComp) -> ast.expr:
        """Nothing, if there is nothing to go through."""
        node = self.generic_visit(node)
        first = node.generators[0]
        for generator in node.generators:
            generator.ifs = [test for test in generator.ifs if not isinstance(test, ast.Constant) or not test.value]
        empty = isinstance(first.iter, ast.List | ast.Tuple) and not first.iter.elts
        if empty or (self.pure(first.iter) and any(isinstance(test, ast.Constant) for test in first.ifs)):
            return ast.Dict([], []) if isinstance(node, ast.DictComp) else ast.List([], ast.Load())
        return node

    visit_DictComp = visit_ListComp

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node = self.generic_visit(node)
        return node.body if self.pure(node.test) and ast.dump(node.body) == ast.dump(node.orelse) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        node, values = self.generic_visit(node), []
        for each in node.values:
            match each:
                case ast.FormattedValue(ast.Constant(value), -1, None):
                    parts = [ast.Constant(str(value))]
                case ast.FormattedValue(ast.JoinedStr(parts), -1, None):
                    pass
                case _:
                    parts = [each]
            for part in parts:
                if values and isinstance(part, ast.Constant) and isinstance(values[-1], ast.Constant):
                    part = ast.Constant(values.pop().value + part.value)
                values.append(part)
        node.values = values
        return values[0] if len(values) == 1 and isinstance(values[0], ast.Constant) else node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        node = self.generic_visit(node)
        return None if self.pure(node.value) and not self.guarded else node

    def visit_Try(self, node: ast.Try) -> ast.stmt:
        around, self.guarded = self.guarded, self.guarded or bool(node.handlers)
        for name in ("body", "handlers", "orelse", "finalbody"):
            setattr(node, name, [each for s in getattr(node, name) if (each := self.visit(s))])
            self.guarded = around
        if not node.handlers and not node.finalbody:
            node.finalbody = [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        around, self.guarded = self.guarded, False
        node = self.generic_visit(node)
        self.guarded = around
        return node

    def visit_If(self, node: ast.If) -> ast.stmt | None:
        node = self.generic_visit(node)
        node.orelse = _filled(node.orelse)
        if not _filled(node.body) and not node.orelse and self.pure(node.test) and not self.guarded:
            return None
        return node


def _worked_out(op: ast.operator, a: float, b: float) -> float:
    """The result of an operation, -1 if it is left to the script."""
    if type(op) not in ARITHMETIC or (isinstance(op, ast.Pow | ast.LShift) and b >= 64):
        return -1
    try:
        return ARITHMETIC[type(op)](a, b)
    except (ArithmeticError, TypeError, ValueError):
        return -1


def _spread(keyword: ast.keyword) -> list[ast.keyword]:
    """The arguments that `**dict(a=1)` gives."""
    match keyword:
        case ast.keyword(None, ast.Call(ast.Name("dict"), [], keywords)):
            return keywords
    return [keyword]


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text)


class Decide(Folding):
    """Leave out what constants decide against."""

    def __init__(self):
        super().__init__({}, {}, KEPT_ERRORS, literal=False)


def _filled(body: list[ast.stmt]) -> list[ast.stmt]:
    return [s for s in body if not isinstance(s, ast.Pass)]


def simplified(statement: ast.stmt, purity: Purity, known: set[str]) -> ast.stmt:
    """A definition after one round. known: names at the top that stand for one thing each."""
    for scope in scopes(statement):
        if isinstance(scope, ast.FunctionDef):
            _always_none(scope, purity)
            _variables(scope, purity, known)
            _forward(scope, purity)
    statement = Simplify(purity).visit(Decide().visit(statement))
    for node in walk(statement):
        if isinstance(
            node, ast.FunctionDef | ast.With | ast.For | ast.While | ast.If | ast.ClassDef | ast.Try | ast.ExceptHandler
        ):
            node.body = _filled(node.body) or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            last = node.body[-1]
            if len(node.body) > 1 and isinstance(last, ast.Return) and (last.value is None or is_none(last.value)):
                node.body.pop()
    return statement


def _variables(function: ast.FunctionDef, purity: Purity, known: set[str]) -> None:
    """Constants in place of variables that are bound once; variables that nothing reads go."""
    nodes, count, read, own = scan(function)
    local, pure = own_values(nodes, count), purity.pure
    read.update(
        node.target.id
        for node in nodes
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
        if node.target.id not in local or not pure(node.value)
    )
    guarded = {
        id(each)
        for node in nodes
        if isinstance(node, ast.Try) and node.handlers
        for statement in node.body
        for each in walk(statement)
    }
    place: dict[str, ast.expr] = {}
    new: dict[int, Any] = {}
    for node in nodes:
        match node:
            case ast.Assign():
                kept = []
                for left, right in (pairs := pairs_of(node)):
                    name = getattr(left, "id", "")
                    alias = isinstance(right, ast.Name) and not count[right.id] and right.id in known
                    if name and count[name] == 1 and name not in own and (is_constant(right) or alias):
                        place[name] = right
                    elif not name or read[name] or not pure(right) or id(node) in guarded:
                        kept.append((left, right))
                if len(kept) < len(pairs):
                    new[id(node)] = reassigned(node, kept)
            case ast.AugAssign(ast.Name(name)) if not read[name] and id(node) not in guarded:
                new[id(node)] = ast.Pass()
            case ast.FunctionDef(name=name) if node is not function and not read[name]:
                new[id(node)] = ast.Pass()
    if new:
        Replace(new).generic_visit(function)
    if place:
        Substitute(place).generic_visit(function)


def _always_none(function: ast.FunctionDef, purity: Purity) -> None:
    """Variables that are None as long as they are None: the branches for other values go."""
    values: dict[str, list[ast.expr]] = {}
    nodes, count, _, own = scan(function)
    for node in nodes:
        if isinstance(node, ast.Assign):
            for left, right in pairs_of(node):
                values.setdefault(getattr(left, "id", ""), []).append(right)
    for name, given in values.items():
        if name and name not in own and count[name] > 1 and any(map(is_none, given)):
            body = Substitute({name: ast.Constant(None)}).generic_visit(copied(function))
            body = Simplify(purity).visit(Decide().visit(body))
            left = [right for n in walk(body) if isinstance(n, ast.Assign) for at, right in pairs_of(n)
                    if getattr(at, "id", "") == name]  # fmt: skip
            if len(left) == bindings(body)[name] and all(map(is_none, left)):
                function.body = body.body


def _forward(outermost: ast.FunctionDef, purity: Purity) -> None:
    """A variable that is read once, first of all in the statement after its assignment, gives way to its value."""
    nodes = list(walk(outermost))
    shared = any(isinstance(node, ast.Nonlocal) for node in nodes)  # calls may change variables
    for function in nodes:
        if isinstance(function, ast.FunctionDef):
            _forward_in(function, purity, shared)


def _forward_in(function: ast.FunctionDef, purity: Purity, shared: bool) -> None:
    nodes, count, read, own = scan(function)
    within = Counter()
    for node in nodes:
        if isinstance(node, COMPREHENSIONS):
            within += reads(node) - reads(node.generators[0].iter)  # evaluated outside
        elif isinstance(node, Scope) and node is not function:
            within += reads(node)
    for node in nodes:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                i = 0
                while i + 1 < len(body):
                    match body[i]:
                        case ast.Assign([ast.Name(name)], value) if not shared or purity.pure(value):
                            slot = _first_expression(body[i + 1])
                            if slot and count[name] == read[name] == 1 and name not in own and not within[name]:
                                at, key = slot
                                place = getattr(at, key)
                                if is_first(place, name, purity, value) and not quotes(value, place, name):
                                    setattr(at, key, Substitute({name: value}).visit(place))
                                    del body[i]
                                    i = max(i - 1, 0)
                                    continue
                    i += 1


def _first_expression(statement: ast.stmt) -> tuple[ast.AST, str] | None:
    """Where the expression is that a statement evaluates first."""
    match statement:
        case ast.Return(value) | ast.Expr(value) if value:
            return statement, "value"
        case ast.Assign():
            return statement, "value"
        case ast.If():
            return statement, "test"
        case ast.For():
            return statement, "iter"
    return None


def is_first(value: ast.expr, name: str, purity: Purity, moved: ast.expr) -> bool:
    """True if the name is read so early in an expression that `moved` can take its place.

    What comes before may do nothing and, if the moved expression does something, read nothing that this can change.
    """
    if any(isinstance(each, ast.NamedExpr | ast.Yield | ast.YieldFrom | ast.Await) for each in walk(moved)):
        return False
    quiet = purity.pure(moved)  # then it need not be evaluated either
    before = purity.pure if quiet else purity.steady
    match value:
        case ast.Name(found):
            return found == name
        case ast.Lambda():
            return False
        case ast.Dict(keys, values):
            children = [each for pair in zip(keys, values, strict=True) for each in pair if each]
        case ast.IfExp(test, body, other) if quiet:
            children = [test, body, other]
        case ast.BoolOp(_, children) if quiet:
            pass
        case ast.IfExp(test):
            return is_first(test, name, purity, moved)
        case ast.BoolOp(_, [first, *_]):
            return is_first(first, name, purity, moved)
        case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
            return is_first(value.generators[0].iter, name, purity, moved)
        case ast.Compare(left, _, [right]):
            children = [left, right]
        case ast.Compare(left):
            return is_first(left, name, purity, moved)
        case ast.Call(ast.Attribute(base, method), arguments, keywords) if purity.is_method(method):
            children = [base, *arguments, *keywords]
        case _:
            children = list(ast.iter_child_nodes(value))
    for child in children:
        if any(isinstance(n, ast.Name) and n.id == name for n in walk(child)):
            return is_first(child, name, purity, moved)
        if not before(child):
            return False
    return False
