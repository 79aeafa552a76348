"""Who may import whom, read from the source: no module is imported for it."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

# state.py is a function of its arguments: nothing that reads a clock, a file, a socket or chance.
PURE_MODULES = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "types",
    "typing",
}
MAY_PRINT = {"cli.py", "progress.py"}
FORBIDDEN_CALLS = {"print", "basicConfig", "dictConfig", "fileConfig"}


def _package(name: str) -> Path:
    """Find the folder of a package, in the tree or installed, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.origin is not None, f"{name} has no __init__.py"
    return Path(spec.origin).parent


def _sources(package: str) -> list[Path]:
    sources = sorted(_package(package).rglob("*.py"))
    assert sources, f"{package} has no source"
    return sources


def _imports(source: Path, package: str) -> Iterator[str]:
    """Yield the full dotted name of everything that a module imports, inside functions too."""
    parts = (package, *source.relative_to(_package(package)).with_suffix("").parts)
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            yield from (
                str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)
            )


def _called(node: ast.Call) -> str:
    """Return the last part of the name that is called, or nothing if it has none."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _reached(source: Path, package: str) -> dict[str, str]:
    """Return what a module imports, through its neighbours in the package too, and by whom."""
    reached: dict[str, str] = {}
    seen: set[Path] = set()
    waiting = [source]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in _imports(current, package):
            reached.setdefault(name, current.name)
            waiting.extend(_neighbours(name, package))
    return reached


def _neighbours(name: str, package: str) -> Iterator[Path]:
    """Yield the file of our own package that an imported name is, or is defined in."""
    first, *rest = name.split(".")
    if first == package:
        for length in range(1, len(rest) + 1):
            file = _package(package).joinpath(*rest[:length]).with_suffix(".py")
            if file.exists():
                yield file


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("run_once", {"distlock_server"}),
        ("distlock_server", {"run_once"}),
        ("distlock_proto", {"run_once", "distlock_server"}),
    ],
)
def test_packages_keep_apart(package: str, forbidden: set[str]) -> None:
    """Client and server never import each other, and the contracts import neither."""
    wrong = [
        f"{source.name} imports {name}"
        for source in _sources(package)
        for name in _imports(source, package)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong


def test_rules_are_pure() -> None:
    """distlock_server/state.py imports pure modules of the standard library, and nothing else."""
    source = _package("distlock_server") / "state.py"
    imported = {name.split(".")[0] for name in _imports(source, "distlock_server")}
    assert imported <= PURE_MODULES


def test_keys_know_no_transport() -> None:
    """run_once/keys.py reaches neither gRPC nor the contracts, through its neighbours or itself."""
    reached = _reached(_package("run_once") / "keys.py", "run_once")
    wrong = {
        name: by
        for name, by in reached.items()
        if name.split(".")[0] in {"grpc", "google", "distlock_proto"}
    }
    assert not wrong


def test_library_is_silent() -> None:
    """Nothing in run_once prints or configures logging, except the command and the progress."""
    wrong = [
        f"{source.name}:{node.lineno} calls {_called(node)}"
        for source in _sources("run_once")
        if source.name not in MAY_PRINT
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _called(node) in FORBIDDEN_CALLS
    ]
    assert not wrong


def test_no_condition_is_entered() -> None:
    """Locks are entered, not the conditions on them: those are Python, and Ctrl-C may cut them."""
    sources = [
        (source, ast.parse(source.read_text(encoding="utf-8"))) for source in _sources("run_once")
    ]
    wrong = []
    for source, tree in sources:
        conditions = {
            ast.unparse(node.targets[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _called(node.value).endswith("Condition")
        }
        wrong += [
            f"{source.name}:{item.context_expr.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
            if ast.unparse(item.context_expr) in conditions
        ]
    assert not wrong
