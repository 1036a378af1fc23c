"""Short names for a whole program: its definitions, their attributes, and what functions call their own.

Names stay where they may mean something outside: attributes that others have too or that a string names, what a torch
module holds (the names of its tensors are in files), parameters that a call names, local names of definitions.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from keyword import iskeyword
from string import ascii_lowercase, ascii_uppercase, digits

from pgolf.script.program import COMPREHENSIONS, Scope, members, named, ours, scopes
from pgolf.script.trees import Transformer, walk


def renamed(body: list[ast.stmt]) -> dict[str, str]:
    """Rename in place; returns definition -> short name."""
    defined = {name for s in body if not isinstance(s, ast.Import | ast.ImportFrom) for name in (named(s) or _own(s))}
    nodes = [node for statement in body for node in walk(statement)]
    keywords = {keyword.arg for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords if keyword.arg}
    outer = [scope for statement in body for scope in scopes(statement)]
    hidden = {name for scope in outer for name in defined & _bound_inside(scope)}
    uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    taken = (
        uses.keys() | keywords | {name for s in body if isinstance(s, ast.Import | ast.ImportFrom) for name in named(s)}
    )
    short = _by_use(defined - hidden, uses, taken - (defined - hidden), _capitals())
    attributes = _attributes(nodes, body, keywords)
    for scope in outer:
        _Rename(_local_names(scope, keywords | hidden, short)).within(scope)
    rename = _Rename(short, attributes)
    for statement in body:
        rename.visit(statement)
    return short


def _own(statement: ast.stmt) -> list[str]:
    return [statement.name] if isinstance(statement, ast.ClassDef) else []


def _by_use(names: Iterable[str], uses: Counter, taken: Iterable[str], free: Iterator[str]) -> dict[str, str]:
    """Name -> short name, the shortest for the commonest."""
    taken = set(taken)
    free = (name for name in free if name not in taken and not iskeyword(name))
    return {name: next(free) for name in sorted(names, key=lambda name: (-uses[name], name))}


def _attributes(nodes: list[ast.AST], body: list[ast.stmt], keywords: set[str]) -> dict[str, str]:
    """Attributes that only our classes have -> short names."""
    used = Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    own, kept = set(), set(keywords)
    modules = {"Module"}
    for cls in (s for s in body if isinstance(s, ast.ClassDef)):
        own |= members(cls)
        if any(getattr(base, "attr", getattr(base, "id", "")) in modules for base in cls.bases):
            modules.add(cls.name)
            kept |= members(cls) - {each.name for each in cls.body if isinstance(each, ast.FunctionDef)}
    own = {name for name in (own & ours()) - kept - words if not name.endswith("_quantizer")}
    return _by_use(own, used, used.keys() | words, _lower())


def _bound(scope: Scope) -> Iterator[str]:
    """Names that a function or one inside it binds, itself not included."""
    for node in walk(scope):
        match node:
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.FunctionDef(name=name) if node is not scope:
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)


def _bound_inside(scope: Scope) -> set[str]:
    """Names that only functions and comprehensions inside a function bind."""
    own = set()
    todo = [scope]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if isinstance(child, ast.FunctionDef):
                own.add(child.name)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                own.add(child.id)
            elif isinstance(child, ast.arg):
                own.add(child.arg)
            if not isinstance(child, ast.FunctionDef | ast.Lambda | COMPREHENSIONS):
                todo.append(child)
    return set(_bound(scope)) - own


def _local_names(scope: Scope, kept: set[str], short: dict[str, str]) -> dict[str, str]:
    imported = {
        alias.asname or alias.name
        for node in walk(scope)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    uses = Counter(node.id for node in walk(scope) if isinstance(node, ast.Name))
    bound = dict.fromkeys(_bound(scope))
    own = [name for name in bound if name not in kept | imported]
    own.sort(key=lambda name: -uses[name])  # the commonest are alike in all functions
    taken = (uses.keys() | bound.keys()) - set(own)
    taken |= {short[name] for name in uses if name in short}
    return dict(zip(own, (name for name in _lower() if name not in taken and not iskeyword(name)), strict=False))


def _capitals() -> Iterator[str]:
    yield from ascii_uppercase
    yield from (first + second for first in ascii_uppercase for second in ascii_uppercase + ascii_lowercase + digits)


def _lower() -> Iterator[str]:
    """a, b, … z, aa, ab, …"""
    for length in count(1):
        yield from _words(length)


def _words(length: int) -> Iterable[str]:
    return (word + letter for word in _words(length - 1) for letter in ascii_lowercase) if length else [""]


class _Rename(Transformer):
    def __init__(self, names: dict[str, str], attributes: dict[str, str] | None = None):
        self.names, self.attributes = names, attributes or {}

    def within(self, scope: Scope) -> None:
        """Rename what a function holds; its decorators and defaults are evaluated outside."""
        spec = scope.args
        for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg):
            each and self.visit(each)
        for each in scope.body if isinstance(scope, ast.FunctionDef) else [scope.body]:
            self.visit(each)

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        node.attr = self.attributes.get(node.attr, node.attr)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Fields and methods are attributes."""
        node.name = self.names.get(node.name, node.name)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.generic_visit(statement)
                statement.name = self.attributes.get(statement.name, statement.name)
            elif value := getattr(statement, "value", None):
                statement.value = self.visit(value)
            for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
                if isinstance(target, ast.Name):
                    target.id = self.attributes.get(target.id, target.id)
        for inherited in (node.bases, node.keywords, node.decorator_list):
            inherited[:] = map(self.visit, inherited)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.Nonlocal:
        node.names = [self.names.get(name, name) for name in node.names]
        return node
