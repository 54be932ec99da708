"""What the process that opens pictures can read, and what it cannot; in a process of its own, since walls stay."""

import json
import subprocess
import sys

from experiments.walls import began

PROBE = """
import json, os, sqlite3, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
import torch
from experiments.walls import Walls

place, since = Path(sys.argv[1]), int(sys.argv[2])
for name in ("new.txt", "own.txt", "program.py"):
    (place / name).write_text("written since")
np.arange(3.0).tofile(place / "new.bin")
torch.save(torch.ones(2), place / "new.pt")
os.utime(place / "new.txt", (0, 0))
os.link(place / "old.txt", place / "linked.txt")
(place / "closed").mkdir()
(place / "closed" / "old.txt").write_text("an original")
(place / "way").symlink_to(place / "closed")
walls = Walls([place / "closed"], since, [place / "own.txt"])
tried = {
    "older": lambda: (place / "older.txt").read_text(),
    "own": lambda: (place / "own.txt").read_text(),
    "program": lambda: (place / "program.py").read_text(),
    "kernel": lambda: Path("/proc/self/status").read_text(),
    "temporary": lambda: tempfile.TemporaryFile().read(),
    "written": lambda: (place / "written").write_text("made here"),
    "alone": lambda: setattr(walls, "alone", True),
    "new": lambda: (place / "new.txt").read_text(),
    "appended": lambda: open(place / "new.txt", "a+").read(),
    "descriptor": lambda: os.open(place / "new.txt", os.O_RDONLY),
    "array": lambda: np.fromfile(place / "new.bin"),
    "tensor": lambda: torch.load(place / "new.pt"),
    "mapped": lambda: torch.load(place / "new.pt", mmap=True),
    "table": lambda: sqlite3.connect(place / "new.bin"),
    "linked": lambda: (place / "linked.txt").read_text(),
    "closed": lambda: (place / "closed" / "old.txt").read_text(),
    "way": lambda: (place / "way" / "old.txt").read_text(),
    "another": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
}
found = {}
for name, read in tried.items():
    try:
        read()
        found[name] = True
    except PermissionError:
        found[name] = False
print(json.dumps(found))
"""


def test_what_was_written_since_and_what_is_closed_cannot_be_read(tmp_path):
    for name in ("older.txt", "old.txt"):
        (tmp_path / name).write_text("written before")
    since = began(tmp_path / "began", "one")
    told = [sys.executable, "-c", PROBE, str(tmp_path), str(since)]
    found = json.loads(subprocess.run(told, capture_output=True, check=True, timeout=300).stdout)
    open_to_it = {"older", "own", "program", "kernel", "temporary", "written", "alone"}
    assert {name for name, read in found.items() if read} == open_to_it
    assert len(found) == 19


def test_a_run_that_goes_on_keeps_its_beginning_until_its_making_changes(tmp_path):
    first = began(tmp_path / "began", "one")
    assert began(tmp_path / "began", "one") == first
    assert (tmp_path / "began").read_text() == "one"
    assert began(tmp_path / "began", "two") >= first
    assert (tmp_path / "began").read_text() == "two"
