"""Parameters, fields and attributes that are one constant, or that nothing reads."""

import ast
from collections import defaultdict

from pgolf.script.program import (
    Replace,
    Substitute,
    argument_of,
    default_of,
    drop_argument,
    is_constant,
    named,
    ours,
    pairs_of,
    reassigned,
    scan,
    unpacks,
)
from pgolf.script.purity import Purity
from pgolf.script.trees import copied, walk

READ_BY_NAME = {"Layer"}  # tuples that nothing unpacks
# Decorators that take a function with fewer parameters as well.
TRANSPARENT = {"cache", "contextmanager", "staticmethod", "classmethod", "functools.cache", "torch.no_grad()"}


class Arguments(Purity):
    """What calls give and what objects hold."""

    def arguments(self) -> None:
        """Parameters with one constant everywhere, or without a reader, go."""
        index = self.index
        self._by_position()
        for name, function in index.functions.items():
            if name not in index.bound and not index.values[name] and name != self.entry:
                self._parameters(function, function, index.calls[name], 0)
        for name, owners in index.owners.items():
            if len(owners) == 1 and not name.startswith("__") and name in ours():
                method = next(m for m in owners[0].body if getattr(m, "name", "") == name)
                kinds = {ast.unparse(d) for d in method.decorator_list}
                if not index.values[f".{name}"] and "property" not in kinds and name not in index.fields:
                    self._parameters(method, owners[0], index.calls[f".{name}"], int("staticmethod" not in kinds))
        for name, cls in index.classes.items():
            if self._is_made_by_name(cls):
                made = next((m for m in cls.body if getattr(m, "name", "") == "__init__"), None)
                if made:
                    self._parameters(made, cls, index.calls[name], 1)
                elif cls.name in READ_BY_NAME or any("dataclass" in ast.unparse(d) for d in cls.decorator_list):
                    self._fields(cls)

    def _by_position(self) -> None:
        """Arguments of our functions, methods and classes that a call names, if nothing between them is left out."""
        index = self.index
        known = {name: [a.arg for a in f.args.args] for name, f in index.functions.items() if name not in index.bound}
        for name, owners in index.owners.items():
            if len(owners) == 1 and name in ours() and name not in index.fields and not name.startswith("__"):
                method = next(m for m in owners[0].body if getattr(m, "name", "") == name)
                if not any("static" in ast.unparse(d) for d in method.decorator_list):
                    known[f".{name}"] = [a.arg for a in method.args.args[1:]]
        for name, cls in index.classes.items():
            made = next((m for m in cls.body if getattr(m, "name", "") == "__init__"), None)
            fields = [s.target.id for s in cls.body if isinstance(s, ast.AnnAssign)]
            if name not in index.bound and not any(getattr(base, "id", "") in index.classes for base in cls.bases):
                known[name] = [a.arg for a in made.args.args[1:]] if made else fields
        for name, own in known.items():
            for call, statement in index.calls[name]:
                if unpacks([call]):
                    continue
                while call.keywords and len(call.args) < len(own) and call.keywords[0].arg == own[len(call.args)]:
                    call.args.append(call.keywords.pop(0).value)
                    self.touch(statement)

    def _is_made_by_name(self, cls: ast.ClassDef) -> bool:
        """True of a class whose objects are only made by calls of its name."""
        index = self.index
        based = {getattr(base, "id", "") for each in index.classes.values() for base in each.bases}
        own = cls.name in based or any(getattr(base, "id", "") in index.classes for base in cls.bases)
        return not own and index.values[cls.name] == index.qualified[cls.name] and cls.name not in index.bound

    def _fields(self, cls: ast.ClassDef) -> None:
        """Fields of a dataclass as parameters of its calls."""
        index, calls = self.index, self.index.calls[cls.name]
        if unpacks(call for call, _ in calls):
            return
        for field in [s for s in reversed(cls.body) if isinstance(s, ast.AnnAssign)]:
            name = field.target.id
            position = [s for s in cls.body if isinstance(s, ast.AnnAssign)].index(field)
            values = [argument_of(call, name, position) or field.value for call, _ in calls]
            if name in index.words or index.stores[name] or name.endswith("_quantizer") or None in values:
                continue
            alone = index.fields[name] == 1 and name in ours() and name not in index.owners
            if alone and index.loads[name] and _one_constant(values):
                self._read_by_value(name, values[0])
            if not index.loads[name] and all(map(self.pure, values)):
                for call, statement in calls:
                    drop_argument(call, name, position)
                    self.touch(statement)
                cls.body.remove(field)
                cls.body = cls.body or [ast.Pass()]
                self.touch(cls)

    def _read_by_value(self, name: str, value: ast.expr) -> None:
        """The constant in place of every read of an attribute, if its objects may be left out."""
        if not all(self.pure(node.value) for node, _ in self.index.loads[name]):
            return
        loads = self.index.loads.pop(name)
        new = {id(node): copied(value) for node, _ in loads}
        for statement in {id(s): s for _, s in loads}.values():
            Replace(new).generic_visit(statement)
            self.touch(statement)

    def _parameters(
        self, function: ast.FunctionDef, around: ast.stmt, calls: list[tuple[ast.Call, ast.stmt]], first: int
    ) -> None:
        spec = function.args
        if not calls or not spec.args[first:] or spec.vararg or spec.kwarg or spec.posonlyargs or spec.kwonlyargs:
            return
        if any(ast.unparse(d) not in TRANSPARENT for d in function.decorator_list) or unpacks(c for c, _ in calls):
            return
        _, count, read, _ = scan(function)
        for parameter in list(reversed(spec.args[first:])):
            name, index = parameter.arg, spec.args.index(parameter)
            default = default_of(spec, index)
            values = [argument_of(call, name, index - first) or default for call, _ in calls]
            if None in values:
                continue
            same = self._is_known(values[0]) and all(ast.dump(v) == ast.dump(values[0]) for v in values)
            if count[name] > 1 or (read[name] and not same) or not all(map(self.pure, values)):
                if default and default is spec.defaults[0]:
                    given = all(argument_of(call, name, index - first) for call, _ in calls)
                    spec.defaults = spec.defaults[given:]
                continue
            Substitute({name: values[0]}).generic_visit(function)
            for call, statement in calls:
                drop_argument(call, name, index - first)
                self.touch(statement)
            if default:
                spec.defaults.pop(index - (len(spec.args) - len(spec.defaults)))
            spec.args.remove(parameter)
            self.touch(around)

    def _is_known(self, value: ast.expr) -> bool:
        """True of a constant, and of a name at the top that is bound nowhere else."""
        index = self.index
        top = isinstance(value, ast.Name) and value.id not in index.bound
        return is_constant(value) or (
            top and (value.id in index.functions or value.id in index.classes or self._at_top(value.id))
        )

    def _at_top(self, name: str) -> bool:
        return any(name in named(s) for s in self.body if isinstance(s, ast.Assign))

    def attributes(self) -> None:
        """Attributes of self that are one constant everywhere are read by value; those without a reader go."""
        written: dict[str, list] = defaultdict(list)
        for cls in self.index.classes.values():
            for method in cls.body:
                if isinstance(method, ast.FunctionDef) and method.args.args:
                    own = method.args.args[0].arg
                    for node in walk(method):
                        pairs = pairs_of(node) if isinstance(node, ast.Assign) else []
                        pairs = [(node.target, node.value)] if isinstance(node, ast.AugAssign) else pairs
                        for left, right in pairs:
                            if isinstance(left, ast.Attribute) and getattr(left.value, "id", "") == own:
                                written[left.attr].append((cls, node, left, right))
        self._class_constants()
        gone: dict[int, ast.stmt] = {}
        for name, found in written.items():
            index = self.index
            if name in index.words or name in index.owners or index.stores[name] != len(found) or index.fields[name]:
                continue
            values = [right for *_, right in found]
            plain = all(isinstance(node, ast.Assign) for _, node, *_ in found)
            same = plain and _one_constant(values)
            if same and index.loads[name] and name in ours():
                self._read_by_value(name, values[0])
            if not index.loads[name] and all(map(self.pure, values)) and name in ours():
                gone |= {id(left): cls for cls, _, left, _ in found}
        for cls in {id(c): c for c in gone.values()}.values():
            new = {}
            for node in walk(cls):
                if isinstance(node, ast.Assign) and any(id(left) in gone for left, _ in pairs_of(node)):
                    new[id(node)] = reassigned(node, [pair for pair in pairs_of(node) if id(pair[0]) not in gone])
                if isinstance(node, ast.AugAssign) and id(node.target) in gone:
                    new[id(node)] = ast.Pass()
            Replace(new).generic_visit(cls)
            self.touch(cls)

    def _class_constants(self) -> None:
        """Constants of one class alone are read by value."""
        index = self.index
        for cls in list(index.classes.values()):
            for each in cls.body:
                match each:
                    case ast.Assign([ast.Name(name)], ast.Constant() as value) if index.fields[name] == 1:
                        if not (
                            index.stores[name] or index.owners.get(name) or name in index.words or name not in ours()
                        ):
                            self._read_by_value(name, value) if index.loads[name] else None


def _one_constant(values: list[ast.expr]) -> bool:
    first = values[0] if values else None
    return isinstance(first, ast.Constant) and all(ast.dump(value) == ast.dump(first) for value in values)
