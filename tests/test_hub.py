"""Weights go to a hub and come back the same; what is altered, missing or not to be had is refused in one sentence."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save
from torch import nn
from toy_hub import TOKEN, toy_hub

from experiments.build import read_yaml
from experiments.cli import main
from experiments.hub import pull, push
from lightning_modules.trained import all_notes, export, load_trained, save_trained, weights_hash
from lightning_modules.weights import cards

ROOT = Path(__file__).resolve().parent.parent
NOTES = {"steps": "12", "seconds": "3.5", "note": "a toy", "cards": "{}", "people": '["lfw:0a", "lfw:0b", "orl:0c"]'}


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, a login there, and an empty folder to work in; huggingface_hub itself is as it is."""
    for name in ("KEYVEIL_OFFLINE", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # where HF_HOME and HF_HUB_DISABLE_XET end up on import
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with toy_hub() as running:
        yield running


@pytest.fixture
def say(hub, capfd, monkeypatch):
    """Run a verb of `keyveil weights`; the token is in nothing that it prints."""
    # as in the command line; the parsers of its other verbs would take most of the time
    monkeypatch.setattr("experiments.cli.verbs", lambda: {"weights": {"push": push, "pull": pull}})

    def run(*words, code=0):
        ended = main(["weights", *map(str, words), "--endpoint", hub.url])
        said = capfd.readouterr()
        assert TOKEN not in said.out + said.err
        assert ended == code, said.err
        assert code or not said.err
        return said.out if code == 0 else said.err.strip()

    return run


@pytest.fixture
def told(say):
    """The one sentence with which a verb refuses; nothing is left in the folder but what was there."""

    def run(*words):
        before = sorted(os.listdir())
        error = say(*words, code=1)
        assert error.startswith("error: ")
        assert "\n" not in error, error
        assert sorted(os.listdir()) == before
        return error

    return run


def weights(name="net.safetensors", **notes):
    save_trained(net(), Path(name), {**NOTES, **notes})
    return Path(name).read_bytes()


def front(readme):
    return yaml.safe_load(readme.decode().split("---\n")[1])


# ---- there and back ----


def test_a_checkpoint_goes_out_as_safetensors_and_comes_back_the_same(hub, say):
    one, two = net(), net()
    torch.save(
        {
            "state_dict": one.state_dict(),
            "optimizer_states": [{"state": {}}],
            "global_step": 7,
            "training_seconds": 1.25,
            "method": "lightning_modules.sdn.module.SDN",
            "cards": {"generator": "sha256:" + "a" * 64},
            "trained_on": ["lfw:0a", "orl:0c"],
        },
        "last.ckpt",
    )
    method = read_yaml(ROOT / "configs/method/sdn.yaml")
    method["model"]["init_args"]["start"] = "/home/me/secret/first.ckpt"
    method["model"]["init_args"]["extra"] = "/home/me/secret/network.pt"
    Path("mine.yaml").write_text(yaml.safe_dump(method))
    said = say("push", "last.ckpt", "me/tiny", "--note=two | faces", "--licence=Apache-2.0", "--method=mine.yaml")
    assert "keyveil weights pull me/tiny" in said
    assert sorted(hub.files("me/tiny")) == [".gitattributes", "README.md", "tiny.safetensors"]
    assert hub.repos["me/tiny"]["summary"] == "Weights of 7 training steps"

    export(Path("last.ckpt"), Path("wanted.safetensors"), "two | faces")
    said = say("pull", "me/tiny")
    assert said.splitlines()[0] == "tiny.safetensors"
    assert "SDN; 7 training steps; 1.2 s; two | faces" in said
    assert all_notes("tiny.safetensors") == all_notes("wanted.safetensors")
    wanted, found = load_file("wanted.safetensors"), load_file("tiny.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    load_trained(two, "tiny.safetensors")
    assert weights_hash(one) == weights_hash(two)
    assert two.trained_on == {"lfw:0a", "orl:0c"}
    assert say("pull", "me/tiny").startswith("tiny.safetensors")  # the same file may be there already
    assert sorted(os.listdir()) == ["last.ckpt", "mine.yaml", "tiny.safetensors", "wanted.safetensors"]

    readme = hub.files("me/tiny")["README.md"]
    digest = hashlib.sha256(Path("tiny.safetensors").read_bytes()).hexdigest()
    assert front(readme) == {
        "license": "apache-2.0",
        "library_name": "keyveil",
        "pipeline_tag": "image-to-image",
        "tags": ["keyveil", "face-anonymization", "privacy", "reversible"],
        "keyveil": {"file": "tiny.safetensors", "sha256": digest},
    }
    card = readme.decode()
    for part in (
        "| `lightning_modules.sdn.SDN` |",
        "training steps, of the last stage | 7 |",
        "seconds of training, of the last stage | 1.2 |",
        r"two \| faces",
        digest,
        "| generator | `sha256:aaa",
        "1 of lfw, 1 of orl",
        "keyveil weights pull me/tiny",
        "--weights tiny.safetensors",
        "width: 24",
        "extra: network.pt",
        "## Limits",
    ):
        assert part in card, part
    assert "secret/" not in card
    assert "start: " not in card
    assert TOKEN.encode() not in readme + hub.files("me/tiny")["tiny.safetensors"]


def test_a_safetensors_file_and_a_card_of_ours_go_out_bit_for_bit(hub, say):
    data = weights()
    say("push", "net.safetensors", "me/net", "--message=first", "--private")
    assert hub.files("me/net")["net.safetensors"] == data
    assert hub.repos["me/net"]["private"]
    assert hub.repos["me/net"]["summary"] == "first"
    assert front(hub.files("me/net")["README.md"])["license_name"] == "not-stated"
    save_trained(net(), Path("net.safetensors"), {**NOTES, "steps": "13"})
    say("push", "net.safetensors", "net")  # again; the login's own name space
    assert "| 13 |" in hub.files("me/net")["README.md"].decode()
    say("pull", "me/net", "--out=deep/in/it.safetensors")
    assert Path("deep/in/it.safetensors").read_bytes() == Path("net.safetensors").read_bytes()
    say("push", "preview-head", "me/head")
    entry, card = cards()["preview-head"], hub.files("me/head")["README.md"].decode()
    assert hashlib.sha256(hub.files("me/head")["head.safetensors"]).hexdigest() == entry.sha256
    assert entry.role in card
    assert entry.licence in card
    assert front(card.encode())["license"] == "other"


def test_branches_tags_and_several_files_can_be_chosen_from(hub, say, told):
    one, two = weights("one.safetensors", steps="1"), weights("two.safetensors", steps="2")
    for name in ("one", "two"):
        Path(f"{name}.safetensors").unlink()
    older = hub.commit("me/both", {"one.safetensors": one, "pytorch_model.bin": b"a pickle"})
    hub.commit("me/both", {"deep/two.safetensors": two})
    error = told("pull", "me/both")
    assert "several files (one.safetensors, deep/two.safetensors): name one with --file" in error
    assert "no weights named three.safetensors, only" in told("pull", "me/both", "--file=three.safetensors")
    assert "no weights named pytorch_model.bin" in told("pull", "me/both", "--file=pytorch_model.bin")
    say("pull", "me/both", "--file=deep/two.safetensors")
    assert Path("two.safetensors").read_bytes() == two
    say("pull", "me/both", f"--revision={older}")
    assert Path("one.safetensors").read_bytes() == one
    assert "no such revision" in told("pull", "me/both", "--revision=nowhere")
    assert not [line for line in hub.asked if line.endswith(".bin")]


def test_the_verbs_are_in_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["weights", "--help"])
    said = capsys.readouterr().out
    assert "push                Publish what a method has learned" in said
    assert "pull                Fetch a safetensors file" in said


# ---- refusing ----


def test_what_is_not_there_is_told(hub, told):
    assert "shows no repository me/nothing" in told("pull", "me/nothing")
    hub.commit("me/pickles", {"model.ckpt": b"", "README.md": b"# Pickles"})
    assert "no .safetensors file, and nothing else is fetched" in told("pull", "me/pickles")
    assert "me//net" in told("pull", "me//net")
    assert "no weights at nowhere.ckpt" in told("push", "nowhere.ckpt", "me/net")
    assert "me/net" not in hub.repos


@pytest.mark.parametrize("fault", ["the file", "the card", "the hub's hash", "no hash", "not tensors"])
def test_what_is_altered_is_refused(hub, say, told, fault):
    data = weights()
    say("push", "net.safetensors", "me/net")
    Path("net.safetensors").unlink()
    held = hub.files("me/net")
    altered = data[:-1] + bytes([data[-1] ^ 1])
    if fault == "the file":  # and its hash, by someone who could write there
        held["net.safetensors"] = altered
        sentence = "states two different sha256"
    elif fault == "the card":
        held["README.md"] = held["README.md"].replace(b"sha256: ", b"sha256: 0")
        sentence = "states two different sha256"
    elif fault == "the hub's hash":  # on its way, or on the hub's disk
        hub.stated["net.safetensors"] = hashlib.sha256(data).hexdigest()
        held["net.safetensors"] = altered
        sentence = "is altered (sha256 expected"
    elif fault == "no hash":
        hub.stated["net.safetensors"] = None
        held["README.md"] = b"---\nkeyveil: [\n---\n"
        sentence = "states no sha256"
    else:
        held["net.safetensors"] = b"\x80\x04pickle"
        del held["README.md"]
        sentence = "no readable safetensors file"
    assert sentence in told("pull", "me/net")
    assert os.listdir() == []


def test_a_card_alone_is_enough_to_check_a_file_by(hub, say, told):
    weights()
    say("push", "net.safetensors", "me/net")
    hub.stated["net.safetensors"] = None
    say("pull", "me/net", "--out=again.safetensors")
    hub.files("me/net")["net.safetensors"] = weights("net.safetensors", steps="99")
    assert "is altered" in told("pull", "me/net", "--out=other.safetensors")


def test_another_file_in_its_place_is_left_alone(hub, say, told):
    weights()
    say("push", "net.safetensors", "me/net")
    Path("net.safetensors").write_bytes(b"mine")
    assert "net.safetensors is there already, and is another file" in told("pull", "me/net")
    assert Path("net.safetensors").read_bytes() == b"mine"
    assert "a file named *.safetensors, got net.ckpt" in told("pull", "me/net", "--out=net.ckpt")


@pytest.mark.parametrize("name", ["../up.safetensors", "/up.safetensors", "\x1b[2Jup.safetensors"])
def test_names_that_lead_elsewhere_are_left_alone(hub, told, name):
    hub.commit("me/trap", {name: save({"x": torch.zeros(1)})})
    error = told("pull", "me/trap")
    assert "a name that leads elsewhere" in error
    assert error.isprintable()
    assert not Path("../up.safetensors").exists()


def test_without_a_login_nothing_is_pushed_and_private_ones_are_not_seen(hub, told, say, monkeypatch):
    weights()
    say("push", "net.safetensors", "me/hidden", "--private")
    say("push", "net.safetensors", "me/open")
    assert "me/open is there already, and public" in told("push", "net.safetensors", "me/open", "--private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses this for me/new: Invalid username or password" in told("push", "net.safetensors", "me/new")
    monkeypatch.delenv("HF_TOKEN")
    before = len(hub.asked)
    assert "needs a login at the hub: `hf auth login`" in told("push", "net.safetensors", "me/new")
    assert len(hub.asked) == before
    assert "shows no repository me/hidden" in told("pull", "me/hidden", "--out=new.safetensors")
    say("pull", "me/open", "--out=new.safetensors")


def test_what_is_not_ours_or_does_not_fit_is_not_pushed(hub, told):
    weights(method="lightning_modules.sdn.module.SDN")
    assert "trained by somebody else" in told("push", "mobilefacenet", "me/net")
    assert "--note is for checkpoints" in told("push", "net.safetensors", "me/net", "--note=x")
    blur, cpu = ROOT / "configs/method/blur.yaml", ROOT / "configs/trainer/cpu.yaml"
    assert "was trained as lightning_modules.sdn.module.SDN, not as" in told(
        "push", "net.safetensors", "me/net", f"--method={blur}"
    )
    assert "has no model: with a class_path" in told("push", "net.safetensors", "me/net", f"--method={cpu}")
    Path("cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    Path("trap.ckpt").write_bytes(b"\x80\x02cbuiltins\nprint\n.")
    for name in ("cut.safetensors", "trap.ckpt"):
        assert "not a readable checkpoint" in told("push", name, "me/net")
    assert hub.asked == []


def test_offline_and_without_a_network_nothing_is_waited_for(hub, told, monkeypatch):
    weights()
    verbs = (("push", "net.safetensors", "me/net"), ("pull", "me/net", "--out=other.safetensors"))
    monkeypatch.setenv("KEYVEIL_OFFLINE", "1")
    for words in verbs:
        assert "KEYVEIL_OFFLINE is set" in told(*words)
    assert hub.asked == []
    monkeypatch.delenv("KEYVEIL_OFFLINE")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        hub.url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for words in verbs:
            assert f"{hub.url} cannot be reached (" in told(*words)
    hub.url = "no-address"
    assert "no-address cannot be reached (" in told(*verbs[1])


def test_the_package_that_is_missing_is_named(hub, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'keyveil[hub]'" in told("pull", "me/net")


def test_a_disk_without_room_is_seen_beforehand(hub, told, monkeypatch):
    hub.commit("me/net", {"net.safetensors": save({"x": torch.zeros(9)})})
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert "No space left for net.safetensors: it takes" in told("pull", "me/net")


def test_the_environment_names_the_hub_and_a_disk_that_fills_up_keeps_nothing(hub, tmp_path):
    """In a process of its own; where one may be mounted, with a file system of 64 kB."""
    data = save({"x": torch.zeros(65536)})
    hub.commit("me/net", {"net.safetensors": data})
    hub.sizes["net.safetensors"] = None  # so nothing is seen beforehand
    Path("full").mkdir()
    Path("go.py").write_text(
        "import os\nfrom experiments.hub import pull\npull('me/net')\n"
        "try:\n    pull('me/net', out='full/net.safetensors')\n"
        "except OSError as error:\n    print(error.strerror, os.listdir('full'))\n"
    )
    own, mount = ["unshare", "--user", "--map-root-user", "--mount"], "mount -t tmpfs -o size=64k none full"
    small = shutil.which("unshare") and not subprocess.run([*own, "sh", "-c", mount], check=False).returncode
    words = [*own, "sh", "-c", f"{mount} && {sys.executable} go.py"] if small else [sys.executable, "go.py"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path("net.safetensors").read_bytes() == data
    assert done.stdout.splitlines()[2:] == ["No space left on device []"] or not small, done.stderr
    assert TOKEN not in done.stdout + done.stderr
