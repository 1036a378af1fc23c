"""What can be left out of a program without a difference: expressions that only compute a value."""

import ast

from pgolf.script.program import Facts, Index, is_constant, named, own_values, scan
from pgolf.script.trees import walk

NAMES = {
    "len", "tuple", "list", "dict", "set", "sorted", "range", "min", "max", "int", "float", "bool", "str", "bytes",
    "zip", "getattr", "isinstance", "enumerate", "sum", "map", "any", "all", "partial", "Path",
    "super",
}  # fmt: skip
METHODS = {
    "size", "numel", "items", "keys", "values", "parameters", "get", "detach", "float", "fromkeys", "dim", "prod",
    "element_size", "named_parameters", "device", "empty", "zeros", "perf_counter", "process_time", "removeprefix",
    "startswith", "unpack", "is_file", "stat", "partition", "pack", "to_bytes", "join",
    "get_rng_state", "version", "arrays",
}  # fmt: skip
# Functions and methods of arrays that may write into a further argument, with the most arguments they only read.
READING = {"rint": 1, "log2": 1, "maximum": 2, "clip": 2, "max": 1, "arange": 3, "ones": 3, "triu": 1, "sum": 1}


class Purity:
    """body: statements at the top. known: facts of each. touched: those that changed since they were simplified last.

    pure_functions: names of functions that only return something.
    """

    index: Index

    def __init__(self, body: list[ast.stmt], entry: str):
        self.body, self.entry = body, entry
        self.known: dict[int, Facts] = {}
        self.pure_functions = {"split"}  # fills a list of its own
        self.pure_methods: set[str] = set()  # the program's own classes have them
        self.touched = set(map(id, body))
        self.imported = {name for s in body if isinstance(s, ast.Import | ast.ImportFrom) for name in named(s)}

    def touch(self, statement: ast.stmt) -> None:
        self.touched.add(id(statement))
        self.known.pop(id(statement), None)

    def pure(self, node: ast.AST | None) -> bool:
        """True of an expression whose evaluation nothing else can notice."""
        for each in walk(node) if node else ():
            match each:
                case ast.Call(ast.Name("map"), [ast.Name(name), *_]) if not self._is_pure_function(name):
                    return False
                case ast.Call(ast.Name(name), _, keywords) if self._is_pure_function(name):
                    if any(k.arg == "key" and not isinstance(k.value, ast.Lambda) for k in keywords):
                        return False
                case ast.Call(ast.Name("next"), [ast.Call(ast.Attribute(attr="parameters")) | ast.GeneratorExp()]):
                    pass  # nothing else holds the iterator
                case ast.Call(ast.Attribute(attr=name)) if name in self.index.owners and name not in self.pure_methods:
                    return False
                case ast.Call(ast.Attribute(base, "replace"), [_, _] as args) if self._has_text(base, args):
                    pass
                case ast.Call(ast.Attribute(attr=name)) if name in METHODS:
                    pass
                case ast.Call(ast.Attribute(attr=name), args, keywords) if len(args) <= READING.get(name, -1):
                    if any(k.arg in ("out", None) for k in keywords):
                        return False
                case ast.Call() | ast.NamedExpr() | ast.Yield() | ast.YieldFrom():
                    return False
        return True

    def _is_pure_function(self, name: str) -> bool:
        return name in self.pure_functions or (name in NAMES and name not in self.index.functions)

    def _has_text(self, base: ast.expr, arguments: list[ast.expr]) -> bool:
        """True of a text's `replace`; those of files take one argument or are functions of a module."""
        texts = [a for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return bool(texts) and not (isinstance(base, ast.Name) and base.id in self.imported)

    def steady(self, node: ast.AST) -> bool:
        """True of an expression whose value no call can change."""
        match node:
            case ast.Name() | ast.expr_context() | ast.operator() | ast.cmpop():
                return True
            case ast.Attribute(ast.Name(name), member) if name in self.imported:
                return self.is_method(member) and name not in self.index.bound
            case ast.Tuple(elements) | ast.List(elements):
                return all(map(self.steady, elements))
        return is_constant(node)

    def is_method(self, name: str) -> bool:
        """True if nothing sets an attribute of this name."""
        return not self.index.stores[name] and not self.index.fields[name] and name not in self.index.words

    def find_pure(self) -> None:
        """Functions that only return something."""
        for name, function in self.index.functions.items():
            if name not in self.index.bound and self._only_returns(function):
                self.pure_functions.add(name)
        for name, owners in self.index.owners.items():
            methods = [each for cls in owners for each in cls.body if getattr(each, "name", "") == name]
            if all(map(self._only_returns, methods)):
                self.pure_methods.add(name)

    def _only_returns(self, function: ast.FunctionDef) -> bool:
        return all(self._is_quiet(statement, function) for statement in function.body)

    def _is_quiet(self, statement: ast.stmt, function: ast.FunctionDef) -> bool:
        match statement:
            case ast.Return(value):
                return self.pure(value)
            case ast.Assign(targets, value):
                return all(map(_is_local, targets)) and self.pure(value)
            case ast.AugAssign(ast.Name(name), _, value):
                nodes, bound, *_ = scan(function)
                return name in own_values(nodes, bound) and self.pure(value)
            case ast.If(head, body, rest) | ast.For(_, head, body, rest):
                local = isinstance(statement, ast.If) or _is_local(statement.target)
                return local and self.pure(head) and all(self._is_quiet(each, function) for each in (*body, *rest))
        return isinstance(statement, ast.Pass)


def _is_local(target: ast.expr) -> bool:
    return all(isinstance(each, ast.Name | ast.Tuple) for each in walk(target))
