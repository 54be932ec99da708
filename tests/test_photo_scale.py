"""`keyveil anonymize` and `recover` at the sizes people have: many pictures, a large one, many attempts at a seal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from orl_faces import need, orl_faces
from PIL import Image
from toy_photos import picture

from lightning_modules.carriers import to_pixels
from lightning_modules.keys import MasterKey, fresh, seal, unseal

TESTS = Path(__file__).parent
TOYS = """
import os
import experiments.anonymizing, experiments.photos, lightning_modules.callbacks.paste_back as gate
from toy_photos import ToyDetector, ToyJudge
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost
experiments.photos.default_detector = ToyDetector
experiments.photos.Gate = lambda: Gate(ToyJudge(), 0.9)
experiments.anonymizing.Cost = lambda: Cost(1, 64, 1)
gate.TRIES = 16  # one of the toy's keys changes nothing
open("toy.yaml", "w").write("model: {class_path: toy_photos.ToyMethod}")
"""


def run(code: str) -> dict:
    """What a process of its own prints as its last line, with its peak memory in bytes."""
    paths = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    end = "\nimport json, resource; print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))"
    command = [sys.executable, "-c", paths + "from experiments.cli import main\n" + code + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("KEYVEIL_SECRET", "correct horse battery staple")
    return tmp_path


def test_none_of_ten_thousand_altered_or_wrongly_keyed_seals_opens():
    random = np.random.default_rng(0)
    master, nonce, bound = MasterKey.from_seed(0), fresh(), b"what it belongs to"
    plain = random.bytes(400)
    sealed = seal(master, nonce, plain, bound)
    assert unseal(master, nonce, sealed, bound) == plain
    opened = 0
    for attempt in range(10_000):
        given = [master, nonce, sealed, bound]
        if attempt % 4 == 0:
            given[0] = MasterKey.from_seed(attempt + 1)
        else:
            changed = bytearray(given[attempt % 4])
            changed[random.integers(len(changed))] ^= 1 << random.integers(8)
            given[attempt % 4] = bytes(changed)
        try:
            unseal(*given)
            opened += 1
        except ValueError:
            pass
    assert opened == 0


def test_a_disk_that_is_truly_full_leaves_nothing_half_written(folder):
    """On a file system of 64 kB, in a name space of its own: what fits is there whole, what does not is not there."""
    Path("in").mkdir()
    for seed in range(4):
        Image.fromarray(picture(1, seed, height=200)).save(f"in/{seed}.png")
    Path("safe").mkdir()
    Path("go.py").write_text(
        f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\nfrom experiments.cli import main{TOYS}"
        'code = main(["anonymize", "in", "--out=safe", "--method=toy.yaml"])\n'
        'print("left", code, *sorted(os.listdir("safe")))\nassert main(["verify", "safe"]) == 0\n'
    )
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own, "mount -t tmpfs none safe"], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    words = f"mount -t tmpfs -o size=64k none safe && {sys.executable} go.py"
    done = subprocess.run([*own, words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No space left" in done.stderr
    left = next(line for line in done.stdout.splitlines() if line.startswith("left")).split()[1:]
    assert left[0] == "1"
    assert "manifest.jsonl" in left
    assert not [name for name in left if name.endswith(".part")]
    assert 1 <= len([name for name in left if name.endswith(".png")]) < 4


@pytest.mark.slow
def test_five_hundred_sealed_pictures_come_back_bit_for_bit(folder):
    Path("in").mkdir()
    for seed in range(500):
        Image.fromarray(picture(1 + seed % 3, seed, height=96 + seed % 7)).save(f"in/{seed}.png")
    verbs = 'assert main(["anonymize", "in", "--out=safe", "--method=toy.yaml", "--seal=original"]) == 0\n'
    run(TOYS + verbs + 'assert main(["recover", "safe", "--out=back"]) == 0')
    for seed in range(500):
        before, hidden, after = (np.asarray(Image.open(f"{room}/{seed}.png")) for room in ("in", "safe", "back"))
        assert (hidden != before).any()
        np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(folder):
    peaks = []
    for count in (200, 10_000):
        room = folder / str(count)
        room.mkdir()
        for seed in range(count):
            Image.fromarray(picture(1, seed % 50)).save(room / f"{seed}.png", compress_level=1)
        peaks.append(run(TOYS + f'assert main(["anonymize", "{count}", "--out=of{count}", "--method=toy.yaml"]) == 0'))
        assert len(list((folder / f"of{count}").glob("*.png"))) == count
    assert peaks[1] - peaks[0] < 100e6, peaks  # of which the manifest's lines take some


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pixelate", "sdn", "ifadit"])
def test_a_picture_of_24_megapixels_takes_less_than_3_gigabytes(method, folder):
    """With the real detector, the real check of the output, and published weights as they are."""
    need(
        "orl",
        "centerface",
        "mobilefacenet",
        *(["mobilestylegan-synthesis", "landmarks68"] if method == "ifadit" else []),
    )
    face = Image.fromarray(to_pixels(orl_faces()[0, 0])).resize((1000, 1000))
    whole = Image.new("RGB", (6000, 4000), (90, 120, 150))
    for left in (400, 2500, 4600):
        whole.paste(face, (left, 1400))
    whole.save("a.jpg", quality=92)
    peak = run(f'assert main(["anonymize", "a.jpg", "--out=safe", "--method={method}"]) == 0')
    assert json.loads(Path("safe/manifest.jsonl").read_text().splitlines()[0])["entry"]["faces"]["changed"] == 3
    assert peak < 3e9
