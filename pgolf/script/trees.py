"""Faster forms of ast.walk, ast.dump, copy.deepcopy and ast.NodeTransformer.

Contexts, operators and names of imports count as parts of their node: none is walked, copied or visited.
"""

import ast
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

NO_NODES = {"ctx", "op", "ops", "id", "attr", "arg", "type_comment", "kind", "type_ignores", "conversion", "names"}


class Children(dict):
    """Kind of node -> its fields that hold nodes, in the order of the text."""

    def __missing__(self, kind: type) -> tuple[str, ...]:
        return self.setdefault(kind, tuple(name for name in kind._fields if name not in NO_NODES))


CHILDREN = Children({ast.Constant: ()})


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all nodes below, in the order of the text."""
    todo = [node]
    while todo:
        node = todo.pop()
        yield node
        for name in reversed(CHILDREN[type(node)]):
            value = getattr(node, name, None)
            if type(value) is list:
                todo += [each for each in value[::-1] if hasattr(each, "_fields")]
            elif hasattr(value, "_fields"):
                todo.append(value)


def outline(node: ast.AST) -> list:
    """Equal for two trees if they are the same code, and only then."""
    found: list = []
    todo: list = [node]
    while todo:
        each = todo.pop()
        if type(each) is list:
            found.append(len(each))
            todo += each
        elif hasattr(each, "_fields"):
            found.append(type(each))
            todo += [getattr(each, name, None) for name in each._fields]
        else:
            found.append((type(each), each))
    return found


def copied(node: Any) -> Any:
    """A copy of a tree, a list of trees or anything in them, with the lines of the source."""
    kind = type(node)
    if kind is list:
        return [copied(each) for each in node]
    if not hasattr(node, "_fields"):
        return node
    new = kind.__new__(kind)  # its __init__ asks for the fields
    fields = vars(new)
    fields.update(vars(node))
    for name in CHILDREN[kind]:
        if (value := fields.get(name)) is not None:
            fields[name] = copied(value)
    return new


class Transformer:
    """Nodes in place of nodes: visit_KIND returns one, a list or None; generic_visit goes through what a node holds."""

    visitors: ClassVar[dict[type, Callable]] = {}

    def __init_subclass__(cls) -> None:
        names = [name for name in dir(cls) if name.startswith("visit_")]
        cls.visitors = {getattr(ast, name.removeprefix("visit_")): getattr(cls, name) for name in names}

    def visit(self, node: ast.AST) -> Any:
        visitor = self.visitors.get(type(node))
        return visitor(self, node) if visitor else self.generic_visit(node)

    def generic_visit(self, node: Any) -> Any:
        for name in CHILDREN[type(node)]:
            old = getattr(node, name, None)
            if type(old) is list:
                new = []
                for each in old:
                    if hasattr(each, "_fields"):
                        each = self.visit(each)
                        if type(each) is list:
                            new += each
                        elif each is not None:
                            new.append(each)
                    else:
                        new.append(each)
                old[:] = new
            elif hasattr(old, "_fields"):
                setattr(node, name, self.visit(old))
        return node
