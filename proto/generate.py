"""Generate distlock_proto/*_pb2* from the contracts, or check that what is committed is fresh.

    python proto/generate.py           write the generated files
    python proto/generate.py --check   compare only; exit 1 if any of them is stale

The compiler is the oldest supported grpcio-tools: its code loads in older and newer runtimes, while
code of a newer compiler refuses older runtimes. It has an environment of its own, `.venv-proto`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PROTO = Path(__file__).resolve().parent
ROOT = PROTO.parent
PACKAGE = "distlock_proto"
VENV = ROOT / ".venv-proto"
# grpcio-tools of that age imports pkg_resources, which newer setuptools no longer carry.
REQUIREMENTS = ("grpcio-tools==1.49.1", "setuptools<70")
# The pinned compiler has wheels for these only.
PYTHON_VERSIONS = ((3, 11), (3, 10))


def main() -> int:
    """Generate or check, as the command line asks.

    Returns:
        The exit status: 1 if generated code is stale or could not be made.
    """
    parser = argparse.ArgumentParser(description="Generate the code of the gRPC contracts.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check: bool = parser.parse_args().check

    python = find_python()
    if python is None:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHON_VERSIONS)
        doing = "the freshness check of the generated code is skipped" if check else "stopped"
        print(f"{REQUIREMENTS[0]} needs Python {wanted} and none was found: {doing}.")
        return 0 if check else 1
    with tempfile.TemporaryDirectory() as scratch:
        made = compile_contracts(prepare_compiler(python), Path(scratch))
        return report_stale(made) if check else write(made)


def find_python() -> str | None:
    """Find an interpreter that the pinned compiler has a wheel for: this one first, then PATH."""
    if sys.version_info[:2] in PYTHON_VERSIONS:
        return sys.executable
    for major, minor in PYTHON_VERSIONS:
        found = shutil.which(f"python{major}.{minor}")
        if found and runs(found, major, minor):
            return found
    return None


def runs(python: str, major: int, minor: int) -> bool:
    """Tell whether an interpreter starts (a version manager's stub may not) and is of a version."""
    code = f"import sys, venv; sys.exit(sys.version_info[:2] != ({major}, {minor}))"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def prepare_compiler(python: str) -> Path:
    """Create the compiler's environment unless it is there, and return its interpreter."""
    interpreter = VENV / "bin" / "python"
    stamp = VENV / ".installed"
    wanted = "\n".join(REQUIREMENTS)
    if not (interpreter.exists() and stamp.exists() and stamp.read_text() == wanted):
        subprocess.run([python, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--only-binary=:all:", *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return interpreter


def compile_contracts(interpreter: Path, out: Path) -> dict[str, bytes]:
    """Run the compiler over all contracts.

    Args:
        interpreter: Python of the compiler's environment.
        out: An empty folder to write to.

    Returns:
        The content of each generated file by its name.
    """
    # Relative to the -I folder, so that generated code says `from distlock_proto import x_pb2`.
    contracts = sorted(str(path.relative_to(PROTO)) for path in (PROTO / PACKAGE).glob("*.proto"))
    if not contracts:
        sys.exit(f"No .proto file in {PROTO / PACKAGE}.")
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
    command = [str(interpreter), "-W", "ignore", "-m", "grpc_tools.protoc", "-I", str(PROTO)]
    if subprocess.run([*command, *outputs, *contracts], check=False, cwd=PROTO).returncode != 0:
        sys.exit("The compiler rejected a contract; see its message above.")
    return {path.name: path.read_bytes() for path in generated_files(out / PACKAGE)}


def generated_files(folder: Path) -> Iterable[Path]:
    """List the generated files in a folder."""
    return sorted(path for path in folder.glob("*_pb2*") if path.suffix in {".py", ".pyi"})


def report_stale(made: dict[str, bytes]) -> int:
    """Say which committed files differ from those just made, and return the exit status."""
    there = {path.name: path.read_bytes() for path in generated_files(PROTO / PACKAGE)}
    stale = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if stale:
        print(f"Generated code is stale ({', '.join(stale)}): run `make proto` and commit it.")
        return 1
    print(f"Generated code is fresh: {len(made)} files.")
    return 0


def write(made: dict[str, bytes]) -> int:
    """Replace the generated files by those just made, and return the exit status."""
    for path in generated_files(PROTO / PACKAGE):
        if path.name not in made:
            path.unlink()
    for name, content in made.items():
        (PROTO / PACKAGE / name).write_bytes(content)
    print(f"Generated {len(made)} files in {PACKAGE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
