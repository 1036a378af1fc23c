"""The code that reads an artifact, in as few bytes as it needs: what the size limit counts besides the file.

From the sources of this package the archive takes the definitions that a reader reaches (load the file, build the
model, score it), without descriptions of knobs; python-minifier drops comments, docstrings and annotations and shortens
local names. It is a .tar.xz that runs alone, given the libraries; python-minifier is not among them.
"""

import ast
import inspect
import io
import lzma
import sys
import tarfile
from functools import cache
from pathlib import Path
from threading import Lock

from python_minifier import minify

PACKAGE = Path(__file__).parents[1]
# Read with the package: an edit while a run trains must not get into its artifact.
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

# Names that a reader calls, by module.
ENTRY_POINTS = {
    "artifact.format": ("load",),
    "evaluate": ("evaluate",),
    "knobs": ("ModelConfig", "EvalConfig"),
    "model": ("GPT",),
    "tokens": ("ByteTable",),
}
PARSING = Lock()  # CPython 3.11 counts the depth of a syntax tree for all threads together; two at a time fail
FUTURE = "annotations"  # kept in every module: from __future__ import annotations


def code_archive(*forms: type) -> bytes:
    """The archive for files that hold these stored forms, residuals and options of the model.

    The same bytes on every machine and Python version: python-minifier is pinned, and no f-string of a reader holds a
    string inside its braces, which Python 3.12 and later would quote in another way. Threads wait for one another.
    """
    with PARSING:
        return _archive(*forms)


@cache
def _archive(*forms: type) -> bytes:
    files = {f"pgolf_core/{module.replace('.', '/')}.py": text for module, text in reader_modules(*forms).items()}
    packages = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    files |= {f"{package}/__init__.py": "" for package in packages}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(files):
            entry, content = tarfile.TarInfo(path), files[path].encode()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def reader_modules(*forms: type) -> dict[str, str]:
    """Name of a module below pgolf_core -> its part that a reader needs.

    Starts from ENTRY_POINTS and the forms, and follows names and imports of names from this package. Imports inside
    functions are not followed: they are of forms, whose code comes with a file that has them. A form that is defined
    outside the package becomes quantization.schemes.<its word>, where `stored.form` looks for it.
    """
    modules: dict[str, dict[str, ast.stmt]] = {}

    def definition(module: str, name: str) -> ast.stmt | None:
        """The statement that defines a name; None for names of others, and for options that are no form."""
        if module not in modules:
            modules[module] = _definitions(SOURCES[f"{module.replace('.', '/')}.py"])
        statement = modules[module].get(name)
        return None if hasattr(statement, "is_option") and (module, name) not in given else statement

    given = {(cls.__module__.removeprefix("pgolf_core."), cls.__name__) for cls in forms}
    todo = [(module, name) for module, names in ENTRY_POINTS.items() for name in names]
    for cls in forms:
        module = cls.__module__.removeprefix("pgolf_core.")
        if module == cls.__module__:
            module = f"quantization.schemes.{cls.word}"
            modules[module] = _definitions(inspect.getsource(sys.modules[cls.__module__]))
        todo.append((module, cls.__name__))
    kept: set[ast.stmt] = set()
    while todo:
        module, name = todo.pop()
        statement = definition(module, name)
        if statement is None or statement in kept:
            continue
        if isinstance(statement, ast.ImportFrom) and statement.module.startswith("pgolf_core."):
            origin = statement.module.removeprefix("pgolf_core."), statement.names[0].name
            if definition(*origin) is None:
                continue
            todo.append(origin)
        kept.add(statement)
        todo += [(module, FUTURE), *((module, node.id) for node in ast.walk(statement) if isinstance(node, ast.Name))]
    bodies = {name: [s for s in dict.fromkeys(modules[name].values()) if s in kept] for name in sorted(modules)}
    return {name: _minified(ast.unparse(ast.Module(body, []))) for name, body in bodies.items() if body}


@cache
def _minified(source: str) -> str:
    return minify(source, remove_literal_statements=True, hoist_literals=False)  # lzma finds repeats by itself


@cache
def _definitions(source: str) -> dict[str, ast.stmt]:
    """Name -> the statement that defines it, in the order of the source."""
    definitions: dict[str, ast.stmt] = {}
    for statement in _Stripped().visit(ast.parse(source)).body:
        match statement:
            case ast.Import(names=[alias]) | ast.ImportFrom(names=[alias]):
                names = [(alias.asname or alias.name).partition(".")[0]]
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case _:
                names = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        definitions |= dict.fromkeys(names, statement)
    return definitions


class _Stripped(ast.NodeTransformer):
    """Imports become one statement per name; annotations, descriptions of knobs, roles and what trains go."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if any(ast.unparse(decorator).startswith("option(") for decorator in node.decorator_list):
            node.is_option, node.decorator_list = True, []  # see parameters.option
        return node

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> list[ast.stmt]:
        return [type(node)(**vars(node) | {"names": [alias]}) for alias in node.names]

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        if node.name in ("backward", "loss"):
            return None
        node.returns = None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return node.args[0] if ast.unparse(node.func) == "declare" else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword | None:
        return None if node.arg == "description" else self.generic_visit(node)
