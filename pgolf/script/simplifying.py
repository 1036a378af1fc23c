"""A function's code made smaller by itself: constants decide, variables with one value go."""

import ast
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from pgolf.script.folding import UNKNOWN, Folding
from pgolf.script.parts import copied
from pgolf.script.program import (
    COMPREHENSIONS,
    Replace,
    Scope,
    Substitute,
    bindings,
    is_constant,
    is_none,
    quotes,
    reads,
    scan,
    scopes,
    walk,
)
from pgolf.script.reach import KEPT_ERRORS

ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.LShift: operator.lshift, ast.Pow: operator.pow,
}  # fmt: skip
Pure = Callable[[ast.AST | None], bool]


class Simplify(ast.NodeTransformer):
    """Work out what constants decide. pure: whether an expression may be left out."""

    def __init__(self, pure: Pure):
        self.pure = pure
        self.folding = Decide()

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
                if type(op) in ARITHMETIC:
                    value = ARITHMETIC[type(op)](a, b)
                    return ast.Constant(value) if value >= 0 and len(repr(value)) <= len(ast.unparse(node)) else node
            case ast.BinOp(left, ast.BitOr(), ast.Dict(keys=[])) | ast.BinOp(ast.Dict(keys=[]), ast.BitOr(), left):
                return left
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node = self.generic_visit(node)
        match node:
            case ast.Call(ast.Name("getattr"), [base, ast.Constant(str(name))]):
                return ast.Attribute(base, name, ast.Load())
            case ast.Call(ast.Name("max" | "min" as name), [ast.Constant(int(a)), ast.Constant(int(b))]):
                return ast.Constant(max(a, b) if name == "max" else min(a, b))
            case ast.Call(ast.Attribute(ast.Constant(str(text)), "replace"), [ast.Constant(a), ast.Constant(b)]):
                return ast.Constant(text.replace(a, b))
            case ast.Call(ast.Name("sorted"), [ast.List([]) as nothing], []):
                return nothing
            case ast.Call(ast.Name("isinstance"), [_, ast.Constant(None)]):
                return ast.Constant(False)
            case ast.Call(ast.Constant(None) | ast.Attribute(ast.Constant(None))):
                return ast.Constant(None)  # what the knobs leave out is not called
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node = self.generic_visit(node)
        match node:
            case ast.Subscript(ast.Tuple(elements), ast.Constant(int(i)), ast.Load()) if all(map(self.pure, elements)):
                return elements[i]
        return node

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp) -> ast.expr:
        """Nothing, if there is nothing to go through."""
        node = self.generic_visit(node)
        first = node.generators[0]
        for generator in node.generators:
            generator.ifs = [test for test in generator.ifs if not isinstance(test, ast.Constant) or not test.value]
        empty = isinstance(first.iter, ast.List | ast.Tuple) and not first.iter.elts
        if empty or (self.pure(first.iter) and any(isinstance(test, ast.Constant) for test in first.ifs)):
            return ast.Dict([], []) if isinstance(node, ast.DictComp) else ast.List([], ast.Load())
        return node

    visit_SetComp = visit_DictComp = visit_ListComp

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
        return None if self.pure(node.value) else node

    def visit_If(self, node: ast.If) -> ast.stmt | None:
        node = self.generic_visit(node)
        node.orelse = _filled(node.orelse)
        if not _filled(node.body) and not node.orelse and self.pure(node.test):
            return None
        return node


class Decide(Folding):
    """Leave out what constants decide against."""

    def __init__(self):
        super().__init__({}, {}, KEPT_ERRORS, literal=False)


def _filled(body: list[ast.stmt]) -> list[ast.stmt]:
    return [s for s in body if not isinstance(s, ast.Pass)]


def simplified(statement: ast.stmt, pure: Pure, known: set[str]) -> ast.stmt:
    """A definition after one round. known: names at the top that stand for one thing each."""
    for scope in scopes(statement):
        if isinstance(scope, ast.FunctionDef):
            _always_none(scope, pure)
            _variables(scope, pure, known)
            _forward(scope, pure)
    statement = Simplify(pure).visit(Decide().visit(statement))
    for node in walk(statement):
        if isinstance(node, ast.FunctionDef | ast.With | ast.For | ast.While | ast.If | ast.ClassDef | ast.Try):
            node.body = _filled(node.body) or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            last = node.body[-1]
            if len(node.body) > 1 and isinstance(last, ast.Return) and (last.value is None or is_none(last.value)):
                node.body.pop()
    return statement


def pairs_of(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment with their values."""
    target, value = node.targets[0], node.value
    starred = any(isinstance(e, ast.Starred) for each in (target, value) for e in getattr(each, "elts", ()))
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and not starred:
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)] if len(node.targets) == 1 else []


def reassigned(node: ast.Assign, pairs: list[tuple[ast.expr, ast.expr]]) -> ast.stmt:
    """The assignment of these pairs alone."""
    if not pairs:
        return ast.Pass()
    if len(pairs) == 1:
        return ast.copy_location(ast.Assign([pairs[0][0]], pairs[0][1]), node)
    left, right = (list(each) for each in zip(*pairs, strict=True))
    return ast.copy_location(ast.Assign([ast.Tuple(left, ast.Store())], ast.Tuple(right, ast.Load())), node)


def _variables(function: ast.FunctionDef, pure: Pure, known: set[str]) -> None:
    """Constants in place of variables that are bound once; variables that nothing reads go."""
    nodes, count, read, own = scan(function)
    read.update(
        node.target.id
        for node in nodes
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
        if node.target.id in own or not pure(node.value)
    )
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
                    elif not name or read[name] or not pure(right):
                        kept.append((left, right))
                if len(kept) < len(pairs):
                    new[id(node)] = reassigned(node, kept)
            case ast.AugAssign(ast.Name(name), _, value) if not read[name] and pure(value):
                new[id(node)] = ast.Pass()
            case ast.FunctionDef(name=name) if node is not function and not read[name]:
                new[id(node)] = ast.Pass()
    if new:
        Replace(new).generic_visit(function)
    if place:
        Substitute(place).generic_visit(function)


def _always_none(function: ast.FunctionDef, pure: Pure) -> None:
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
            try:
                body = Simplify(pure).visit(Decide().visit(body))
            except TypeError:  # None does not fit where a value is compared
                continue
            left = [right for n in walk(body) if isinstance(n, ast.Assign) for at, right in pairs_of(n)
                    if getattr(at, "id", "") == name]  # fmt: skip
            if len(left) == bindings(body)[name] and all(map(is_none, left)):
                function.body = body.body


def _forward(function: ast.FunctionDef, pure: Pure) -> None:
    """A variable that is read once, first of all in the statement after its assignment, gives way to its value."""
    nodes, count, read, own = scan(function)
    within = Counter()
    for node in nodes:
        if isinstance(node, Scope | COMPREHENSIONS) and node is not function:
            within += reads(node)
    for node in nodes:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                i = 0
                while i + 1 < len(body):
                    match body[i]:
                        case ast.Assign([ast.Name(name)], value):
                            slot = _first_expression(body[i + 1])
                            if slot and count[name] == read[name] == 1 and name not in own and not within[name]:
                                at, key = slot
                                place = getattr(at, key)
                                if is_first(place, name, pure) and not quotes(value, place, name):
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


def is_first(value: ast.expr, name: str, pure: Pure) -> bool:
    """True if the name is read, and before anything that others may notice."""
    match value:
        case ast.Name(found):
            return found == name
        case ast.Lambda() | ast.Dict() | ast.FunctionDef():
            return False
        case ast.IfExp(test):
            return is_first(test, name, pure)
        case ast.BoolOp(_, [first, *_]):
            return is_first(first, name, pure)
        case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
            return is_first(value.generators[0].iter, name, pure) and not isinstance(value, ast.GeneratorExp)
        case ast.Compare(left, _, [right]):
            children = [left, right]
        case ast.Compare(left):
            return is_first(left, name, pure)
        case _:
            children = list(ast.iter_child_nodes(value))
    for child in children:
        if any(isinstance(n, ast.Name) and n.id == name for n in walk(child)):
            return is_first(child, name, pure)
        if not pure(child):
            return False
    return False
