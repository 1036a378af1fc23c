"""The packed script's program made smaller means the same."""

import ast
import importlib
import inspect

import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed as dist

from pgolf.script.parts import SOURCES, module
from pgolf.script.program import SHARED, members, ours
from pgolf.script.renaming import renamed
from pgolf.script.shrinking import shrunk

PROGRAMS = {
    "a parameter that is one constant goes": (
        "def f(x, y=2):\n    print(x)\n    print(y)\n\ndef main():\n    f(g, 3)\n    f(h, y=3)",
        "def f(x):\n    print(x)\n    print(3)\n\ndef main():\n    f(g)\n    f(h)",
    ),
    "an argument that nothing reads goes, unless it does something": (
        "def f(x, y, z):\n    print(x)\n    print(x)\n\ndef main():\n    f(1 + a, b, print(c))\n    f(a, b, c)",
        "def f(x, z):\n    print(x)\n    print(x)\n\ndef main():\n    f(1 + a, print(c))\n    f(a, c)",
    ),
    "a mapping that a function fills is filled": (
        "def f(x, y):\n    x |= y\n\ndef main():\n    f(a, b)\n    f(a, c)",
        "def f(x, y):\n    x |= y\n\ndef main():\n    f(a, b)\n    f(a, c)",
    ),
    "a variable that stays None decides": (
        "def main():\n    x = None\n    if x is not None:\n        x = x + 1\n    return print(x)",
        "def main():\n    return print(None)",
    ),
    "a function of one expression stands in its only call": (
        "def f(x):\n    return x + 1\n\ndef main():\n    return print(f(a()))",
        "def main():\n    return print(a() + 1)",
    ),
    "an argument is not evaluated later than other calls": (
        "def f(x, y):\n    return a() + x\n\ndef main():\n    return f(b(), c)",
        "def f(x):\n    return a() + x\n\ndef main():\n    return f(b())",
    ),
    "strings stay out of f-strings": (
        "def main():\n    x = 'a' if b else 'c'\n    return f'{x}'",
        "def main():\n    x = 'a' if b else 'c'\n    return f'{x}'",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_shrinking(case):
    before, after = PROGRAMS[case]
    assert "\n\n".join(map(ast.unparse, shrunk(ast.parse(before).body, "main"))) == after


def test_short_names_spare_keywords_strings_and_what_modules_hold():
    source = (
        "class Model(nn.Module):\n    def __init__(self, width):\n        self.tok_emb = width\n"
        "    def uncapped(self):\n        return self.tok_emb\n"
        "def main(width, device):\n    return Model(width=device).uncapped()"
    )
    renamed(body := ast.parse(source).body)
    text = "\n".join(map(ast.unparse, body))
    assert "tok_emb" in text and "width=a" in text
    assert "uncapped" not in text and "Model" not in text and "main" not in text


def test_attributes_that_others_have_are_known():
    """Live ones of this torch, numpy and Python; a name that is missing is to be added to SHARED."""
    names = [
        "builtins", "re", "struct", "json", "hashlib", "lzma", "zlib", "bisect", "collections", "concurrent.futures",
        "datetime", "functools", "itertools", "pathlib", "math", "os", "sys", "time", "copy", "warnings",
        "contextlib", "ctypes", "importlib.metadata", "random",
    ]  # fmt: skip
    modules = [importlib.import_module(name) for name in names]
    classes = [each for found in modules for each in vars(found).values() if inspect.isclass(each)]
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    known = [
        *modules, *classes, torch, torch.Tensor, torch.nn, torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1), torch.cuda,
        torch.nn.functional, torch.nn.init, torch.cuda.Event, torch.autograd.Function, torch.autograd, adam, dist, np,
        torch.autograd.function.FunctionCtx, np.ndarray, np.dtype, np.random.Generator, np.memmap, torch.finfo,
        sentencepiece.SentencePieceProcessor, torch.Generator, torch.device, torch.Size,
    ]  # fmt: skip
    assert not ours() & {name for each in known for name in dir(each)}
    classes = [s for name in SOURCES for s in module(name).definitions.values() if isinstance(s, ast.ClassDef)]
    assert {name for cls in classes for name in members(cls)} >= SHARED
