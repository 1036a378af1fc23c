"""Settings of another trainer's script, plain or packed, which is read and never run."""

import ast
import base64
import lzma
import operator
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

from pgolf_core.artifact.codec import ArtifactError, library

MAX_SOURCE = 4 * 2**20  # bytes, packed or not; the longest public scripts have 160 kB
MAX_NESTED = 3  # scripts in scripts
CLASS = re.compile(r"class (?:Hyper[Pp]arameters|HParams|Config|Args)\b.*:")
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
LZMA1 = [{"id": lzma.FILTER_LZMA1, "dict_size": MAX_SOURCE, "pb": pb} for pb in (0, 2)]
RAW_LZMA = ({"id": lzma.FILTER_LZMA2, "dict_size": MAX_SOURCE}, *LZMA1)
CALLS = {"int": int, "float": float, "bool": bool, "str": str, "lower": str.lower, "strip": str.strip}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.Not: operator.not_, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError, SyntaxError)


def unpacked(content: bytes) -> str:
    """The source; of a script that decompresses its longest literal in a known way, that of the literal."""
    text = _text(content)
    for _ in range(MAX_NESTED):
        inner = None if has_class(text) else _packed_in(text)
        if inner is None:
            break
        text = inner
    return text


def has_class(text: str) -> bool:
    """True if a source, or a log that prints one, has a class of settings."""
    return any(map(CLASS.match, text.splitlines()))


def _text(content: bytes) -> str:
    return content.decode("latin1" if b"latin" in content[:40] else "utf-8", errors="replace")


def _parsed(text: str) -> ast.Module:
    """The syntax tree; an empty one of what is no Python."""
    with warnings.catch_warnings(), suppress(*ERRORS):
        warnings.simplefilter("ignore")  # SyntaxWarning of the script's strings
        return ast.parse(text)
    return ast.Module([], [])


def _packed_in(text: str) -> str | None:
    values = (node.value for node in ast.walk(_parsed(text)) if isinstance(node, ast.Constant))
    literal = max((value for value in values if isinstance(value, str | bytes)), key=len, default="")
    raw = literal if isinstance(literal, bytes) else literal.encode("latin1", errors="replace")
    for decode in (base64.b85decode, base64.b64decode, bytes):
        for decompress, error in _decompressors():
            with suppress(error, EOFError, *ERRORS):
                source = decompress(decode(raw))
                if len(source) <= MAX_SOURCE and b"import" in source:
                    return _text(source)
    return None


def _decompressors() -> Iterator[tuple[Callable[[bytes], bytes], type[Exception]]]:
    """Functions that give little more than MAX_SOURCE bytes at most, each with its error."""
    most = MAX_SOURCE + 1
    with suppress(ArtifactError):
        brotli = library("brotli")
        yield lambda blob: brotli.Decompressor().process(blob, output_buffer_limit=most), brotli.error
    yield lambda blob: zlib.decompressobj(47).decompress(blob, most), zlib.error  # zlib or gzip
    for options in ({"memlimit": 2**28}, *({"format": lzma.FORMAT_RAW, "filters": [own]} for own in RAW_LZMA)):
        yield lambda blob, o=options: lzma.LZMADecompressor(**o).decompress(blob, most), lzma.LZMAError


def settings_in(text: str) -> tuple[dict[str, object], dict[str, str]]:
    """Defaults of the first class of settings in a source, or in a log that prints one, by name in lower case.

    Then the expressions that only running the script would tell, likewise.
    """
    lines, values, unread = text.splitlines(), {}, {}
    start = next((n for n, line in enumerate(lines) if CLASS.match(line)), len(lines))
    end = next((n for n, line in enumerate(lines[start + 1 :], start + 1) if re.match(r"[^\s#]", line)), len(lines))
    for statement in (line for node in _parsed("\n".join(lines[start:end])).body for line in node.body):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                try:
                    values[name.lower()] = _value(statement.value, values)
                except ERRORS:
                    unread[name.lower()] = " ".join(ast.unparse(statement.value).split())
    return values, unread


def _value(node: ast.expr, known: dict[str, object]) -> object:
    """A default: literals, arithmetic, casts, and second arguments of what reads the environment. ERRORS otherwise."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return known[node.id.lower()]
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value(item, known) for item in node.elts]
        case (
            ast.Call(func=ast.Name(id=call), args=[argument])
            | ast.Call(func=ast.Attribute(value=argument, attr=call), args=[])
        ):
            return CALLS[call](_value(argument, known))
        case ast.Call(args=[ast.Constant(value=str(name)), default, *_]) if VARIABLE.fullmatch(name):
            return _value(default, known)
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_value(operand, known))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            a, b = _value(left, known), _value(right, known)
            if isinstance(node, ast.BinOp) and not (isinstance(a, int | float) and isinstance(b, int | float)):
                raise TypeError("arithmetic of other than numbers")
            return OPERATORS[type(op)](a, b)
    raise ValueError("an expression of another kind")
