"""A linter for defects in kernels that neither compiler nor interpreter reports.

    python -m dmd2_kernels.lint [FOLDER ...]

Each rule is for a silent defect: bfloat16 arithmetic that the interpreter does on bit patterns, masked lanes that are
undefined on a GPU, offsets that overflow int32, sums whose order differs between runs.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FORBIDDEN = {
    "autotune": "no autotuning: a launch is a function of the shape alone, on every rank",
    "heuristics": "no heuristics: the launch table is explicit",
    "libdevice": "no libdevice: the interpreter has none",
    "inline_asm_elementwise": "no inline assembly: the interpreter has none",
}


class Finding(NamedTuple):
    """One line that breaks a rule."""

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


def _is_tl(node: ast.AST, name: str) -> bool:
    """Whether the node is a call of tl.NAME."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
    )


def _cast(parent: ast.AST | None) -> bool:
    return isinstance(parent, ast.Attribute) and parent.attr == "to"


def _call_findings(node: ast.Call, parent: ast.AST | None, grandparent: ast.AST | None) -> Iterator[tuple[int, str]]:
    keywords = {keyword.arg for keyword in node.keywords}
    if _is_tl(node, "load"):
        if not _cast(parent):
            yield node.lineno, "tl.load is not cast at once: write tl.load(...).to(ACC)"
        if ("mask" in keywords or len(node.args) > 1) and "other" not in keywords:
            yield node.lineno, "masked tl.load without other=: its masked lanes are undefined on a GPU"
    if _is_tl(node, "program_id"):
        call = grandparent if _cast(parent) else None
        widened = isinstance(call, ast.Call) and call.args and ast.unparse(call.args[0]) == "tl.int64"
        if not widened:
            yield node.lineno, "tl.program_id is not widened: write tl.program_id(0).to(tl.int64)"
    if isinstance(node.func, ast.Attribute) and node.func.attr.startswith("atomic_"):
        yield node.lineno, f"{node.func.attr}: no atomics, sums have one order"


def findings(source: str, path: str) -> list[Finding]:
    """The findings in one file of kernels."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parent = parents.get(node)
            found += _call_findings(node, parent, parents.get(parent) if parent else None)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton.language"):
            found.append((node.lineno, "names imported from triton.language: the interpreter patches tl.* only"))
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in _FORBIDDEN:
                found.append((node.lineno, _FORBIDDEN[name]))
    return [Finding(path, line, rule) for line, rule in sorted(found)]


def main(argv: list[str] | None = None) -> int:
    """Print the findings in all files of the folders; return 1 if there are any, 2 without a file."""
    folders = [Path(arg) for arg in (sys.argv[1:] if argv is None else argv)] or [Path(__file__).parent / "ops"]
    files = [file for folder in folders for file in (sorted(folder.rglob("*.py")) if folder.is_dir() else [folder])]
    if not files:
        print(f"no Python file in {', '.join(map(str, folders))}")
        return 2
    found = [finding for file in files for finding in findings(file.read_text(), str(file))]
    for finding in found:
        print(finding)
    print(f"{len(files)} files, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
