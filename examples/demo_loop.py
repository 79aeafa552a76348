"""The demo's loop: hash every .py file of Python's standard library, each file once.

    python examples/demo_loop.py --label A --out hashes_a.jsonl

Run it on as many machines as you like; together they do the list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

from run_once import DistributedIterator


def library_files() -> list[str]:
    """Give the .py files of the standard library, relative to its folder, without site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(str(path) for path in found if "site-packages" not in path.parts)


def main() -> None:
    """Hash files and write one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="A", help="name of this process in the demo's output")
    parser.add_argument("--out", type=Path, help="file that the hashes are written to")
    parser.add_argument("--wait", action="store_true", help="stay until every file is hashed")
    arguments = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    with arguments.out.open("a", buffering=1) if arguments.out else nullcontext(sys.stdout) as out:
        for name in DistributedIterator(
            library_files(), namespace="demo-loop", wait=arguments.wait
        ):
            digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
            out.write(json.dumps({"label": arguments.label, "file": name, "sha256": digest}) + "\n")


if __name__ == "__main__":
    main()
