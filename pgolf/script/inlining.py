"""Functions that are one expression, in place of their calls."""

import ast
from collections import Counter

from pgolf.script.arguments import Arguments
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
)
from pgolf.script.simplifying import is_first
from pgolf.script.trees import copied, walk

CONSUMERS = {"all", "any", "bytes", "dict", "list", "max", "min", "set", "sorted", "sum", "tuple"}


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
                sites = index.loads[name] if kinds else index.calls[f".{name}"]
                if kinds or not index.values[f".{name}"]:
                    for node, statement in sites:
                        given = () if kinds else (*node.args, *(k.value for k in node.keywords))
                        if all(map(self.pure, (node.value if kinds else node.func.value, *given))):
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
            or _takes_more(function.args)
            or (len(calls) > 1 and nodes > 6 + 2 * len(own))
            or unpacks(c for c, _ in calls)
        ):
            return {}
        if any(isinstance(n, ast.NamedExpr | ast.Yield | ast.YieldFrom | ast.Await) for n in walk(value)):
            return {}
        within = Counter()
        for each in walk(value):
            if isinstance(each, ast.Lambda | COMPREHENSIONS):
                within += reads(each)
        late = _late(value)
        free, new, quiet = set(uses) - set(own) - set(inner), {}, self.pure(value)
        for call, statement in calls:
            around = statement if isinstance(statement, ast.FunctionDef) else _method_with(statement, call)
            if around is function or (around is not None and free & set(bindings(around))):
                return {}
            given = {}
            for i, parameter in enumerate(own):
                argument = argument_of(call, parameter, i) or _constant(default_of(function.args, i))
                if argument is None or set(inner) & set(reads(argument)) or quotes(argument, value, parameter):
                    return {}
                if parameter in late and not is_constant(argument):
                    return {}
                early = is_first(value, parameter, self, argument)
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


def _takes_more(spec: ast.arguments) -> bool:
    """True of a function with parameters other than plain ones."""
    return bool(spec.vararg or spec.kwarg or spec.posonlyargs or spec.kwonlyargs)


def _constant(default: ast.expr | None) -> ast.expr | None:
    """A default that is the same wherever it is evaluated."""
    return default if is_constant(default) else None


def _late(value: ast.expr) -> Counter:
    """Names that an expression reads after its evaluation: in functions, and generators that nothing consumes yet."""
    consumed = {
        id(call.args[0])
        for call in walk(value)
        if isinstance(call, ast.Call) and len(call.args) == 1
        if getattr(call.func, "id", "") in CONSUMERS or getattr(call.func, "attr", "") == "join"
    }
    later = [n for n in walk(value) if isinstance(n, ast.Lambda | ast.GeneratorExp) and id(n) not in consumed]
    return sum(map(reads, later), Counter())


def _method_with(cls: ast.stmt, call: ast.Call) -> ast.FunctionDef | None:
    for method in getattr(cls, "body", ()):
        if isinstance(method, ast.FunctionDef) and any(node is call for node in walk(method)):
            return method
    return None
