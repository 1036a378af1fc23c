"""What can be left out of a program without a difference: expressions that only compute a value."""

import ast

from pgolf.script.program import Facts, Index, walk

NAMES = {
    "len", "tuple", "list", "dict", "set", "sorted", "range", "min", "max", "int", "float", "bool", "str", "bytes",
    "zip", "next", "getattr", "isinstance", "enumerate", "sum", "map", "any", "all", "partial", "Path",
}  # fmt: skip
METHODS = {
    "size", "numel", "items", "keys", "values", "parameters", "get", "detach", "float", "fromkeys", "dim", "prod",
    "element_size", "named_parameters", "device", "empty", "zeros", "perf_counter", "process_time", "removeprefix",
    "startswith", "unpack", "is_file", "stat", "partition", "replace", "pack", "version", "arrays",
}  # fmt: skip


class Purity:
    """body: statements at the top. known: facts of each. touched: those that changed since they were simplified last.

    pure_functions: names of functions that only return something.
    """

    index: Index

    def __init__(self, body: list[ast.stmt], entry: str):
        self.body, self.entry = body, entry
        self.known: dict[int, Facts] = {}
        self.pure_functions = {"split"}  # fills a list of its own
        self.touched = set(map(id, body))

    def touch(self, statement: ast.stmt) -> None:
        self.touched.add(id(statement))
        self.known.pop(id(statement), None)

    def pure(self, node: ast.AST | None) -> bool:
        """True of an expression whose evaluation nothing else can notice."""
        for each in walk(node) if node else ():
            match each:
                case ast.Call(ast.Name(name)) if name in NAMES or name in self.pure_functions:
                    pass
                case ast.Call(ast.Attribute(attr=name)) if name in METHODS:
                    pass
                case ast.Call() | ast.NamedExpr() | ast.Yield() | ast.YieldFrom():
                    return False
        return True

    def find_pure(self) -> None:
        """Functions that only return something."""
        for name, function in self.index.functions.items():
            own = {each.arg for each in function.args.args}  # what calls give may not be changed
            if name not in self.index.bound and all(self._is_quiet(statement, own) for statement in function.body):
                self.pure_functions.add(name)

    def _is_quiet(self, statement: ast.stmt, own: set[str]) -> bool:
        match statement:
            case ast.Return(value):
                return self.pure(value)
            case ast.Assign(targets, value):
                local = all(isinstance(n, ast.Name | ast.Tuple) for t in targets for n in walk(t))
                return local and self.pure(value)
            case ast.AugAssign(ast.Name(name), _, value):
                return name not in own and self.pure(value)
            case ast.If() | ast.For():
                head = statement.test if isinstance(statement, ast.If) else statement.iter
                return self.pure(head) and all(
                    self._is_quiet(each, own) for each in (*statement.body, *statement.orelse)
                )
        return isinstance(statement, ast.Pass)
