"""A whole program made smaller: what one value decides everywhere is put in its place, and what nothing reads goes.

The program is the definitions of a packed script, which are one namespace. Until nothing changes: parameters, fields
and attributes that are one constant give way to it; arguments that nothing reads go; functions that are one expression
stand where they are called; definitions and methods without a reader go. Methods and attributes are known by their
names, so each counts only if nothing outside the program has one of that name.
"""

import ast

from pgolf.script.inlining import Inlining
from pgolf.script.program import Facts, Index, Substitute, named
from pgolf.script.reach import CALLED_BY_TORCH
from pgolf.script.simplifying import simplified
from pgolf.script.trees import outline

ROUNDS = 12


def shrunk(body: list[ast.stmt], entry: str) -> list[ast.stmt]:
    """The definitions of a program that starts at `entry`, smaller. Its nodes are changed."""
    program = Program(body, entry)
    for _ in range(ROUNDS):
        if not program.round():
            break
    return program.body


class Program(Inlining):
    """The steps that look at all definitions, and their order."""

    def __init__(self, body: list[ast.stmt], entry: str):
        super().__init__(body, entry)
        self._own_classes()

    def round(self) -> bool:
        """Every step once; returns whether anything changed."""
        self._constants()
        touched, self.touched = self.touched, set()
        names = {name for s in self.body for name in named(s)}
        for i, statement in enumerate(self.body):
            if id(statement) in touched and not isinstance(statement, ast.Import | ast.ImportFrom):
                before = outline(statement)
                self.body[i] = statement = simplified(statement, self, names)
                if outline(statement) != before:
                    self.touch(statement)
                self.known.pop(id(statement), None)
        self.index = Index(self.body, self.known)
        self.find_pure()
        self.arguments()
        self.attributes()
        self.inline()
        self._sweep()
        return bool(self.touched)

    def _own_classes(self) -> None:
        """A class method of a class without subclasses names it."""
        classes = [s for s in self.body if isinstance(s, ast.ClassDef)]
        based = {getattr(base, "id", "") for cls in classes for base in cls.bases}
        for cls in classes:
            for method in cls.body:
                kinds = [getattr(each, "id", "") for each in getattr(method, "decorator_list", ())]
                if cls.name not in based and "classmethod" in kinds:
                    own = method.args.args[0].arg
                    Substitute({own: ast.Name(cls.name, ast.Load())}).generic_visit(method)

    def _constants(self) -> None:
        """Names at the top that are short constants."""
        self.index = index = Index(self.body, self.known)
        place = {}
        for statement in self.body:
            match statement:
                case ast.Assign([ast.Name(name)], ast.Constant(value) as constant) if name not in index.bound:
                    if isinstance(value, int | float | str | None) and len(repr(value)) < 12:
                        place[name] = constant
        for i, statement in enumerate(self.body):
            facts = self.known[id(statement)]
            if place.keys() & facts.names.keys():
                self.touch(statement)
                self.body[i] = Substitute(place).visit(statement)

    def _sweep(self) -> None:
        """Definitions, methods and constants of classes without a reader go."""
        index = Index(self.body, self.known)
        for cls in index.classes.values():
            kept = []
            for each in cls.body:
                match each:
                    case ast.FunctionDef(name=name) if not name.startswith("__") and name not in CALLED_BY_TORCH:
                        if not index.loads[name] and name not in index.words:
                            continue
                    case ast.FunctionDef(name="__post_init__", body=[ast.Pass()]):
                        continue
                    case ast.Assign([ast.Name(name)]) if not index.loads[name] and name not in index.words:
                        continue
                kept.append(each)
            if len(kept) < len(cls.body):
                cls.body = kept or [ast.Pass()]
                self.touch(cls)
        self.known = {id(s): self.known.get(id(s)) or Facts(s) for s in self.body}
        by_name = {name: s for s in self.body for name in named(s)}
        todo = [s for s in self.body if not named(s) or self.entry in named(s)]
        done: set[int] = set()
        while todo:
            statement = todo.pop()
            if id(statement) not in done:
                done.add(id(statement))
                todo += [by_name[name] for name in self.known[id(statement)].names if name in by_name]
        self.body = [s for s in self.body if id(s) in done]
