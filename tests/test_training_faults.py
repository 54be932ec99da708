"""What may happen to a training on a cluster: the run ends with a sentence or goes on, and nothing saved is lost."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from orl_faces import need
from test_interrupted import ROOT, begun, command, ended, steps, when

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def faces():
    need("orl", "centerface")


def children(pid):
    """Processes that a process has begun, and whose they are."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
    return found


def gone(pid, seconds=60):
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.2)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("who", ["first", "second"])
def test_where_one_process_is_killed_the_other_ends_and_the_run_goes_on(who, tmp_path):
    process = begun("sdn", tmp_path / "run", "ddp-cpu", 1000)
    when(tmp_path / "run", process, 2)
    second = next(pid for pid, words in children(process.pid).items() if b"fit" in words)
    os.kill(process.pid if who == "first" else second, signal.SIGKILL)
    told = ended(process, -9)  # Lightning ends the others so
    assert who == "first" or "terminated with code -9" in told
    assert gone(second)
    done = steps(tmp_path / "run")
    assert 2 <= done < 1000
    ended(begun("sdn", tmp_path / "run", "ddp-cpu", done + 2), 0)
    assert steps(tmp_path / "run") == done + 2


def test_a_worker_that_dies_is_told_and_the_run_goes_on(tmp_path):
    process = begun("sdn", tmp_path / "run", "cpu", 1000)
    when(tmp_path / "run", process, 2)
    workers = [pid for pid, words in children(process.pid).items() if b"fit" in words or words == [b""]]
    os.kill(workers[0], signal.SIGKILL)
    told = ended(process, 1)
    assert "DataLoader worker" in told.strip().splitlines()[-1]
    assert "Traceback" not in told
    done = steps(tmp_path / "run")
    assert done >= 2
    ended(begun("sdn", tmp_path / "run", "cpu", done + 2), 0)
    assert steps(tmp_path / "run") == done + 2


def test_without_its_server_wandb_logs_offline(tmp_path):
    words = [*command("sdn", tmp_path / "run", steps=2), "--config", "configs/trainer/wandb.yaml"]
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    for name in ("WANDB_MODE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "127.0.0.1:9 cannot be reached" in done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert steps(tmp_path / "run") == 2


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path):
    """On a file system of its own, which holds one checkpoint and no second beside it."""
    ended(begun("sdn", tmp_path / "one", "cpu", 1), 0)
    size = sum(path.stat().st_size for path in (tmp_path / "one" / "checkpoints").iterdir())
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    room = tmp_path / "run"
    room.mkdir()
    if shutil.which("unshare") is None or subprocess.run([*own, f"mount -t tmpfs none {room}"], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    words = " ".join(map(str, command("sdn", room, steps=6)))
    script = (
        f"mount -t tmpfs -o size={int(1.5 * size)} none {room} && {words}; echo code $?; cp -r {room} {tmp_path}/kept"
    )
    done = subprocess.run([*own, script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "code 1" in done.stdout, done.stderr[-2000:]
    assert "error: " in done.stderr.strip().splitlines()[-1]
    assert "cannot be written" in done.stderr or "No space left" in done.stderr
    saved = steps(tmp_path / "kept")
    assert 1 <= saved < 6
    assert not list((tmp_path / "kept" / "checkpoints").glob(".*.part"))
    ended(begun("sdn", tmp_path / "kept", "cpu", saved + 2), 0)
    assert steps(tmp_path / "kept") == saved + 2
