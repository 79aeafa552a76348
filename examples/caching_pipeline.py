"""A caching pipeline: each output is computed and uploaded once, and downloaded by everybody else.

    python examples/caching_pipeline.py --bucket bucket

The bucket is a folder here; object storage works the same. It must last as long as the lock
server's database, which says of each output whether it was uploaded.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import platformdirs

from run_once import Status, run_once

BUCKET = Path(platformdirs.user_data_dir("run-once-example", appauthor=False)) / "bucket"
"""Beside the database of this machine's own server, so that it lasts as long."""


def compute(url: str) -> bytes:
    """Stand for work that takes long."""
    data = url.encode()
    for _ in range(1_000):
        data = hashlib.sha256(data).digest()
    return data


def upload(path: Path, data: bytes) -> None:
    """Put an output into the bucket."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def download(path: Path) -> bytes:
    """Fetch an output from the bucket."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SystemExit(
            f"{path} was uploaded before, and is gone now; have all outputs computed again:\n"
            f"    run-once reset --prefix={path.parent.as_uri()}/"
        ) from None


def main() -> None:
    """Go through the URLs, and say what was computed here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--urls", type=int, default=20, help="number of URLs")
    parser.add_argument("--bucket", type=Path, default=BUCKET, help="default: %(default)s")
    options = parser.parse_args()
    computed, downloaded, left = 0, 0, 0
    for number in range(options.urls):
        path = options.bucket.absolute() / f"{number:04d}"
        url = path.as_uri()

        @run_once(url, timeout=60, version=0)
        def work(url: str = url, path: Path = path) -> bytes:
            output = compute(url)
            upload(path, output)
            return output

        status, output = work()
        if status is Status.COMPUTE_OK:
            computed += 1  # the value is here
        elif status is Status.SKIP_OK:
            output = download(path)
            downloaded += 1
        elif status is Status.SKIP_IN_PROGRESS:
            left += 1  # another works on it: go on with the next
            continue
        elif status is Status.COMPUTE_ERROR:
            left += 1  # logged, and anyone may try again
            continue
        assert output is not None
        assert output == compute(url)
    print(f"computed: {computed}; downloaded: {downloaded}; left to others: {left}")


if __name__ == "__main__":
    main()
