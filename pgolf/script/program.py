"""What the statements of one namespace define, bind, call and read."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

from pgolf.script.parts import SOURCES, module
from pgolf.script.reach import CALLED_BY_TORCH, ScriptError
from pgolf.script.trees import Transformer, copied, walk

Scope = ast.FunctionDef | ast.Lambda
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
DISPLAYS = COMPREHENSIONS | ast.List | ast.Set | ast.Dict | ast.Tuple | ast.BinOp | ast.JoinedStr | ast.Compare
# Members of the package's classes that others have too: torch, numpy, Python's own. A test compares.
SHARED = {
    "_make", "add", "add_", "average", "backward", "barrier", "bias", "bits", "block", "bytes", "code",
    "codecs", "compile", "config", "count", "data", "dequantize", "deterministic", "device", "done", "dtype",
    "embedding", "eval", "export", "forward", "from_file", "grad", "group", "groups", "hash", "indices", "is_control",
    "kind", "load_state_dict", "local", "map", "mean", "model", "next", "norm", "offset", "parallel", "parameters",
    "parts", "perm", "place", "quantized", "roots", "round", "seconds", "seed", "seek", "shape", "size",
    "start", "state_dict", "step", "stream", "take", "text", "total", "train", "update", "used", "value", "values",
    "version", "vocab_size", "weight", "windows", "write",
}  # fmt: skip


def members(cls: ast.ClassDef) -> set[str]:
    """Methods, fields and attributes of self of a class."""
    found = {each.name for each in cls.body if isinstance(each, ast.FunctionDef)}
    found |= {name for each in cls.body if isinstance(each, ast.Assign | ast.AnnAssign) for name in stored(each)}
    return found | {n.attr for n in walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


@cache
def ours() -> frozenset[str]:
    """Attributes that only classes of the package have."""
    classes = [s for name in SOURCES for s in module(name).definitions.values() if isinstance(s, ast.ClassDef)]
    found = {name for cls in classes for name in members(cls)}
    return frozenset(name for name in found - SHARED - CALLED_BY_TORCH if not name.startswith("__"))


def named(statement: ast.stmt) -> list[str]:
    """Names that a statement at the top defines, and for whose sake alone it is there; none if it does something."""
    match statement:
        case ast.ClassDef(decorator_list=decorators) if any("dataclass" not in ast.unparse(d) for d in decorators):
            return []
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Assign([ast.Name(name)]):
            return [name]
        case ast.Assign([ast.Tuple(elements)]):
            return [e.id for e in elements]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [(alias.asname or alias.name).partition(".")[0] for alias in names]
    return []


class Facts:
    """What one statement at the top binds inside functions, calls (name or .method) and reads."""

    def __init__(self, statement: ast.stmt):
        self.calls: list[tuple[str, ast.Call]] = []
        self.names: Counter = Counter()  # names read
        self.values: Counter = Counter()  # names and .attributes read without a call
        self.loads: list[tuple[str, ast.Attribute]] = []
        self.stores: Counter = Counter()  # attributes
        self.words: set[str] = set()  # strings, and keywords of calls that copy objects
        self.qualified: Counter = Counter()  # names before a dot, classes in isinstance
        self.bound: set[str] = set()
        called: set[int] = set()
        for node in walk(statement):
            kind = type(node)
            if kind is ast.Name:
                if type(node.ctx) is ast.Load:
                    self.names[node.id] += 1
                    if id(node) not in called:
                        self.values[node.id] += 1
                else:
                    self.bound.add(node.id)
            elif kind is ast.Attribute:
                if type(node.ctx) is ast.Load:
                    self.loads.append((node.attr, node))
                    if id(node) not in called:
                        self.values[f".{node.attr}"] += 1
                else:
                    self.stores[node.attr] += 1
                if type(node.value) is ast.Name:
                    self.qualified[node.value.id] += 1
            elif kind is ast.Call:
                called.add(id(node.func))
                self._call(node)
            elif kind is ast.Constant:
                if type(node.value) is str:
                    self.words.add(node.value)
            elif kind is ast.arg:
                self.bound.add(node.arg)
            elif kind is ast.Global:
                names = ", ".join(node.names)
                raise ScriptError(
                    f"global {names}, of {statement.name}: hold it in an object; a script sets no globals"
                )
            elif (kind is ast.FunctionDef and node is not statement) or (kind is ast.ExceptHandler and node.name):
                self.bound.add(node.name)
        if isinstance(statement, ast.ClassDef):
            self.bound -= {s.name for s in statement.body if isinstance(s, ast.FunctionDef)}
            self.bound -= {
                name for s in statement.body if isinstance(s, ast.Assign | ast.AnnAssign) for name in stored(s)
            }
        elif isinstance(statement, ast.Assign):
            self.bound -= stored(statement)

    def _call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        self.calls.append((f".{name}" if isinstance(node.func, ast.Attribute) else name, node))
        if name in ("replace", "with_knobs"):
            self.words |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if name == "isinstance" and isinstance(node.args[1], ast.Name):
            self.qualified[node.args[1].id] += 1


def stored(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {n.id for t in targets for n in walk(t) if isinstance(n, ast.Name)}


class Index:
    """The facts of all statements, by name; where: the statement that a call or read stands in."""

    def __init__(self, body: list[ast.stmt], known: dict[int, Facts]):
        self.functions = {s.name: s for s in body if isinstance(s, ast.FunctionDef)}
        self.classes = {s.name: s for s in body if isinstance(s, ast.ClassDef)}
        self.owners: dict[str, list[ast.ClassDef]] = defaultdict(list)  # method -> classes
        self.fields: Counter = Counter()  # fields and constants of classes
        for cls in self.classes.values():
            for each in cls.body:
                if isinstance(each, ast.FunctionDef):
                    self.owners[each.name].append(cls)
                elif isinstance(each, ast.AnnAssign | ast.Assign):
                    self.fields.update(stored(each))
        self.calls: dict[str, list[tuple[ast.Call, ast.stmt]]] = defaultdict(list)
        self.loads: dict[str, list[tuple[ast.Attribute, ast.stmt]]] = defaultdict(list)
        self.names, self.values, self.stores, self.qualified = Counter(), Counter(), Counter(), Counter()
        self.words, self.bound = set(), set()
        for statement in body:
            facts = known.get(id(statement)) or known.setdefault(id(statement), Facts(statement))
            for name, call in facts.calls:
                self.calls[name].append((call, statement))
            for name, load in facts.loads:
                self.loads[name].append((load, statement))
            for own, all_ in ((facts.names, self.names), (facts.values, self.values), (facts.stores, self.stores),
                              (facts.qualified, self.qualified)):  # fmt: skip
                for name, count in own.items():
                    all_[name] += count
            self.words |= facts.words
            self.bound |= facts.bound


def is_constant(node: ast.AST | None) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(is_constant, node.elts))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def scan(scope: ast.AST) -> tuple[list[ast.AST], Counter, Counter, set[str]]:
    """All nodes; how often each name is bound, functions inside included; how often it is read; the parameters."""
    nodes, bound, read, parameters = list(walk(scope)), Counter(), Counter(), set()
    for node in nodes:
        kind = type(node)
        if kind is ast.Name:
            (read if type(node.ctx) is ast.Load else bound)[node.id] += 1
        elif kind is ast.arg:
            bound[node.arg] += 1
            parameters.add(node.arg)
        elif (kind is ast.FunctionDef and node is not scope) or (kind is ast.ExceptHandler and node.name):
            bound[node.name] += 1
        elif kind in (ast.Import, ast.ImportFrom):
            bound.update(alias.asname or alias.name for alias in node.names)
        elif kind is ast.Nonlocal:
            bound.update(node.names)
    return nodes, bound, read, parameters


def bindings(scope: ast.AST) -> Counter:
    """How often each name is bound."""
    return scan(scope)[1]


def reads(node: ast.AST) -> Counter:
    """How often each name is read."""
    return scan(node)[2]


def pairs_of(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment with their values; none of `a = b = value`."""
    if len(node.targets) != 1:
        return []
    target, value = node.targets[0], node.value
    left, right = (each.elts if isinstance(each, ast.Tuple) else [] for each in (target, value))
    if left and len(left) == len(right) and not any(isinstance(each, ast.Starred) for each in left + right):
        return list(zip(left, right, strict=True))
    return [(target, value)]


def reassigned(node: ast.Assign, pairs: list[tuple[ast.expr, ast.expr]]) -> ast.stmt:
    """The assignment of these pairs alone."""
    if not pairs:
        return ast.Pass()
    if len(pairs) == 1:
        return ast.copy_location(ast.Assign([pairs[0][0]], pairs[0][1]), node)
    left, right = (list(each) for each in zip(*pairs, strict=True))
    return ast.copy_location(ast.Assign([ast.Tuple(left, ast.Store())], ast.Tuple(right, ast.Load())), node)


def is_new(value: ast.expr) -> bool:
    """True if an expression's value is an object that nothing else holds, or one that never changes."""
    return isinstance(value, DISPLAYS) or is_constant(value)


def own_values(nodes: list[ast.AST], bound: Counter) -> set[str]:
    """Variables whose `x += y` changes no object that something else may hold."""
    made = Counter()
    for node in nodes:
        if isinstance(node, ast.Assign):
            made.update(left.id for left, right in pairs_of(node) if isinstance(left, ast.Name) and is_new(right))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            made[node.target.id] += 1
    return {name for name in made if made[name] == bound[name]}


def quotes(value: ast.expr, place: ast.AST, name: str) -> bool:
    """True if a value with strings would get into an f-string; Python 3.12 and later quote such otherwise."""
    if not any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in walk(value)):
        return False
    return any(isinstance(n, ast.JoinedStr) and reads(n)[name] for n in walk(place))


def scopes(node: ast.AST) -> list[Scope]:
    """The outermost functions in a definition, methods included."""
    if isinstance(node, Scope):
        return [node]
    return [scope for child in ast.iter_child_nodes(node) for scope in scopes(child)]


def argument_of(call: ast.Call, name: str, position: int) -> ast.expr | None:
    """The argument of a call for a parameter, by position (without self) or name."""
    if position < len(call.args):
        return call.args[position]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def drop_argument(call: ast.Call, name: str, position: int) -> None:
    if position < len(call.args):
        del call.args[position]
    call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]


def unpacks(calls: Iterable[ast.Call]) -> bool:
    """True if a call has *arguments or **arguments."""
    return any(isinstance(a, ast.Starred) for c in calls for a in c.args) or any(
        keyword.arg is None for c in calls for keyword in c.keywords
    )


def default_of(spec: ast.arguments, index: int) -> ast.expr | None:
    first = len(spec.args) - len(spec.defaults)
    return spec.defaults[index - first] if index >= first else None


class Substitute(Transformer):
    """Put expressions in place of names that are read."""

    def __init__(self, names: dict[str, ast.expr]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.names:
            return copied(self.names[node.id])
        return node


class Replace(Transformer):
    """Put new nodes in place of nodes, by id."""

    def __init__(self, new: dict[int, Any]):
        self.new = new

    def visit(self, node: ast.AST) -> Any:
        return self.new[id(node)] if id(node) in self.new else self.generic_visit(node)
