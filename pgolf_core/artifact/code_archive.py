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

from python_minifier import minify

PACKAGE = Path(__file__).parents[1]

# Names that a reader calls, by module.
ENTRY_POINTS = {
    "artifact.format": ("load",),
    "evaluate": ("evaluate",),
    "knobs": ("ModelConfig", "EvalConfig"),
    "model": ("GPT",),
    "tokens": ("ByteTable",),
}
ENTRY_METHODS = ("forward", "from_sentencepiece")  # besides those that kept code names, and those __named__ like this


def code_archive(*forms: type) -> bytes:
    """The archive for files that hold these stored forms and residuals.

    The same bytes on every machine and Python version: python-minifier is pinned, and no f-string of a reader holds a
    string inside its braces, which Python 3.12 and later would quote in another way.
    """
    return _archive(frozenset(forms))


@cache
def _archive(forms: frozenset[type]) -> bytes:
    files = {f"pgolf_core/{module.replace('.', '/')}.py": text for module, text in reader_modules(forms).items()}
    packages = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    files |= {f"{package}/__init__.py": "" for package in packages}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(files):
            entry, content = tarfile.TarInfo(path), files[path].encode()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def reader_modules(forms: frozenset[type] = frozenset()) -> dict[str, str]:
    """Name of a module below pgolf_core -> its part that a reader needs.

    Starts from ENTRY_POINTS and the forms. A form that is defined outside the package becomes
    quantization.schemes.<its word>, where `stored.form` looks for it.
    """
    reader = Reader()
    for module, names in ENTRY_POINTS.items():
        for name in names:
            reader.need(module, name)
    for cls in forms:
        module = cls.__module__.removeprefix("pgolf_core.")
        if module == cls.__module__:
            module = f"quantization.schemes.{cls.word}"
            reader.add(module, inspect.getsource(sys.modules[cls.__module__]))
        reader.need(module, cls.__name__)
    reader.need_methods()
    return {module: _minified(reader.source(module)) for module in sorted(reader.trees)}


@cache
def _minified(source: str) -> str:
    return minify(source, remove_literal_statements=True, hoist_literals=False)  # lzma finds repeats by itself


class Reader:
    """Modules below pgolf_core, of which `need` marks definitions and `source` is what they select.

    Follows names, and imports of names from this package. Imports inside functions are not followed: they are of forms,
    whose code comes with a file that has them.
    """

    def __init__(self):
        self.trees: dict[str, ast.Module] = {}
        self.defined: dict[tuple[str, str], ast.stmt] = {}  # (module, name) -> the statement that defines it
        self.kept: set[ast.stmt] = set()  # statements of modules, and methods
        self.words = set(ENTRY_METHODS)  # identifiers and strings in all that is kept
        self.methods: list[tuple[str, ast.FunctionDef]] = []  # of kept classes, with their module; not kept so far

    def add(self, module: str, source: str) -> None:
        self.trees[module] = _Stripped().visit(ast.parse(source))
        for statement in self.trees[module].body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [(statement.names[0].asname or statement.names[0].name).partition(".")[0]]
            elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
                names = [statement.name]
            else:
                names = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            self.defined |= {(module, name): statement for name in names}

    def need(self, module: str, name: str) -> None:
        """Keep what defines the name, and what that needs here and elsewhere."""
        if module not in self.trees:
            self.add(module, (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        statement = self.defined.get((module, name))
        if statement is None or statement in self.kept:
            return
        self.kept.add(statement)
        if isinstance(statement, ast.ImportFrom) and statement.module.startswith("pgolf_core."):
            self.need(statement.module.removeprefix("pgolf_core."), statement.names[0].name)
        elif isinstance(statement, ast.ClassDef):
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.FunctionDef):
                    self.methods.append((module, child))
                else:
                    self._follow(module, child)
        else:
            self._follow(module, statement)

    def need_methods(self) -> None:
        """Keep methods of kept classes that are called by kept code or by Python, as far as their names tell."""
        while called := [m for m in self.methods if m[1].name in self.words or m[1].name.startswith("__")]:
            self.methods = [method for method in self.methods if method not in called]
            for module, method in called:
                self.kept.add(method)
                self._follow(module, method)

    def _follow(self, module: str, root: ast.AST) -> None:
        for node in ast.walk(root):
            match node:
                case ast.Name(id=word):
                    self.words.add(word)
                    self.need(module, word)
                case ast.Attribute(attr=word) | ast.Constant(value=str(word)):  # the latter for getattr
                    self.words.add(word)

    def source(self, module: str) -> str:
        """The kept statements of a module."""
        body = [s for s in self.trees[module].body if s in self.kept or getattr(s, "module", "") == "__future__"]
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                fields = [s for s in statement.body if s in self.kept or not isinstance(s, ast.FunctionDef)]
                statement.body = fields or [ast.Pass()]
        return ast.unparse(ast.Module(body, []))


class _Stripped(ast.NodeTransformer):
    """Imports become one statement per name; annotations of functions and descriptions of knobs go."""

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> list[ast.stmt]:
        return [type(node)(**vars(node) | {"names": [alias]}) for alias in node.names]

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword | None:
        return None if node.arg == "description" else self.generic_visit(node)
