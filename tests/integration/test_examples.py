"""The examples, run as they stand, as processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run_once.local import DEFAULT_ADDRESS
from tests.other_client import Other, until
from tests.servers import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 100.0

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="examples are not installed")


def start(name: str, *arguments: str, address: str | None = None) -> subprocess.Popen[str]:
    """Start an example."""
    environment = {**os.environ} | ({"RUN_ONCE_ADDRESS": address} if address else {})
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
    )


def output(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> str:
    """Wait for an example to end well; give its output."""
    try:
        text, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, text
    return text


def numbers(text: str) -> list[int]:
    """Give the numbers of an example's last line."""
    last = text.strip().splitlines()[-1].replace(",", "")
    return [int(number) for number in re.findall(r"\d+", last)]


def test_loop_100k(server: ServerProcess) -> None:
    """Three processes share the loop over 100,000 keys; a fourth finds all of them done.

    Most keys are made done in bulk first, all over the list, so that the test takes seconds.
    """
    keys = [f"\x1eexample-loop\x1fitem/{number:06d}" for number in range(100_000)]
    left = set(keys[:300]) | set(keys[::250]) | set(keys[-300:])
    other = Other(server.address)
    other.finish(*(key for key in keys if key not in left))
    done = [
        numbers(output(process))
        for process in [start("loop_100k.py", address=server.address) for _ in range(3)]
    ]
    assert sum(here for here, _ in done) == len(left)
    assert other.client.count(namespace="example-loop").done == 100_000
    assert numbers(output(start("loop_100k.py", address=server.address))) == [0, 100_000]
    other.client.close()


@pytest.mark.soak
def test_loop_100k_from_nothing(server: ServerProcess) -> None:
    """Three processes do all of the 100,000 keys, none of them twice."""
    processes = [start("loop_100k.py", address=server.address) for _ in range(3)]
    done = [numbers(output(process, timeout_s=3_000)) for process in processes]
    assert sum(here for here, _ in done) == 100_000
    other = Other(server.address)
    assert other.client.count(namespace="example-loop").done == 100_000
    other.client.close()


def test_loop_notify(server: ServerProcess) -> None:
    """Succeeded keys are done, failed ones are tried again by the next run, and by it alone."""
    assert numbers(output(start("loop_notify.py", address=server.address))) == [86, 14]
    assert numbers(output(start("loop_notify.py", address=server.address))) == [0, 14]


def test_loop_decorator(server: ServerProcess) -> None:
    """Each call of the first run computes, each of the second is skipped."""
    first = output(start("loop_decorator.py", address=server.address))
    assert first.strip().endswith("COMPUTE_OK: 100")
    second = output(start("loop_decorator.py", address=server.address))
    assert second.strip().endswith("SKIP_OK: 100")


def test_caching_pipeline(server: ServerProcess, tmp_path: Path) -> None:
    """Two at once compute each output once between them; a third downloads all."""
    bucket = f"--bucket={tmp_path / 'bucket'}"
    both = [start("caching_pipeline.py", bucket, address=server.address) for _ in range(2)]
    counts = [numbers(output(process)) for process in both]
    assert sum(computed for computed, _, _ in counts) == 20
    third = output(start("caching_pipeline.py", bucket, address=server.address))
    assert numbers(third) == [0, 20, 0]


def test_caching_pipeline_without_its_bucket(server: ServerProcess, tmp_path: Path) -> None:
    """The bucket lasts like the database by default; one that is gone is a sentence."""
    assert numbers(output(start("caching_pipeline.py", address=server.address))) == [20, 0, 0]
    (bucket,) = tmp_path.glob("home/**/bucket")
    assert numbers(output(start("caching_pipeline.py", address=server.address))) == [0, 20, 0]
    shutil.rmtree(bucket)
    process = start("caching_pipeline.py", address=server.address)
    text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "is gone now" in text
    assert "Traceback" not in text
    command = text.strip().splitlines()[-1].split()
    assert command[:2] == ["run-once", "reset"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "run_once.cli",
            *command[1:],
            "--yes",
            f"--address={server.address}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "reset 20" in done.stdout
    assert numbers(output(start("caching_pipeline.py", address=server.address))) == [20, 0, 0]


def test_demo_loop_alone(server: ServerProcess) -> None:
    """Without a file to write to, the hashes are printed."""
    lines = output(start("demo_loop.py", address=server.address)).splitlines()
    assert len({json.loads(line)["file"] for line in lines}) == len(lines) > 100


def test_demo_grid_warns_of_nothing(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's search gives run-once no reason to warn."""
    monkeypatch.setenv("RUN_ONCE_NAMESPACE", "grid")
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import demo_grid, joblib\n"
        "demo_grid.GRID.update(C=[1.0], gamma=[0.001], kernel=['rbf'])\n"
        "with joblib.parallel_config('run_once', inner='threading'): demo_grid.search(2)"
    )
    environment = {**os.environ, "RUN_ONCE_ADDRESS": server.address}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("ps") is None, reason="the process table is read with ps")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_ends_all_it_started(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end, the demo takes its server, searches and workers with it, without a traceback."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    demo = start("demo.py")
    try:
        until(lambda: any("demo_grid.py" in line for line in _processes(str(tmp_path))))
        groups = [line.split()[0] for line in _processes(str(tmp_path))]
        assert len(groups) >= 2, "a server and a search"
        demo.send_signal(number)
        text, _ = demo.communicate(timeout=TIMEOUT_S)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 128 + number
    assert "Traceback" not in text
    until(lambda: not [line for line in _processes("") if line.split()[0] in groups])
    assert not list(tmp_path.glob("run-once-demo-*"))


def _processes(text: str) -> list[str]:
    """Give group and command of every process that runs and whose command contains a text."""
    done = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    return [
        line
        for line in done.stdout.splitlines()
        if text in line and not line.split()[1].startswith("Z")
    ]


def test_demo_table_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's table says why more fits were begun than wanted, in columns."""
    demo = load_demo(monkeypatch)
    events = demo.Events(tmp_path / "events")
    done = [("A", "one"), ("A", "two"), ("B2", "three")]
    events.seen = [
        {"what": what, "label": label, "pid": 1, "fit": fit, "fold": "x"}
        for what, label, fit in [
            ("start", "B", "three"),
            *((what, *fit) for fit in done for what in ("start", "end")),
        ]
    ]
    for label in ("plain", "A", "B2"):
        (tmp_path / f"scores_{label}.json").write_text('{"scores": {}}')
    demo.report_grid(demo.Demo(tmp_path, 0.0), events, total=3)
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    for line in (
        "B 1 0 killed",
        "in all 4 3 the kill cut 1 off",
        "wanted 3 3",
        "repeated 1 begun once more because of the kill",
        "ok all 3 fits were done",
    ):
        assert line in lines
    ends = {re.match(r"  \w+(?: all)? +\d+", row) for row in said.splitlines()[2:8]}
    assert {match.end() for match in ends if match} == {25}


def test_demo_shows_a_line_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many fits there are, a line a second says how many are done and who fits what."""
    now_s = 0.0
    events = load_demo(monkeypatch).Events(tmp_path / "events", lambda: now_s)
    with events.path.open("a") as file:
        for fit in range(50):
            for what in ("start", "end"):
                event = {"what": what, "label": "AB"[fit % 2], "fit": f"C={fit}", "fold": "x"}
                file.write(json.dumps(event) + "\n")
    events.show(250)
    assert capsys.readouterr().out == ""
    now_s = 1.5
    for _ in range(5):
        events.show(250)
    assert capsys.readouterr().out == ("   50/250 done  A fits C=48 fold 1 | B fits C=49 fold 1\n")


def load_demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the demo as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


def test_nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing configured an example works, says so in one line, and its work is kept."""
    with socket.socket() as probe:
        host, _, port = DEFAULT_ADDRESS.partition(":")
        if probe.connect_ex((host, int(port))) == 0:
            pytest.skip(f"something listens on {DEFAULT_ADDRESS}")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "KUBERNETES_", "JOB_COMPLETION_INDEX")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUN_ONCE_IDLE_EXIT_S", "60")
    try:
        first = output(start("loop_100k.py", "--keys=50"))
        assert first.count("run-once: started this machine's own lock server") == 1
        assert numbers(first) == [50, 0]
        second = output(start("loop_100k.py", "--keys=50"))
        assert "started" not in second
        assert "run-once: all 50 keys were done before (namespace example-loop)" in second
        assert numbers(second) == [0, 50]
    finally:
        for note in tmp_path.rglob("server.json"):
            os.kill(json.loads(note.read_text())["pid"], signal.SIGTERM)
