"""Parts of a Python module, selected by name and written without what does not run."""

import ast
import io
import tokenize
from collections.abc import Iterator

KEPT_METHODS = ("forward",)  # called by a library; so are those __named__ like this
KEPT_DEFINITIONS = ast.FunctionDef | ast.ClassDef
OPENERS = [getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)]
CLOSERS = [getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)]
NO_TEXT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)

Position = tuple[int, int]  # line from 1, column in characters
Needed = tuple[str, str]  # module below pgolf_core, name in it


class Module:
    """A module's source, of which `keep` and `keep_methods` select definitions and `text` is what they select."""

    def __init__(self, source: str):
        self.source = source.replace("\r\n", "\n")
        self.lines = self.source.splitlines(keepends=True)
        self.tree = ast.parse(self.source)
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, tuple[ast.stmt, ast.alias]] = {}
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    self.imported[(alias.asname or alias.name).partition(".")[0]] = (statement, alias)
            elif isinstance(statement, KEPT_DEFINITIONS):
                self.defined[statement.name] = statement
            else:
                names = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                self.defined |= dict.fromkeys(names, statement)
        self.kept: set[ast.stmt] = set()  # statements of the module, and methods
        self.aliases: set[ast.alias] = set()

    def keep(self, name: str, words: set[str]) -> list[Needed]:
        """Select what defines the name and what that needs here; returns what it needs elsewhere, adds its words."""
        if name in self.imported:
            statement, alias = self.imported[name]
            self.aliases.add(alias)
            home = getattr(statement, "module", None) or ""
            return [(home.removeprefix("pgolf_core."), alias.name)] if home.startswith("pgolf_core.") else []
        statement = self.defined.get(name)
        if statement is None or statement in self.kept:
            return []
        self.kept.add(statement)
        return self._visit(statement, words)

    def keep_methods(self, words: set[str]) -> list[Needed]:
        """Select methods of selected classes whose name is among the words; returns and adds as keep."""
        classes = [node for node in self.kept if isinstance(node, ast.ClassDef)]
        methods = [m for cls in classes for m in cls.body if isinstance(m, ast.FunctionDef) and m not in self.kept]
        chosen = [m for m in methods if m.name in words or m.name in KEPT_METHODS or m.name.startswith("__")]
        self.kept.update(chosen)
        return [needed for method in chosen for needed in self._visit(method, words)]

    def _visit(self, root: ast.stmt, words: set[str]) -> list[Needed]:
        needed: list[Needed] = []
        skipped = {node for node, _ in self._annotations(root)}
        if isinstance(root, ast.ClassDef):
            skipped |= {child for child in root.body if isinstance(child, ast.FunctionDef)}
        todo: list[ast.AST] = [root]
        while todo:
            node = todo.pop()
            todo += [child for child in ast.iter_child_nodes(node) if child not in skipped]
            if isinstance(node, ast.Name):
                words.add(node.id)
                needed += self.keep(node.id, words)
            elif isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)  # a name in quotes, for getattr
        return needed

    def _annotations(self, root: ast.AST) -> Iterator[tuple[ast.expr, Position | None]]:
        """Annotations that nothing evaluates, and the end of what they annotate; fields of classes keep theirs."""
        fields = {field for node in ast.walk(root) if isinstance(node, ast.ClassDef) for field in node.body}
        for node in ast.walk(root):
            if isinstance(node, ast.arg) and node.annotation:
                start = self._position(node.lineno, node.col_offset)
                yield node.annotation, (start[0], start[1] + len(node.arg))
            elif isinstance(node, ast.FunctionDef) and node.returns:
                yield node.returns, None
            elif isinstance(node, ast.AnnAssign) and node.value and node not in fields:
                yield node.annotation, self._position(node.target.end_lineno, node.target.end_col_offset)

    def _position(self, line: int, column: int) -> Position:
        return line, len(self.lines[line - 1].encode()[:column].decode())

    def _span(self, node: ast.AST, start: Position | None = None) -> tuple[Position, Position]:
        decorators = getattr(node, "decorator_list", None)
        first = (decorators[0].lineno, 0) if decorators else self._position(node.lineno, node.col_offset)
        return start or first, self._position(node.end_lineno, node.end_col_offset)

    def _removed(self) -> Iterator[tuple[tuple[Position, Position], str]]:
        """Spans of the source that are not written, and what is written instead."""
        for statement in self.tree.body:
            future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            if isinstance(statement, ast.Import | ast.ImportFrom) and not future:
                yield self._span(statement), self._import(statement)
            elif statement not in self.kept and not future:
                yield self._span(statement), ""
        for root in self.kept:
            yield from ((self._span(node, start), "") for node, start in self._annotations(root))
            for node in ast.walk(root):
                if isinstance(node, KEPT_DEFINITIONS):
                    yield from ((self._span(child), text) for child, text in self._dead_children(node))
                elif isinstance(node, ast.keyword) and node.arg == "description":
                    yield self._span(node), ""

    def _dead_children(self, node: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[ast.stmt, str]]:
        """The docstring, and methods that are not kept; 'pass' in place of the first if nothing would be left."""
        dead = [node.body[0]] if ast.get_docstring(node, clean=False) is not None else []
        if isinstance(node, ast.ClassDef):
            dead += [child for child in node.body if isinstance(child, ast.FunctionDef) and child not in self.kept]
        yield from ((child, "pass" if i == 0 and len(dead) == len(node.body) else "") for i, child in enumerate(dead))

    def _import(self, statement: ast.Import | ast.ImportFrom) -> str:
        names = [a.name + (f" as {a.asname}" if a.asname else "") for a in statement.names if a in self.aliases]
        module = getattr(statement, "module", None)
        return (f"from {module} import " if module else "import ") + ",".join(names) if names else ""

    def text(self) -> str:
        """The selected statements, a line per logical line, with one space of indentation per level."""
        removed = dict(self._removed())
        lines: list[str] = []
        line, level, end = "", 0, (0, 0)
        for kind, text, start in self._tokens():
            if kind in (tokenize.INDENT, tokenize.DEDENT):
                level += 1 if kind == tokenize.INDENT else -1
            elif kind == tokenize.NEWLINE:
                if line:
                    lines.append(" " * level + line)
                line = ""
            elif kind not in NO_TEXT and start >= end:
                span = next((s for s in removed if s[0] <= start < s[1]), None)
                if span is not None:
                    text, end = removed.pop(span), span[1]
                    if line.endswith(",") and not text:  # the comma before a removed argument
                        line = line[:-1]
                line = _joined(line, "" if text == "->" else text)
        return "".join(f"{line}\n" for line in lines)

    def _tokens(self) -> Iterator[tuple[int, str, Position]]:
        """Kind, text and start of each token; an f-string is one, as before Python 3.12."""
        depth, start = 0, (0, 0)
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type in OPENERS:
                start = start if depth else token.start
                depth += 1
            elif token.type in CLOSERS:
                depth -= 1
                if not depth:
                    lines = [*self.lines[start[0] - 1 : token.end[0] - 1], self.lines[token.end[0] - 1][: token.end[1]]]
                    yield tokenize.STRING, "".join(lines)[start[1] :], start
            elif not depth:
                yield token.type, token.string, token.start


def _joined(line: str, text: str) -> str:
    """Two pieces of a line, with a space between them if they would be read as one otherwise."""
    if not line or not text:
        return line + text
    words = (line[-1].isalnum() or line[-1] == "_") and (text[0].isalnum() or text[0] in "_\"'")
    strings = line[-1] in "\"'" and (text[0] in "\"'" or text[0].isalnum())
    return line + " " * (words or strings) + text
