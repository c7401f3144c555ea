"""Python source taken apart without importing it: docstrings on one side, code without comments on the other."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

_Block = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Group 1 is a string literal, kept so that a '#' in it is no comment. A regular expression, because walking every node
# of the tree for literals takes four times as long as parsing. The prefix does not matter: a raw string ends where a
# plain one does.
_STRING_OR_COMMENT = re.compile(
    r'("""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^\\"\n])*"|\'(?:\\.|[^\\\'\n])*\')|[ \t]*#[^\n]*',
    re.DOTALL,
)

_WORD = re.compile(r"[A-Za-z_]{3,}")
_NAME = re.compile(r"\b[A-Za-z_]{2,}")


@dataclass(frozen=True)
class PythonParts:
    """``code`` is "" where it would be mostly string literals (character tables, embedded texts)."""

    docstrings: tuple[str, ...]
    code: str


def take_apart(source: str) -> PythonParts:
    """Raises SyntaxError or ValueError for text that is no Python of this version."""
    source = source.replace("\f", " ")
    found = list(_docstrings(ast.parse(source)))
    texts = [node.value.value for node, _ in found if isinstance(node.value, ast.Constant)]
    return PythonParts(tuple(text for text in texts if isinstance(text, str)), _bare_code(source, found))


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, bool]]:
    """(docstring statement, is it the whole body of a class or function); looks into statements only."""
    blocks: list[ast.AST] = [tree]
    while blocks:
        block = blocks.pop()
        body: list[ast.stmt] = getattr(block, "body", [])
        if isinstance(block, _Block) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield body[0], len(body) == 1 and block is not tree
        for part in ("finalbody", "orelse", "handlers", "body"):
            nested = getattr(block, part, ())
            blocks += reversed(nested) if isinstance(nested, list) else ()


def _bare_code(source: str, docstrings: list[tuple[ast.Expr, bool]]) -> str:
    # comments never span lines, so the positions of docstrings stay true; ast counts columns in UTF-8 bytes
    original = source.encode().split(b"\n")
    lines = _STRING_OR_COMMENT.sub(r"\1", source).encode().split(b"\n")
    for node, alone in docstrings:
        _remove_statement(lines, original, node, alone)
    pairs = zip(lines, original, strict=True)
    kept = [line.rstrip() for line, before in pairs if line.strip() or not before.strip()]
    code = b"\n".join(kept).decode().strip("\n")
    return f"{code}\n" if _is_mostly_words(code) else ""


def _is_mostly_words(code: str) -> bool:
    """Names and keywords outside literals are about two thirds of the ink of code, and next to nothing of a table's."""
    words = sum(map(len, _NAME.findall(_STRING_OR_COMMENT.sub("", code))))
    return words > 0.4 * len("".join(code.split()))


def _remove_statement(lines: list[bytes], original: list[bytes], node: ast.Expr, alone: bool) -> None:
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset or 0 :]
    lines[first : last + 1] = [b""] * (last + 1 - first)
    original[first : last + 1] = [b"-"] * (last + 1 - first)  # blank lines inside the docstring go with it
    # a docstring that is the whole body, or shares its line ("def f(): 'text'"), leaves a statement behind
    if alone or before.strip() or after.strip():
        lines[first] = before + b"pass" + after
