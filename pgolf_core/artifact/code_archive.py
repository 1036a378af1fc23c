"""The code that reads an artifact, in as few bytes as it needs: what the size limit counts besides the file.

From the sources of this package the archive takes the definitions that a reader reaches (load the file, build the
model, score it), without comments, docstrings, annotations of functions and descriptions of knobs. It is a .tar.xz
that runs alone, given the libraries. Tokens are copied from the sources, nothing is rendered from a syntax tree, so
every Python version writes the same bytes.
"""

import functools
import inspect
import io
import lzma
import sys
import tarfile
from pathlib import Path

from pgolf_core.artifact.minify import Module

PACKAGE = Path(__file__).parents[1]

# Names that a reader calls, by module.
ENTRY_POINTS = {
    "artifact.format": ("load",),
    "evaluate": ("evaluate",),
    "knobs": ("ModelConfig", "EvalConfig"),
    "model": ("GPT",),
    "tokens": ("ByteTable",),
}
ENTRY_METHODS = ("from_sentencepiece",)


def code_archive(*forms: type) -> bytes:
    """The archive for files that hold these stored forms and residuals; the same bytes on every machine."""
    return _archive(frozenset(forms))


@functools.cache
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

    Starts from ENTRY_POINTS and the forms, and follows names and imports of names from this package. Imports inside
    functions are not followed: they are of forms, whose code comes with a file that has them. A form that is defined
    outside the package becomes quantization.schemes.<its word>, where `stored.form` looks for it.
    """
    modules: dict[str, Module] = {}
    todo = [(module, name) for module, names in ENTRY_POINTS.items() for name in names]
    for cls in forms:
        home = cls.__module__.removeprefix("pgolf_core.")
        if home == cls.__module__:
            home = f"quantization.schemes.{cls.word}"
            modules[home] = Module(inspect.getsource(sys.modules[cls.__module__]))
        todo.append((home, cls.__name__))
    words = set(ENTRY_METHODS)  # in all that is kept; methods are kept if their name is among them
    known = -1
    while todo or known < len(words):
        known = len(words)
        while todo:
            module, name = todo.pop()
            if module not in modules:
                modules[module] = Module((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
            todo += modules[module].keep(name, words)
        todo += [needed for m in modules.values() for needed in m.keep_methods(words)]
    return {name: module.text() for name, module in sorted(modules.items())}
