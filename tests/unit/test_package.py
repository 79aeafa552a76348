"""The package's front page: its names, what importing it costs, and joblib's knowledge of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import run_once


def run(program: str) -> str:
    """Run a program in a fresh interpreter; give its output."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_lists_agree() -> None:
    """The names for type checkers, for `import *` and for lazy import are the same."""
    tree = ast.parse(Path(run_once.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: (node.module or "").removeprefix("run_once.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("run_once.")
        for alias in node.names
    }
    assert typed == run_once._HOMES
    assert set(run_once.__all__) == {*run_once._HOMES, "__version__"}
    assert set(dir(run_once)) >= set(run_once.__all__)


def test_every_name_is_there() -> None:
    """Each public name can be imported; any other is an AttributeError."""
    for name in run_once.__all__:
        assert getattr(run_once, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = run_once.no_such_name


def test_import_is_light() -> None:
    """Neither `import run_once` nor the use of the loop's name loads gRPC, joblib or numpy."""
    watched = "{'grpc', 'joblib', 'numpy', 'tqdm', 'click'} & set(sys.modules)"
    assert run(f"import sys, run_once; print({watched})") == "set()"
    program = f"import sys, run_once; run_once.DistributedIterator; print({watched})"
    assert run(program) == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import run_once; import joblib",
        "import joblib; import run_once",
        "import run_once; from joblib.parallel import BACKENDS",
        "import run_once; import importlib; importlib.import_module('joblib')",
    ],
)
def test_joblib_knows_the_backend(imports: str) -> None:
    """Whichever is imported first, joblib knows the name; nothing is left in the import system."""
    program = f"""{imports}
import sys, joblib.parallel
assert "run_once" in joblib.parallel.BACKENDS
assert "run_once.joblib_backend" not in sys.modules
assert not any("run_once" in type(finder).__module__ for finder in sys.meta_path)
assert "_Loader" not in repr(joblib.parallel.__spec__.loader)
import joblib
backend = joblib.parallel.BACKENDS["run_once"](nesting_level=0)
print(type(backend).__module__, type(backend).__name__)
"""
    assert run(program) == "run_once.joblib_backend RunOnceBackend"
