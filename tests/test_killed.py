"""A comparison that is killed goes on where it was, and ends as if it had never been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_guards import Honest

ROOT = Path(__file__).resolve().parent.parent


class EndsSuddenly(Honest):
    """The comparison is killed in a call of which the environment says the number."""

    calls = 0

    def end_at(self, verb, *processes):
        EndsSuddenly.calls += 1
        if os.environ.get("END_AT") == f"{verb} {EndsSuddenly.calls}":
            for process in (*processes, os.getpid()):
                os.kill(process, signal.SIGKILL)

    def anonymize(self, face, key):
        self.end_at("anonymize")
        return super().anonymize(face, key)

    def recover(self, face, key):
        self.end_at("recover", os.getppid())  # the comparison; this is the process that opens
        return super().anonymize(face, key)


def keyveil_compare(plan, out, end_at=""):
    """In a process of its own."""
    command = [sys.executable, "-m", "experiments.cli", "compare", str(plan), "--out", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "END_AT": end_at, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def saved(out):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("*.png") if "faces" in path.parts}


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    plan, out, unbroken = tmp_path / "plan.yaml", tmp_path / "out", tmp_path / "unbroken"
    told = {
        "size": 64,
        "faces": 12,
        "batch_size": 2,
        "wrong_keys": 2,
        "judges": {"mobilefacenet": {"class_path": "lightning_modules.judges.OwnNetwork"}},
        "data": {"noise": {"class_path": "conftest.NoiseFaces"}},
        "methods": {"signs": {"class_path": "test_killed.EndsSuddenly"}},
    }
    plan.write_text(json.dumps(told))
    before, counts = {}, []
    # calls of anonymize: two of the guard, then two a batch; of recover: five keys a batch
    for end_at in ("anonymize 9", "recover 8"):
        done = keyveil_compare(plan, out, end_at)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert not (out / "results.jsonl").exists()
        after = saved(out)
        assert after.items() >= before.items()  # what was there was not written again
        before, counts = after, [*counts, len(after)]
    assert counts == [12 + 6 + 6, 12 + 24 + 5 * 2 + 2 * 2]
    done = keyveil_compare(plan, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(out).items() >= before.items()
    assert keyveil_compare(plan, unbroken).returncode == 0
    assert set(saved(out)) == set(saved(unbroken))
    for name in saved(out):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    lines = [(folder / "results.jsonl").read_text().splitlines() for folder in (out, unbroken)]
    figures, wanted = ([json.loads(line) for line in some if "images_per_s" not in line] for some in lines)
    assert figures == wanted
    assert len(wanted) > 50
