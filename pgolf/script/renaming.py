"""Short names for the packed script: definitions of the package, and what functions call their own.

Names stay where they may mean something outside: attributes, parameters that any call names, whatever is bound in a
function and at the top of a module alike. A definition has the same short name in every script.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from keyword import iskeyword
from string import ascii_lowercase, ascii_uppercase, digits

from pgolf.script.parts import SOURCES, module

FIRST, NEXT = ascii_uppercase, ascii_uppercase + ascii_lowercase + digits
Scope = ast.FunctionDef | ast.Lambda


@dataclass(frozen=True)
class Tables:
    """short: definition -> its short name. named: names that stay: keywords of calls, ambiguous definitions."""

    short: dict[str, str]
    named: frozenset[str]


@cache
def tables(outside: tuple[str, ...] = ()) -> Tables:
    """Tables for the package and for modules outside it, such as a user's quantizer."""
    defined, bound, external, calls, callable_names = set(), set(), set(), [], {"partial"}
    for name in [*SOURCES, *outside]:
        found = module(name)
        external |= found.external.keys()
        for own, statement in found.definitions.items():
            defined |= {own} if name in SOURCES and not own.startswith("*") else set()
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    calls.append(node)
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    callable_names.add(node.name)
            for scope in _scopes(statement):
                bound |= set(_bound(scope))
    own = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) in callable_names]
    keywords = {keyword.arg for call in own for keyword in call.keywords if keyword.arg}
    named = frozenset(keywords | (bound & defined))
    names = (first + second for first in FIRST for second in NEXT)
    free = (name for name in names if name not in external | defined | bound)
    return Tables({name: next(free) for name in sorted(defined - named)}, named)


def renamed(statement: ast.stmt, known: Tables, method: bool = False) -> ast.stmt:
    """A definition with short names, in place; a method keeps its own."""
    for scope in _scopes(statement):
        _Rename(_local_names(scope, known)).generic_visit(scope)
    rename = _Rename(known.short)
    return rename.generic_visit(statement) if method else rename.visit(statement)


def _scopes(node: ast.AST) -> Iterator[Scope]:
    """The outermost functions in a definition, methods included."""
    for child in [node] if isinstance(node, Scope) else ast.iter_child_nodes(node):
        if isinstance(child, Scope):
            yield child
        else:
            yield from _scopes(child)


def _bound(scope: Scope) -> Iterator[str]:
    """Names that a function or one inside it binds, itself not included."""
    for node in ast.walk(scope):
        match node:
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.FunctionDef(name=name) if node is not scope:
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)


def _local_names(scope: Scope, known: Tables) -> dict[str, str]:
    read = {node.id for node in ast.walk(scope) if isinstance(node, ast.Name)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(scope)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    uses = Counter(node.id for node in ast.walk(scope) if isinstance(node, ast.Name))
    own = [name for name in dict.fromkeys(_bound(scope)) if name not in known.named | imported | known.short.keys()]
    own.sort(key=lambda name: -uses[name])  # the commonest are alike in all functions
    taken = (read | set(_bound(scope)) | known.named) - set(own)
    return dict(zip(own, (name for name in _letters() if name not in taken), strict=False))


def _letters() -> Iterator[str]:
    """a, b, … z, aa, ab, … without keywords."""
    for length in count(1):
        yield from (name for name in _words(length) if not iskeyword(name))


def _words(length: int) -> Iterable[str]:
    return (word + letter for word in _words(length - 1) for letter in ascii_lowercase) if length else [""]


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Fields and methods are attributes, which keep their names."""
        node.name = self.names.get(node.name, node.name)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.generic_visit(statement)
            elif value := getattr(statement, "value", None):
                statement.value = self.visit(value)
        for inherited in (node.bases, node.keywords, node.decorator_list):
            inherited[:] = map(self.visit, inherited)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.Nonlocal:
        node.names = [self.names.get(name, name) for name in node.names]
        return node
