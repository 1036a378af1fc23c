"""Top-level definitions of modules, with what each refers to: the parts that a script is put together from."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pgolf_core

PACKAGE = "pgolf_core"
FOLDER = Path(pgolf_core.__file__).parent


def _dotted(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Read with the package: an edit while a run trains must not get into its script.
SOURCES = {_dotted(path): path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py")}

Name = tuple[str, str]  # module, name in it


@dataclass(frozen=True)
class Module:
    """definitions: name -> its statement, in order; expressions that run on import have the names *N

    imports: name -> (module of the package, name in it). external: name -> the import statement of another package.
    """

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, Name] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)


@cache
def module(name: str) -> Module:
    """The module, parsed. One outside the package, such as a user's quantizer, is read from where it is imported."""
    source = SOURCES[name] if name in SOURCES else inspect.getsource(importlib.import_module(name))
    found = Module(name, source.splitlines())
    for statement in ast.parse(source).body:
        match statement:
            case ast.ImportFrom(module=origin, names=names) if origin.startswith(f"{PACKAGE}."):
                found.imports.update({alias.asname or alias.name: (origin, alias.name) for alias in names})
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    line = ast.unparse(type(statement)(**vars(statement) | {"names": [alias]}))
                    found.external[(alias.asname or alias.name).partition(".")[0]] = line
            case ast.FunctionDef(name=own) | ast.ClassDef(name=own):
                found.definitions[own] = statement
            case ast.Assign(targets=[ast.Name(own)]) | ast.AnnAssign(target=ast.Name(own)):
                found.definitions[own] = statement
            case ast.Assign(targets=[ast.Tuple(elements)]):
                found.definitions.update(dict.fromkeys((e.id for e in elements if isinstance(e, ast.Name)), statement))
            case ast.Expr(ast.Call()):
                found.definitions[f"*{len(found.definitions)}"] = statement
    return found


@cache
def references(node: ast.AST) -> tuple[set[str], set[str], set[Name]]:
    """Names that code reads, attributes that it uses, and imports of the package inside functions."""
    names, attributes, imported = set(), set(), set()
    for each in _without_annotations(node):
        match each:
            case ast.Name(name):
                names.add(name)
            case ast.Attribute(_, name):
                attributes.add(name)
            case ast.ImportFrom(module=str(origin), names=aliases) if origin.startswith(f"{PACKAGE}."):
                imported |= {(origin, alias.name) for alias in aliases}
            case ast.Call(ast.Name("getattr"), [_, ast.JoinedStr([*_, ast.Constant(ending)]), *_]):
                attributes.add(f"*{ending}")  # getattr(config, f"{group}_quantizer")
    return names, attributes, imported


def _without_annotations(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _without_annotations(child)


@cache
def all_names(node: ast.AST) -> frozenset[str]:
    """Names that occur in code, annotations included."""
    return frozenset(each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def source_of(found: Module, node: ast.stmt) -> str:
    """The text of a statement, with the comment right above it."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while first and found.lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return "\n".join(found.lines[first : node.end_lineno])
