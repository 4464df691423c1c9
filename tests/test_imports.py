"""The layers: imports point down only, and what must stay light does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff
import fastdiff.kernels

PACKAGE = Path(fastdiff.__file__).parent
KERNELS = Path(fastdiff.kernels.__file__).parent
# a part may import itself and what stands in a row below its own
ROWS = [
    {"cli"},
    {"cli_options"},
    {"demo", "benchmark"},
    {"pipeline"},
    {"reporting"},
    {"comparison"},
    {"annotation"},
    {"analysis", "attribution"},
    {"patching"},
    {"crosscoder", "extraction"},
    {"store", "tracking"},
    {"results"},
    {"rundir"},
    {"progress", "device", "memory", "interrupt"},
    {"config"},
    {"errors"},
    {"kernels", "_native"},
]
RANK = {name: i for i, row in enumerate(ROWS) for name in row}
FILES = sorted({*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")})


def part(path: Path) -> str:
    """The part of fastdiff that a file belongs to; "" is the package's own __init__."""
    if path.is_relative_to(KERNELS):
        return "kernels"
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if top == "__init__" else top


def imported(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a file; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
    return found


def wrong_imports(of: str, tree: ast.Module) -> list[str]:
    """Imports within fastdiff that do not point down."""
    wrong = []
    for line, name in imported(tree):
        if name.startswith("."):
            wrong.append(f"line {line}: relative import")
        if name.split(".")[0] in ("kernels", "csrc"):
            wrong.append(f"line {line}: {name} is not the installed package")
        if not name.startswith("fastdiff."):
            continue
        target = name.split(".")[1]
        if target in ("__version__", of):
            continue
        if target not in RANK:
            wrong.append(f"line {line}: {target} has no row")
        elif of == "" or RANK[target] <= RANK[of]:
            wrong.append(f"line {line}: {of} imports {target}")
        elif of == "kernels":
            wrong.append(f"line {line}: kernels know nothing of fastdiff")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{part(path)}-{path.stem}")
def test_imports_point_down(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert part(path) == "" or part(path) in RANK
    assert wrong_imports(part(path), tree) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{part(path)}-{path.stem}")
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("of", "code"),
    [
        ("store", "from fastdiff.extraction.harvest import extract"),
        ("store", "def f():\n    import fastdiff.crosscoder.train"),
        ("extraction", "from fastdiff.crosscoder import model"),
        ("store", "from . import reader"),
        ("kernels", "from fastdiff.errors import InputError"),
        ("crosscoder", "from kernels import ops"),
        ("rundir", "from fastdiff import store"),
        ("", "from fastdiff import errors"),
    ],
)
def test_a_wrong_import_would_be_seen(of, code):
    assert wrong_imports(of, ast.parse(code))


def test_the_walk_sees_the_whole_package():
    assert {part(path) for path in FILES} - {""} == set(RANK) - {"_native"}


def test_kernels_init_is_a_docstring_and_nothing_else():
    body = ast.parse((KERNELS / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fastdiff.cli", ["torch", "pydantic", "numpy", "rich", "yaml", "transformers"]),
        (
            "import pkgutil, importlib, fastdiff.reporting as r\n"
            "for m in pkgutil.iter_modules(r.__path__): importlib.import_module('fastdiff.reporting.' + m.name)",
            ["torch"],
        ),
        (
            "import pkgutil, importlib, fastdiff.results as r\n"
            "for m in pkgutil.iter_modules(r.__path__): importlib.import_module('fastdiff.results.' + m.name)",
            ["torch"],
        ),
        ("import fastdiff.rundir, fastdiff.config, fastdiff.progress", ["torch", "numpy"]),
        ("import fastdiff.kernels", ["torch", "triton"]),
    ],
    ids=["cli", "report", "results", "foundation", "kernels"],
)
def test_what_must_stay_light_does_not_import(code, absent):
    code += f"\nimport sys; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
