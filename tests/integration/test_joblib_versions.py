"""The joblib backend with other releases: each in an environment of its own, with this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import joblib
import pytest

from tests.joblib_suite.runner import run_suite
from tests.servers import ServerProcess

pytestmark = pytest.mark.soak

ROOT: Final = Path(__file__).parents[2]
INSTALL_LIMIT_S: Final = 600.0
TESTS_LIMIT_S: Final = 1200.0
TESTS: Final = ("pytest", "pytest-timeout", "numpy")
AT_LEAST: Final = {"loky": 140, "threading": 120}

JOBLIBS: Final = [
    release for release in ("1.4", "1.5", "1.6") if not joblib.__version__.startswith(f"{release}.")
]
"""Supported releases beside the one that the other tests run with."""

BACKEND_TESTS: Final = (
    "test_joblib_backend.py",
    "test_joblib_faults.py",
    "test_joblib_outcomes.py",
    "test_joblib_short_calls.py",
    "test_inner_backends.py",
)


class Environment(NamedTuple):
    """An environment with this project, not editable, and a copy of its tests.

    Attributes:
        python: Its interpreter.
        folder: Holds the tests, and no package of ours beside them.
    """

    python: Path
    folder: Path

    def run(self, *arguments: str, limit_s: float = TESTS_LIMIT_S) -> str:
        """Run its interpreter in the folder; give what it printed.

        Raises:
            AssertionError: It failed; the message shows the end of what it printed.
        """
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-10_000:]
        return done.stdout

    def test(self, *arguments: str) -> str:
        """Run tests of ours; give the last line."""
        output = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        return output.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def users_environment() -> dict[str, str]:
    """Give the variables of the user, whom pip's configuration belongs to; each test hides them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def make_environment(
    users_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Environment]:
    """Give a function that makes an environment with an extra of the project, and requirements."""

    def make(extra: str, *requirements: str) -> Environment:
        if not (ROOT / "run_once").is_dir():
            pytest.skip("it installs the project from its tree, which is not beside the tests")
        monkeypatch.delenv("PYTHONPATH", raising=False)
        environment = Environment(tmp_path / "venv" / "bin" / "python", tmp_path / "tree")
        environment.folder.mkdir()
        shutil.copy(ROOT / "pyproject.toml", environment.folder)
        shutil.copytree(ROOT / "tests", environment.folder / "tests")
        venv.create(tmp_path / "venv", with_pip=True)
        project = f"{ROOT}[{extra}]"
        _install(environment.python, users_environment, project, *requirements, *TESTS)
        origin = environment.run("-c", "import run_once; print(run_once.__file__)")
        assert Path(origin.strip()).is_relative_to(tmp_path / "venv")
        return environment

    return make


def _install(python: Path, variables: dict[str, str], *requirements: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", *requirements],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stdout.strip().rpartition("\n")[2]
        pytest.skip(f"pip cannot install {', '.join(requirements[1:])} here: {reason}")


def installed(environment: Environment, package: str) -> str:
    """Give the version of a package."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return environment.run("-c", code).strip()


@pytest.mark.parametrize("release", JOBLIBS)
def test_joblib(
    release: str,
    make_environment: Callable[..., Environment],
    server: ServerProcess,
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    """Its own tests of `Parallel` pass, and ours of the backend."""
    environment = make_environment("dask", f"joblib=={release}.*")
    version = installed(environment, "joblib")
    assert version.startswith(f"{release}.")
    for like, at_least in AT_LEAST.items():
        counts = run_suite(like, "only", server.address, tmp_path, python=str(environment.python))
        report(f"joblib {version}, its test_parallel in the place of {like}: {counts}")
        assert counts.failed == [], counts.output[-10_000:]
        assert counts.passed >= at_least
    files = [f"tests/integration/{name}" for name in BACKEND_TESTS]
    report(f"joblib {version}, our tests of the backend: {environment.test(*files)}")


def test_ray(make_environment: Callable[..., Environment], report: Callable[[str], None]) -> None:
    """Our tests of inner backends, with ray."""
    environment = make_environment("ray")
    ended = environment.test("tests/integration/test_inner_backends.py", "-k", "ray")
    report(f"ray {installed(environment, 'ray')}: {ended}")
    assert "skipped" not in ended


def test_sklearn(
    make_environment: Callable[..., Environment], report: Callable[[str], None]
) -> None:
    """Keys of estimators, and searches that are shared and killed, with the oldest scikit-learn."""
    environment = make_environment("sklearn", "scikit-learn==1.4.*", "numpy<2")
    ended = environment.test(
        "tests/integration/test_sklearn_keys.py",
        "tests/integration/test_acceptance_joblib.py",
    )
    report(f"scikit-learn {installed(environment, 'scikit-learn')}: {ended}")
