"""Functions that are one expression, in place of their calls."""

import ast
from collections import Counter

from pgolf.script.arguments import Arguments
from pgolf.script.parts import copied
from pgolf.script.program import (
    COMPREHENSIONS,
    Replace,
    Substitute,
    argument_of,
    bindings,
    default_of,
    is_constant,
    ours,
    quotes,
    reads,
    unpacks,
    walk,
)
from pgolf.script.simplifying import is_first


class Inlining(Arguments):
    """Calls, and what stands in their place."""

    def inline(self) -> None:
        """Functions that are one expression take the place of their calls, if they are short or called once."""
        index, new, changed = self.index, {}, {}
        for name, function in index.functions.items():
            if name in index.bound or index.values[name] or function.decorator_list or name == self.entry:
                continue
            value = _expression(function)
            if value is not None:
                made = self._inlined(name, function, value)
                new |= made
                changed |= {id(s): s for call, s in index.calls[name] if id(call) in made}
        for name, owners in index.owners.items():
            if len(owners) == 1 and name in ours() and name not in index.fields and not index.stores[name]:
                method = next(m for m in owners[0].body if getattr(m, "name", "") == name)
                value = _expression(method)
                kinds = {ast.unparse(d) for d in method.decorator_list}
                if value is None or not is_constant(value) or kinds - {"property"}:
                    continue
                sites = index.loads[name] if kinds else index.calls[name]
                if kinds or not index.values[f".{name}"]:
                    for node, statement in sites:
                        if kinds or all(map(self.pure, (*node.args, *(k.value for k in node.keywords)))):
                            new[id(node)] = copied(value)
                            changed[id(statement)] = statement
        for i, statement in enumerate(self.body):
            if id(statement) in changed:
                self.touch(statement)
                self.body[i] = Replace(new).visit(statement)

    def _inlined(self, name: str, function: ast.FunctionDef, value: ast.expr) -> dict[int, ast.expr]:
        """What stands in place of the calls of a function, all or none."""
        own, calls = [a.arg for a in function.args.args], self.index.calls[name]
        uses, inner = Counter(n.id for n in walk(value) if isinstance(n, ast.Name)), bindings(value)
        nodes = sum(1 for _ in walk(value))
        if (
            uses[name]
            or function.args.vararg
            or (len(calls) > 1 and nodes > 6 + 2 * len(own))
            or unpacks(c for c, _ in calls)
        ):
            return {}
        if any(isinstance(n, ast.NamedExpr | ast.Yield) for n in walk(value)):
            return {}
        within = Counter()
        for each in walk(value):
            if isinstance(each, ast.Lambda | COMPREHENSIONS):
                within += reads(each)
        free, new, quiet = set(uses) - set(own) - set(inner), {}, self.pure(value)
        for call, statement in calls:
            around = statement if isinstance(statement, ast.FunctionDef) else _method_with(statement, call)
            if around is function or (around is not None and free & set(bindings(around))):
                return {}
            given = {}
            for i, parameter in enumerate(own):
                argument = argument_of(call, parameter, i) or default_of(function.args, i)
                if argument is None or set(inner) & set(reads(argument)) or quotes(argument, value, parameter):
                    return {}
                early = is_first(value, parameter, self.pure)
                once = uses[parameter] <= 1 and not within[parameter]
                plain = isinstance(argument, ast.Attribute) and isinstance(argument.value, ast.Name) and quiet
                movable = once and self.pure(argument) and (early or quiet or not uses[parameter])
                if not (isinstance(argument, ast.Name) or is_constant(argument) or plain or movable or
                        (uses[parameter] == 1 and len(own) == 1 and early)):  # fmt: skip
                    return {}
                given[parameter] = argument
            new[id(call)] = Substitute(given).visit(copied(value))
        return new


def _expression(function: ast.FunctionDef) -> ast.expr | None:
    """The expression that a function is."""
    match function.body:
        case [ast.Return(ast.expr() as value)]:
            return value
        case [ast.Pass()]:
            return ast.Constant(None)
    return None


def _method_with(cls: ast.stmt, call: ast.Call) -> ast.FunctionDef | None:
    for method in getattr(cls, "body", ()):
        if isinstance(method, ast.FunctionDef) and any(node is call for node in walk(method)):
            return method
    return None
