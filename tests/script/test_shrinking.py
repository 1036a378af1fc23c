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
from pgolf.script.reach import ScriptError
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
    "another object's method of a function's name keeps its argument": (
        "def f(x):\n    print(x)\n    print(x)\n\ndef main():\n    f(3)\n    f(3)\n    s.f(3)",
        "def f():\n    print(3)\n    print(3)\n\ndef main():\n    f()\n    f()\n    s.f(3)",
    ),
    "an operation on numbers of its own goes": (
        "def main(s):\n    h = s + 1\n    h += 2\n    return s",
        "def main(s):\n    return s",
    ),
    "a value goes to where a generator begins": (
        "def main(s):\n    x = s.pop()\n    return sum(y + 1 for y in x)",
        "def main(s):\n    return sum((y + 1 for y in s.pop()))",
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


# Each program comes out as it went in.
KEPT = {
    "a call that does something stays before reads of state": "x = s.pop()\nreturn s.n + x",
    "a clock is read after what it measures": "y = work(s)\nreturn time.perf_counter() - s, y",
    "a call stays before a function that may be set anew": "s.f = g\nx = s.pop()\nreturn s.f(x)",
    "a call stays before a variable that another function changes": (
        "n = read()\n\ndef count():\n    nonlocal n\n    n += 1\nx = s(count)\nreturn (n, x)"
    ),
    "an operation in place on what others hold stays": "h = s.hessian\nh += s.g",
    "an operation in place on a loop's variable stays": "for t in s.all:\n    t += 1",
    "a keyword that is given twice is left to the script": "f(a=1, **dict(a=2))",
    "an iterator's step stays": "next(s)\nreturn s",
    "a file moves": "s.replace('b')\nos.replace('a', s)",
    "mapping a function that does something stays": "list(map(write, s))",
    "an array is filled": "np.maximum(s, 0, out=s)",
    "an error is waited for": "try:\n    s.size()\nexcept TypeError:\n    print(s)",
    "an error of an unread value is waited for": "try:\n    n = s.size()\nexcept TypeError:\n    print(s)",
    "both names of one value stay": "a, b = c = (1, 2)\nreturn c",
    "an empty set is no list": "return {x for x in ()} | s",
    "a copy stays a copy": "x = s.all | {}\nx.update(b)\nreturn (s, x)",
    "a division by zero is left to the script": "return 7 // 0",
    "huge numbers are left to the script": "return 9 ** 999999999",
    "a comparison that fails is left to the script": "return None < 3",
    "an index that fails is left to the script": "return (1, 2)[2]",
    "unpacked elements are not counted": "return (*s, 2)[1]",
}


@pytest.mark.parametrize("case", KEPT)
def test_shrinking_keeps_what_does_something(case):
    body = "\n".join(f"    {line}" for line in KEPT[case].splitlines())
    before = ast.parse(f"import os\n\ndef main(s):\n{body}\n")
    expected = "\n\n".join(map(ast.unparse, before.body[-1:] if "os." not in body else before.body))
    assert "\n\n".join(map(ast.unparse, shrunk(before.body, "main"))) == expected


# Functions, and main; each program comes out with its functions.
NOT_INLINED = {
    "the argument does something and the function reads state first": (
        "def f(x):\n    return (len(L), x)", "return f(L.pop())"
    ),
    "a function inside reads the parameter later": (
        "def f(x):\n    return lambda: x", "for i in s:\n        s.add(f(i))"
    ),
    "a generator reads the parameter later": (
        "def f(x):\n    return (y + x for y in L)", "for i in s:\n        s.add(f(i))"
    ),
    "a parameter has to be named": ("def f(*, x):\n    return x + 1", "return f(x=s)"),
    "the function is a generator": ("def f(x):\n    return (yield from x)", "return f(s)"),
    "a default is evaluated once": ("def f(x=make()):\n    return x + 1", "return [f() for i in s]"),
    "a function changes what its argument holds": (
        "def f(x):\n    h = x.h\n    h += 1\n    return h", "f(s)\n    return s"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_INLINED)
def test_functions_stay_where(case):
    function, main = NOT_INLINED[case]
    before = ast.parse(f"{function}\n\ndef main(s):\n    {main}\n")
    expected = "\n\n".join(map(ast.unparse, before.body))
    assert "\n\n".join(map(ast.unparse, shrunk(before.body, "main"))) == expected


def test_constants_of_an_object_stay_where_making_it_does_something():
    source = (
        "class Plan:\n\n    @property\n    def uncapped(self):\n        return 'x'\n\n"
        "def main(s):\n    return make(s).uncapped"
    )
    assert "make(s)" in "\n".join(map(ast.unparse, shrunk(ast.parse(source).body, "main")))


def test_a_script_refuses_global_statements():
    with pytest.raises(ScriptError, match="global count, of main"):
        shrunk(ast.parse("def main():\n    global count\n    count = 1").body, "main")


def test_emptied_blocks_are_whole_statements():
    source = (
        "def main(s):\n    try:\n        s.run()\n    except TypeError:\n        len(s)\n    finally:\n        len(s)"
    )
    text = "\n".join(map(ast.unparse, shrunk(ast.parse(source).body, "main")))
    assert "pass" in text and ast.parse(text)


def test_short_names_inside_a_function_spare_its_defaults():
    renamed(body := ast.parse("N = 3\ndef main(x=N):\n    N = x\n    return N").body)
    text = "\n".join(map(ast.unparse, body))
    exec(text, names := {})
    main = next(each for each in names.values() if inspect.isfunction(each))
    assert main() == 3


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
