"""A run's knobs → its script, readable and packed.

The script is what `train_gpt.main` of pgolf_core reaches under these knobs, in one namespace: definitions whose names
are never read, methods that are never called and branches that the knobs decide are left out. Knobs become one frozen
class. The packed form, which the size limit counts, has no docstrings, annotations and assertions; its program is made
smaller as a whole and its names are short (shrinking.py, renaming.py); it is compressed by lzma and unpacks itself.
Both are the same bytes on every machine and Python version: python-minifier is pinned.
"""

import ast
import copy
import hashlib
import lzma
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from threading import Lock

from python_minifier import unparse

from pgolf.processes import work_on_syntax_trees
from pgolf.script.folding import GROUP_PROPERTIES, reachable
from pgolf.script.parts import PACKAGE, SOURCES, Module, Name, module, source_of
from pgolf.script.reach import CONFIG, ENTRY, GROUPS, KEPT_ERRORS, VARIABLES, Reached, facts_of, forms, shell_of
from pgolf.script.renaming import renamed
from pgolf.script.shrinking import shrunk
from pgolf.script.stored import from_disk
from pgolf.script.trees import Transformer, copied
from pgolf_core.artifact.codec import LIBRARIES
from pgolf_core.config import RunConfig

FILTER = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 16, "lc": 3, "pb": 0}
LOADER = "#coding:l1\nimport lzma\nexec(lzma.decompress('''{}'''.encode('l1')))\n"
ESCAPES = {"\\": "\\\\", "\r": "\\r"}
# Knobs that a script does not read, or that the machine running it sets.
SAME_FOR_ALL = dict(
    seed=1337, data_path="data", tokenizer_path="", tokenizer="", text_transform="", world_size=1,
    allow_over_cap=False, roundtrip_val_max_tokens=0, roundtrip_val_max_documents=0, track="", resume_every_seconds=0,
    save_raw_checkpoint=True,
)  # fmt: skip
PARSING = Lock()  # CPython 3.11 counts the depth of a syntax tree for all threads together; two at a time fail
HEADING = '''"""Trains, exports, reads the file back and scores it.

    SEED=1337 DATA_PATH=data torchrun --standalone --nproc_per_node=8 train_gpt.py     # or python, on one device
    DATA_PATH=data python train_gpt.py --eval artifact.pgolf                           # only scores a file

The program that train_gpt.py holds packed, made of pgolf_core with the knobs of one run.
"""'''


@dataclass(frozen=True)
class Script:
    """packed: the bytes of train_gpt.py, which the size limit counts. readable: text of the same program.

    packages: imported besides the standard library.
    """

    packed: bytes
    readable: str
    packages: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.packed).hexdigest()


def script_of(config: RunConfig) -> Script:
    """The script of a run; the same for all seeds, folders of data and numbers of processes. Threads wait.

    It scores the whole validation split, whatever part of it the run scores.
    """
    with PARSING, work_on_syntax_trees():
        return _script(_same_for_all(config))


def packed_script(config: RunConfig) -> bytes:
    """The packed form alone, without the readable one."""
    with PARSING, work_on_syntax_trees():
        return _packed(_same_for_all(config))


def estimated_size(config: RunConfig) -> int:
    """Bytes of the packed form to within 5 %, in a tenth of its time."""
    with PARSING, work_on_syntax_trees():
        return _estimated(_same_for_all(config))


@cache
def _same_for_all(config: RunConfig) -> RunConfig:
    return config.with_knobs(**SAME_FOR_ALL)


@cache
def _packed(config: RunConfig) -> bytes:
    if any(name not in SOURCES for name, _ in forms(config)):  # a user's quantizer, which may read what it likes
        return _made(config)
    return from_disk(facts_of(config), partial(_made, config))


@cache
def _estimated(config: RunConfig) -> int:
    """From the program before it is made smaller: a straight line through 22 scripts of 12 to 20 kB."""
    reached = Reached(config, literal=True)
    *definitions, knobs = sorted(_definitions(reached), key=lambda each: getattr(each, "name", "") == CONFIG[1])
    texts = [_text_before(each) for each in definitions] + [_source([_stripped(knobs)])]  # the last is new each time
    before = len(pack("\n".join([_imports(reached.external), *texts])))
    return round(0.59 * before - {"auto": 3540, "cpu": 3780}.get(config.device, 4650))


@cache
def _script(config: RunConfig) -> Script:
    reached, packed = Reached(config, literal=False), _packed(config)
    imported = {line.split()[1].partition(".")[0] for line in reached.external.values()}
    codec = {LIBRARIES[name][0] for name in LIBRARIES if config.codec in (name, "auto")}
    packages = sorted((imported - sys.stdlib_module_names) | codec)
    return Script(packed, _readable(reached, len(packed)), tuple(packages))


def pack(source: str) -> bytes:
    """A latin-1 Python file that holds the source compressed; only bytes that a literal cannot hold are escaped."""
    text = lzma.compress(source.encode(), lzma.FORMAT_ALONE, filters=[FILTER]).decode("latin1")
    text = text.translate(str.maketrans(ESCAPES))
    text = re.sub("\0(?=[0-7])", "\\\\000", text).replace("\0", "\\0")
    text = re.sub("''(?=')|'$", lambda quotes: "\\'" * len(quotes[0]), text)
    return LOADER.replace("{}", text).encode("latin1")


def _readable(reached: Reached, packed_bytes: int) -> str:
    parts = [HEADING, "from __future__ import annotations", _imports(reached.external)]
    for name in reached.modules:
        parts.append(f"# {'-' * 20} {name.removeprefix(f'{PACKAGE}.').replace('.', '/')} {'-' * 20}")
        parts += _texts_of(reached, name)
    text = "\n\n\n".join(parts) + '\n\n\nif __name__ == "__main__":\n    main()\n'
    return text.replace(
        "return len(Path(__file__).read_bytes())", f"return {packed_bytes}  # of train_gpt.py, which is this, packed"
    )


def _imports(external: dict[str, str]) -> str:
    """The import statements: whole modules first, then names by module."""
    whole = sorted({line for line in external.values() if line.startswith("import ")})
    names: dict[str, list[str]] = {}
    for line in sorted(set(external.values()) - set(whole)):
        origin, name = line.removeprefix("from ").split(" import ")
        if origin != "__future__":
            names.setdefault(origin, []).append(name)
    return "\n".join([*whole, *(f"from {origin} import {', '.join(own)}" for origin, own in names.items())])


def _texts_of(reached: Reached, name: str) -> Iterator[str]:
    """Texts of what is kept of a module, in the order of its source."""
    if name == CONFIG[0]:
        yield ast.unparse(_config_class(reached))
        yield f"{' = '.join(name for name in GROUPS if name != 'Group')} = RunConfig  # groups of knobs"
        return
    origin = module(name)
    for own, statement in _statements(reached, name):
        if isinstance(reached.kept[name, own], ast.ClassDef):
            yield _class_text(reached, (name, own))
        else:
            yield _text(origin, statement, reached.kept[name, own])


def _statements(reached: Reached, name: str) -> Iterator[tuple[str, ast.stmt]]:
    """Kept definitions of a module and their statements, in the order of its source, each statement once."""
    done = set()
    for own, statement in module(name).definitions.items():
        if (name, own) in reached.kept and id(statement) not in done:
            done.add(id(statement))
            yield own, statement


def _text(origin: Module, statement: ast.stmt, kept: ast.stmt) -> str:
    """Text of a statement, as in the source unless a part of it was left out."""
    kept = _LocalImports().visit(kept)
    same = ast.dump(kept) == ast.dump(statement)
    return source_of(origin, statement) if same else ast.unparse(kept)


def _class_text(reached: Reached, name: Name) -> str:
    origin, cls, methods = module(name[0]), reached.kept[name], reached.members[name]
    first = min(node.lineno for s in cls.body for node in (s, *getattr(s, "decorator_list", [])))
    while origin.lines[first - 2].lstrip().startswith("#"):
        first -= 1
    start = min([cls.lineno, *(decorator.lineno for decorator in cls.decorator_list)])
    parts = ["\n".join(origin.lines[start - 1 : first - 1]).rstrip()]
    for statement in cls.body:
        if not isinstance(statement, ast.FunctionDef):
            parts.append(source_of(origin, statement))
        elif statement.name in methods:
            text = _text(origin, statement, methods[statement.name])
            indented = text if text.startswith(" ") else textwrap.indent(text, "    ")
            parts.append(f"\n{indented}")
    return "\n".join(parts if len(parts) > 1 else [*parts, "    pass"])


class _LocalImports(Transformer):
    """Leaves out imports of the package inside functions: a script has one namespace."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module.startswith(f"{PACKAGE}.") else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node = self.generic_visit(node)
        node.body = reachable(node.body)
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        node = self.generic_visit(node)
        node.body = reachable(node.body)
        return node


def _config_class(reached: Reached) -> ast.ClassDef:
    """The knobs as a frozen dataclass; every group of them is the whole."""
    lines = [
        "@dataclass(frozen=True)",
        "class RunConfig:",
        '    """The knobs of this run, and what follows from them."""',
    ]
    for name, value in reached.knobs().items():
        lines.append(f"    {name}: {type(value).__name__} = {VARIABLES.get(name, repr(value))}")
    groups = [name for name in GROUP_PROPERTIES if name in reached.used and not reached.literal]
    lines += [f"    {' = '.join(groups)} = property(lambda self: self)"] if groups else []
    lines += ["    def with_knobs(self, **knobs):", "        return replace(self, **knobs)"]
    cls = ast.parse("\n".join(lines)).body[0]
    cls.body += reached.members[CONFIG].values()
    return cls


def _made(config: RunConfig) -> bytes:
    return pack(_minified_all(Reached(config, literal=True)))


def _minified_all(reached: Reached) -> str:
    """The packed form's source."""
    program = shrunk(_program(reached), ENTRY[1])
    short = renamed(program)
    return unparse(ast.parse(f"{_source(program)}\n{short.get(ENTRY[1], ENTRY[1])}()"))


def _source(program: list[ast.stmt]) -> str:
    return "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in program)


def _program(reached: Reached) -> list[ast.stmt]:
    """Statements of the packed form, before it is made smaller."""
    return ast.parse(_imports(reached.external)).body + [_stripped(each) for each in _definitions(reached)]


def _definitions(reached: Reached) -> Iterator[ast.stmt]:
    for name in reached.modules:
        if name == CONFIG[0]:
            yield _config_class(reached)
            continue
        for own, _ in _statements(reached, name):
            kept = reached.kept[name, own]
            yield _whole(kept, *reached.members[name, own].values()) if isinstance(kept, ast.ClassDef) else kept


@cache
def _whole(cls: ast.ClassDef, *methods: ast.stmt) -> ast.ClassDef:
    cls = copy.copy(shell_of(cls))
    cls.body = [*cls.body, *methods]
    return cls


def _stripped(statement: ast.stmt) -> ast.stmt:
    return _Stripped().visit(_LocalImports().visit(copied(statement)))


@cache
def _text_before(statement: ast.stmt) -> str:
    return _source([_stripped(statement)])


class _Stripped(Transformer):
    """Annotations go as far as they can, and the messages of errors that are for developers."""

    annotation: str | int | None = None  # for fields of the class around

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns, around, self.annotation = None, self.annotation, None
        node = self.generic_visit(node)
        self.annotation = around
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """No scheme is found by its word."""
        self.annotation = "0" if any(getattr(base, "id", "") == "NamedTuple" for base in node.bases) else 0
        node.decorator_list = [each for each in node.decorator_list if getattr(each, "id", "") != "register"]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        """Only fields of classes are annotated."""
        if self.annotation is None or "ClassVar" in ast.unparse(node.annotation):
            return node.value and ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)
        return ast.copy_location(ast.AnnAssign(node.target, ast.Constant(self.annotation), node.value, 1), node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        node = self.generic_visit(node)
        node.values = [ast.Constant(str(each.value.value)) if _is_constant(each) else each for each in node.values]
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        match node.exc:
            case ast.Call(ast.Name(error)) if error not in KEPT_ERRORS:
                return ast.Raise(node.exc.func)
        return node


def _is_constant(part: ast.expr) -> bool:
    """True of a constant in an f-string's braces, without a format."""
    return (
        isinstance(part, ast.FormattedValue)
        and isinstance(part.value, ast.Constant)
        and part.conversion == -1
        and part.format_spec is None
    )
