import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces
from orl_faces import need

from datamodules.batch import FaceBatch
from experiments import compare as room
from experiments.build import build, load_method, method_spec, read_yaml
from experiments.chosen import ChosenFaces, choose_faces
from experiments.compare import compare
from experiments.comparison import Comparison
from experiments.exchange import Speed, hide_into, keep_if, read_trip, recover_from
from experiments.provenance import _makes, code_digest
from flows.conjugate import Conjugate
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.calibration import Calibration
from lightning_modules.ifadit import IFADITTransform
from lightning_modules.keys import KeyRing, KeySpec, Secret
from lightning_modules.metrics.attributes import FaceAttributes
from lightning_modules.metrics.fairness import Groups
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import Measured, RoundTripMetric
from lightning_modules.metrics.scores import read_scores
from lightning_modules.protocol import GROUPS, read_results
from lightning_modules.sdn import SDN


class LinearJudge:
    """Another linear recogniser than the one the methods use."""

    name, weights, networks = "linear", "sha256:" + "1" * 64, frozenset({"linear-judge"})

    def embed(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        return torch.nn.functional.normalize(pooled, dim=1)

    def similarity(self, a, b):
        return a @ b.T

    def describe(self):
        return self.name


def look(images):
    """A toy that says who is a man by the first pixel; everybody is 50."""
    return torch.stack([images[:, 0, 0, 0] / 2 + 0.5, torch.full((len(images),), 50.0)], 1)


class FindsNoFace:
    working, threshold, name = 64, 0.5, "nobody"

    def detect(self, picture):
        return []


def write(path, **changes):
    plan = {
        "size": 64,
        "faces": 6,
        "judges": {"linear": {"class_path": "test_compare.LinearJudge"}},
        "data": {"noise": {"class_path": "conftest.NoiseFaces"}},
        "methods": {
            "blur": {"class_path": "lightning_modules.baselines.obscure.Blur", "init_args": {"size": 64}},
            "SDN": {
                "class_path": "lightning_modules.sdn.SDN",
                "init_args": {"size": 64, "width": 8, "key_bits": 8, "identities": 16},
            },
        },
        **changes,
    }
    path.write_text(json.dumps(plan))  # JSON is YAML
    return path


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    threshold = Calibration(threshold=0.9, far=1e-3, pairs=1000, low=0.8, high=0.95)
    monkeypatch.setattr(room, "load_calibration", lambda judge: threshold)
    monkeypatch.setattr(room, "default_detector", FindsNoFace)
    monkeypatch.setattr(room, "Groups", lambda: Groups(look))
    monkeypatch.setattr(room, "FaceAttributes", lambda used: FaceAttributes(used, {"faceres": look}))


def test_every_method_on_every_data_set_ends_in_a_table(tmp_path):
    assert compare(write(tmp_path / "c.yaml"), tmp_path / "out") == 0
    figures = read_results(tmp_path / "out" / "results.jsonl")
    assert {f.method for f in figures} == {"blur", "SDN"}
    assert {f.leg for f in figures if f.method == "SDN"} >= {"anonymized", "recovered", "wrongly_recovered"}
    assert {f.leg for f in figures if f.method == "blur"} <= {"original", "anonymized", None}
    kept = [f for f in figures if f.metric == "gender_agree" and f.method == "SDN"]
    assert {f.leg: f.n for f in kept} == {"anonymized": 6, "recovered": 6, "wrongly_recovered": 6}
    gaps = [f for f in figures if f.metric == "tar_gap" and f.method == "SDN"]
    assert {(f.leg, f.group) for f in gaps} == {(leg, of) for leg in ("anonymized", "recovered") for of in GROUPS}
    assert all(f.value is None and f.why.startswith("fewer than 20 faces of ") for f in gaps)
    assert "diversity" in {f.metric for f in figures if f.leg == "wrongly_recovered"}  # of several wrong keys
    near = [path.read_bytes() for path in (tmp_path / "out").rglob("nearly_recovered*/000000.png")]
    assert len(near) == len(set(near)) == 8  # another bit each
    assert all(f.data == "noise" and f.config.endswith("c.yaml") for f in figures)
    for name in ("table.md", "report.html", "grid.png", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_faces_that_are_not_to_be_shown_are_in_no_picture(tmp_path):
    faces = {"class_path": "conftest.NoiseFaces"}
    for unshown in ([], ["noise"]):
        config = write(tmp_path / "c.yaml", unshown=unshown, data={"noise": faces, "more": faces}, wrong_keys=1)
        assert compare(config, tmp_path / "out") == 0
        page = (tmp_path / "out" / "report.html").read_text()
        assert "Faces of more" in page
        assert ("Faces of noise" in page) == (not unshown)
    (tmp_path / "out" / "grid.png").unlink()
    config = write(tmp_path / "c.yaml", unshown=["noise", "more"], data={"noise": faces, "more": faces}, wrong_keys=1)
    assert compare(config, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "grid.png").exists()
    with pytest.raises(ValueError, match="there is no data set 'nowhere' to leave unshown"):
        compare(write(tmp_path / "c.yaml", unshown=["nowhere"]), tmp_path / "out")


def test_without_opening_anonymized_faces_alone_are_measured(tmp_path):
    methods = {"SDN": json.loads(write(tmp_path / "c.yaml").read_text())["methods"]["SDN"]}
    assert compare(write(tmp_path / "c.yaml", opened=False, methods=methods), tmp_path / "out") == 0
    figures = [f for f in read_results(tmp_path / "out" / "results.jsonl") if f.value is not None]
    assert {f.leg for f in figures} == {"original", "anonymized", None}
    assert "diversity" in {f.metric for f in figures}
    assert {f.name for f in (tmp_path / "out" / "faces" / "noise" / "SDN").iterdir() if f.is_dir()} == {
        "anonymized",
        "other",
    }


def test_scores_keys_nearby_and_hashes_of_the_faces_are_kept(tmp_path):
    config = write(tmp_path / "c.yaml", sensitivity=True, wrong_keys=2)
    assert compare(config, tmp_path / "out") == 0
    figures = read_results(tmp_path / "out" / "results.jsonl")
    found = {f.key for f in figures if f.method == "SDN" and f.leg == "wrongly_recovered"}
    assert found == {"random", "one-bit", "bits-2"}  # of eight bits
    assert {f.method for f in figures if f.metric == "tar_worst_bit"} == {"SDN"}
    scores = {(s.method, s.judge, s.name): s for s in read_scores(tmp_path / "out" / "scores.jsonl")}
    assert {method for method, _, _ in scores} == {"blur", "SDN"}
    assert scores["SDN", "linear", "wrongly_recovered"].n == 12
    assert scores["SDN", "linear", "anonymized"].threshold == 0.9
    told = json.loads((tmp_path / "out" / "run.json").read_text())["faces"]["noise"]
    assert (told["faces"], told["people"]) == (6, 6)
    faces = NoiseFaces()
    assert told == ChosenFaces(faces, 6, 8).told() == ChosenFaces(faces, 6, 2).told()  # however they are batched
    faces.items = [face._replace(image=face.image - 2 / 255) for face in faces.items]
    assert told["pixels"] != ChosenFaces(faces, 6, 8).told()["pixels"]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    config = write(tmp_path / "c.yaml")
    compare(config, tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_text()
    monkeypatch.setattr(room, "load_method", lambda spec: pytest.fail("it ran again"))
    assert compare(config, tmp_path / "out") == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


def test_runs_of_some_methods_are_joined_by_one_of_all(tmp_path, monkeypatch, capsys):
    config, out = write(tmp_path / "c.yaml"), tmp_path / "out"
    for name in ("SDN", "blur"):
        assert compare(config, out, only=name) == 0
        assert {f.method for f in read_results(out / "results.jsonl")} == {name}
    monkeypatch.setattr(room, "load_method", lambda spec: pytest.fail("it ran again"))
    assert compare(config, out) == 0
    assert {f.method for f in read_results(out / "results.jsonl")} == {"SDN", "blur"}
    with pytest.raises(ValueError, match="there is no method 'blurred'; there are blur, SDN"):
        compare(config, out, only="SDN, blurred")


def test_some_methods_alone_start_afresh_without_touching_others(tmp_path):
    config, out = write(tmp_path / "c.yaml"), tmp_path / "out"
    compare(config, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("faces/noise/blur/**/*.png")}
    made = {path: path.stat().st_mtime_ns for path in out.glob("faces/noise/SDN/**/*.png")}
    assert compare(config, out, only="SDN", fresh=True) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(path.stat().st_mtime_ns > before for path, before in made.items())


OWN = """
import torch
from lightning_modules.anonymizer import ReversibleAnonymizer

class Grey(ReversibleAnonymizer):
    size = 64

    def anonymize(self, face, key):
        return torch.full_like(face.image, {level})

    recover = None
"""


def test_what_a_user_wrote_and_fetched_counts(tmp_path, monkeypatch):
    """A changed source of one's own makes pictures anew; weights that came in the meantime measure again."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_method.py").write_text(OWN.format(level=0.0))
    config = write(tmp_path / "c.yaml", methods={"grey": {"class_path": "own_method.Grey"}})
    run = room._Run(Comparison.read(config), config, tmp_path / "out", room.Console(quiet=True))
    faces = ChosenFaces(NoiseFaces(), 6, 8)

    def prints():
        return run._fingerprints("noise", "grey", {"class_path": "own_method.Grey", "init_args": {}}, faces)

    made, measured = prints()
    assert prints() == (made, measured)
    assert "sdn" not in run.present  # another method's weights measure nothing
    run.present = [*run.present, "inception-fid"]
    assert prints()[0] == made
    assert prints()[1] != measured
    (tmp_path / "own_method.py").write_text(OWN.format(level=0.5))
    assert prints()[0] != made
    before, darker = prints()[0], NoiseFaces()
    darker.items = [face._replace(image=face.image - 2 / 255) for face in darker.items]
    faces = ChosenFaces(darker, 6, 8)  # other pictures under the same configuration
    assert prints()[0] != before


def test_a_folder_named_as_a_room_hides_nothing_from_who_opens(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise SystemExit('the wrong room')")
    monkeypatch.chdir(tmp_path)
    assert compare(write(tmp_path / "c.yaml"), tmp_path / "out", only="SDN") == 0


class Count(RoundTripMetric):
    """A metric of somebody else's: faces seen."""

    def __init__(self):
        super().__init__()
        self.add_state("person", [], dist_reduce_fx="cat")

    def update(self, trip):
        self.person.append(trip.identity)

    def measured(self):
        person = torch.cat(self.person)
        return [Measured("x_faces_seen", "anonymized", torch.ones(len(person)), person)]


def test_a_metric_of_ones_own_is_measured_on_the_pictures_that_are_there(tmp_path, monkeypatch):
    compare(write(tmp_path / "c.yaml"), tmp_path / "out")
    monkeypatch.setattr(room, "hide_into", lambda folder, method, *more: Speed.so_far(folder / "hiding.json"))
    monkeypatch.setattr(room, "recover_elsewhere", lambda folder, *more: Speed.so_far(folder / "opening.json"))
    added = {"seen": {"class_path": f"{__name__}.Count"}}
    assert compare(write(tmp_path / "c.yaml", metrics=added), tmp_path / "out") == 0
    figures = read_results(tmp_path / "out" / "results.jsonl")
    assert {(f.method, f.n) for f in figures if f.metric == "x_faces_seen"} == {("blur", 6), ("SDN", 6)}
    assert "recovered" in {f.leg for f in figures}
    assert "faces seen" in (tmp_path / "out" / "report.html").read_text()


def test_code_that_judges_makes_no_picture():
    rooms = ("metrics/recovery.py", "judges.py", "anonymizer.py")
    assert [_makes(f"lightning_modules/{name}") for name in rooms] == [False, False, True]
    assert [_makes(f"experiments/{name}.py") for name in ("exchange", "report")] == [True, False]
    assert _makes("flows/coupling.py")
    assert code_digest(making=True) != code_digest()


def test_one_failed_method_does_not_lose_the_others(tmp_path):
    methods = json.loads(write(tmp_path / "c.yaml").read_text())["methods"]
    methods = {"broken": {"class_path": "lightning_modules.sdn.SDN", "init_args": {"size": 50}}, **methods}
    assert compare(write(tmp_path / "c.yaml", methods=methods), tmp_path / "out") == 1
    assert {f.method for f in read_results(tmp_path / "out" / "results.jsonl")} == {"blur", "SDN"}
    assert "multiple of 32" in (tmp_path / "out" / "table.md").read_text()


def test_an_unknown_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'metods'"):
        Comparison.read(write(tmp_path / "c.yaml", metods={}))
    with pytest.raises(ValueError, match=r"unknown key 'checkpoint' of a method"):
        method_spec({"class_path": "x", "checkpoint": "y"})
    with pytest.raises(ValueError, match="without a comma"):
        Comparison.read(write(tmp_path / "c.yaml", methods={"a, b": {"class_path": "x"}}))
    for more, words in [
        ({"published": "Nobody"}, "`published` of 'blur' must be one of Gu et al"),
        ({"knob": {"of": "blur"}}, "knob of 'blur' must have of, name and value"),
        ({"knob": {"of": "blur", "name": "sigma", "value": "much"}}, "value, a number"),
    ]:
        methods = {"blur": {"class_path": "lightning_modules.baselines.obscure.Blur", **more}}
        with pytest.raises(ValueError, match=words):
            Comparison.read(write(tmp_path / "c.yaml", methods=methods))


def test_an_unknown_argument_of_a_method_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="sizes") as told:
        load_method(method_spec({"class_path": "lightning_modules.baselines.obscure.Blur", "init_args": {"sizes": 1}}))
    assert "\n" not in str(told.value)


def test_a_missing_or_broken_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")


def test_a_loss_network_may_not_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(SDN, "loss_networks", frozenset({"linear-judge"}))
    assert compare(write(tmp_path / "c.yaml"), tmp_path / "out") == 1
    assert "loss network" in (tmp_path / "out" / "table.md").read_text()


def test_a_data_set_that_is_not_there_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    lfw = {
        "optional": True,
        "class_path": "datamodules.faces.FaceDataModule",
        "init_args": {"faces": {"class_path": "datamodules.datasets.LFW"}},
    }
    data = {"noise": {"class_path": "conftest.NoiseFaces"}, "lfw": lfw}
    assert compare(write(tmp_path / "c.yaml", data=data), tmp_path / "out") == 0
    assert "lfw" in json.loads((tmp_path / "out" / "run.json").read_text())["left_out"][0]


def test_recovery_sees_files_and_header_only(tmp_path):
    """Everything but the anonymized files and the header is gone before the face is opened."""
    method = IFADITTransform(
        LinearGenerator(), LinearRecognizer(), Conjugate(512, 16), size=64, width=8, blocks=1, live_rows=4
    ).eval()
    faces = NoiseFaces(count=20)
    with torch.no_grad():
        method.prepare(faces)
    hide_into(tmp_path, method, [faces.whole()], Secret("a test"), 0, "png", other_keys=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"anonymized", "other", "other-2", "inverted", "header.json", "hiding.json"}
    assert (tmp_path / "other" / "000000.png").read_bytes() != (tmp_path / "other-2" / "000000.png").read_bytes()
    for gone in ("other", "other-2", "inverted"):
        for path in (tmp_path / gone).iterdir():
            path.unlink()
    del faces
    recover_from(tmp_path, method, Secret("a test"), wrong_keys=3)
    opened = [tmp_path / name for name in ("recovered", *(f"wrongly_recovered{x}" for x in ("", "-2", "-3")))]
    assert all(len(list(folder.iterdir())) == 20 for folder in opened)
    assert len({(folder / "000000.png").read_bytes() for folder in opened}) == 4
    header = (tmp_path / "header.json").read_text()
    assert "a test" not in header


@pytest.mark.parametrize("carrier", ["jpeg75", "noise1", "half", "png"])
def test_another_file_of_the_same_faces_is_the_picture_encoded_anew(tmp_path, monkeypatch, carrier):
    method, faces = SDN(size=64, width=8, key_bits=8, identities=16).eval(), NoiseFaces(count=4).whole()
    png, anew, encoded = (tmp_path / name for name in ("png", "anew", "encoded"))
    for folder, file in ((png, "png"), (anew, carrier)):
        hide_into(folder, method, [faces], Secret("one"), 0, file)
    monkeypatch.setattr(method, "anonymize", lambda face, key: pytest.fail("made again"))
    hide_into(encoded, method, [faces], Secret("one"), 0, carrier, png=png)
    files = [file.relative_to(anew) for file in anew.rglob("0*")]
    assert len(files) == 8
    assert {file.parts[0] for file in files} == {"anonymized", "other"}
    assert all((encoded / file).read_bytes() == (anew / file).read_bytes() for file in files)


def test_a_stopped_exchange_goes_on_where_it_was(tmp_path, monkeypatch):
    """Pictures that lie there are not made again; those that are missing become what they would have been."""
    method, faces = SDN(size=64, width=8, key_bits=8, identities=16).eval(), NoiseFaces(count=4).whole()
    batches = [FaceBatch(*(field[at : at + 2] for field in faces)) for at in (0, 2)]

    def run() -> tuple[dict[Path, bytes], int, int]:
        told = []
        hiding = hide_into(tmp_path, method, batches, Secret("one"), 0, "png", tell=told.append)
        assert told == [2, 4]
        opening = recover_from(tmp_path, method, Secret("one"), batch_size=2)
        return {path: path.read_bytes() for path in tmp_path.rglob("*.png")}, hiding.faces, opening.faces

    whole, hidden, opened = run()
    for leg in ("other", "recovered"):
        (tmp_path / leg / "000003.png").unlink()
    called = []
    for verb in ("anonymize", "recover"):
        real = getattr(method, verb)
        monkeypatch.setattr(
            method, verb, lambda face, key, verb=verb, real=real: called.append(verb) or real(face, key)
        )
    again = run()
    assert called == ["anonymize", "recover"]  # the one batch of the one leg
    assert again == (whole, hidden + 2, opened + 2)


def test_what_was_hidden_before_a_stop_keeps_its_time(tmp_path, monkeypatch):
    method, faces = SDN(size=64, width=8, key_bits=8, identities=16).eval(), NoiseFaces(count=2).whole()
    monkeypatch.setattr(method, "invert", lambda face: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hide_into(tmp_path, method, [faces], Secret("one"), 0, "png")
    monkeypatch.undo()
    speed = hide_into(tmp_path, method, [faces], Secret("one"), 0, "png")
    assert (speed.faces, speed.seconds > 0) == (4, True)  # under two keys


def test_opening_ends_with_whoever_asked_for_it():
    """It holds the pipe as long as it lives, so that the pipe's end is its own."""
    waits = "import sys; from experiments.opening import _end_with; _end_with(int(sys.argv[1]))"
    asks = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {waits!r}, str(os.getpid())])"
    assert subprocess.run([sys.executable, "-c", asks], capture_output=True, timeout=120, check=True).stdout == b""


class Brighter(NoiseFaces):
    def __init__(self):
        super().__init__()
        self.items[0] = self.items[0]._replace(image=self.items[0].image + 1 / 127.5)


def test_faces_are_told_by_their_pixels_and_batches():
    kept = ChosenFaces(NoiseFaces(), count=4, batch_size=4).digest
    assert kept == ChosenFaces(NoiseFaces(), count=4, batch_size=4).digest
    others = [(Brighter(), 4, 4), (NoiseFaces(), 3, 4), (NoiseFaces(), 4, 2)]
    assert kept not in {ChosenFaces(*other).digest for other in others}


def test_pictures_are_kept_for_what_made_them_alone(tmp_path):
    folder = tmp_path / "faces"
    for made_by, left in (("one", False), ("one", True), ("other", False)):
        keep_if(folder, made_by)
        assert (folder / "picture").is_file() == left
        (folder / "picture").touch()


class Watched(torch.utils.data.Dataset):
    """Faces that keep a list of what was read."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        self.read.append(row)
        return self.items[row]


def test_chosen_faces_are_read_anew_and_a_batch_at_a_time():
    noise = NoiseFaces(count=24, batch_size=5)
    noise.items = Watched(noise.items)
    faces = ChosenFaces(noise, count=7, batch_size=3)
    assert noise.items.read == list(range(24))  # to see whose they are
    wanted = noise.whole()
    for _ in range(2):
        noise.items.read.clear()
        found, ahead = [], []
        for batch in faces:
            found.append(batch)
            ahead.append(len(noise.items.read))
        assert ahead == [3, 6, 7]
        assert [len(batch.image) for batch in found] == [3, 3, 1]
        rows = choose_faces(wanted.identity, 7)
        for field, expected in zip(zip(*found, strict=True), wanted, strict=True):
            assert torch.equal(torch.cat(field), expected[rows])
    assert (len(faces), faces.count) == (3, 7)


def test_faces_in_an_order_by_chance_are_refused():
    noise = NoiseFaces()
    noise.test_dataloader = noise.train_dataloader
    with pytest.raises(ValueError, match="in order"):
        ChosenFaces(noise, count=7, batch_size=3)


def test_a_wrong_attribute_is_tried_where_attributes_are_factors(tmp_path):
    method, faces = SDN(size=64, width=8, key_bits=8, identities=16, attributes=2).eval(), NoiseFaces(count=4).whole()
    faces = faces._replace(attributes=torch.ones(4, 2))
    hide_into(tmp_path, method, [faces], Secret("one"), 0, "png")
    recover_from(tmp_path, method, Secret("one"))
    opened = read_trip(tmp_path, faces, 64)
    for other in (opened.recovered, opened.wrongly_recovered, opened.nearly_recovered):
        assert (opened.wrong_attribute - other).abs().amax((1, 2, 3)).min() > 0
    metric = IdentityScores(LinearJudge(), threshold=0.5)
    metric.update(opened)
    assert {f.key for f in metric.figures() if f.leg == "wrongly_recovered"} == {"random", "one-bit", "attribute"}


def test_faces_without_labels_are_asked_for_attributes_by_chance(tmp_path):
    spec = {"class_path": "lightning_modules.sdn.SDN"}
    spec["init_args"] = {"size": 64, "width": 8, "key_bits": 8, "identities": 16, "attributes": 2}
    assert compare(write(tmp_path / "c.yaml", methods={"SDN": spec}), tmp_path / "out") == 0
    told = json.loads((tmp_path / "out/faces/noise/SDN/header.json").read_text())["attributes"]
    assert {sign for signs in told.values() for sign in signs} == {-1, 1}
    assert {len(signs) for signs in told.values()} == {2}
    assert "attribute" in {f.key for f in read_results(tmp_path / "out" / "results.jsonl")}
    faces = ChosenFaces(NoiseFaces(attributes=2), 6, 4)
    torch.testing.assert_close(faces.asked(2, 0).whole().attributes, faces.whole().attributes)  # labels stay


def test_the_same_secret_gives_the_same_pictures(tmp_path):
    method, faces = SDN(size=64, width=8, key_bits=8, identities=16).eval(), NoiseFaces(count=4).whole()
    for name, secret in (("a", "one"), ("b", "one"), ("c", "two")):
        hide_into(tmp_path / name, method, [faces], Secret(secret), 0, "png")
    a, b, c = (
        [path.read_bytes() for path in sorted((tmp_path / name / "anonymized").iterdir())] for name in ("a", "b", "c")
    )
    assert a == b != c


def test_a_builder_names_an_unknown_class():
    with pytest.raises(ValueError, match="judge 'x'"):
        build(object, {"class_path": "lightning_modules.judges.Nobody"}, "judge 'x'")


def test_the_method_of_the_readme_works():
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    example = text.split("```python")[1].split("```")[0]
    names = {"torch": torch, "ReversibleAnonymizer": ReversibleAnonymizer, "KeySpec": KeySpec}
    exec(example, names)  # our own text
    trip = names["Mirror"]().round_trip(NoiseFaces(size=128).whole(), KeyRing.from_seed(0))
    torch.testing.assert_close(trip.recovered, trip.original, atol=0.01, rtol=0)
    assert (trip.nearly_recovered - trip.original).abs().mean() > 0.01


def test_a_method_in_the_users_own_folder_is_compared(tmp_path):
    """The README's method, with a file of one's own beside the comparison's, by the console script."""
    need("centerface")
    root = Path(__file__).resolve().parent
    example = (root.parent / "README.md").read_text().split("```python")[1].split("```")[0]
    imports = (
        "import torch\n"
        "from lightning_modules.anonymizer import ReversibleAnonymizer\n"
        "from lightning_modules.keys import KeySpec\n"
    )
    (tmp_path / "mine.py").write_text(imports + example)
    plan = {
        "size": 64,
        "faces": 4,
        "wrong_keys": 1,
        "judges": {},
        "data": {"noise": {"class_path": "conftest.NoiseFaces", "init_args": {"size": 128}}},
        "methods": {"mirror": {"class_path": "mine.Mirror"}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(plan))
    keyveil = Path(sys.executable).parent / "keyveil"
    path = os.pathsep.join((str(root), str(root.parent)))
    done = subprocess.run(
        [keyveil, "compare", "mine.yaml", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = read_results(tmp_path / "run" / "results.jsonl")
    recovered = next(f for f in figures if (f.metric, f.leg, f.region) == ("psnr", "recovered", None))
    assert (recovered.method, recovered.n, recovered.value > 40) == ("mirror", 4, True)


def test_few_faces_are_many_people_with_two_pictures_each():
    identity = torch.tensor([5] * 10 + [6] + [7] * 3 + [8] * 2)
    assert identity[choose_faces(identity, 6)].tolist() == [5, 5, 7, 7, 8, 8]
    assert identity[choose_faces(identity, 3)].tolist() == [5, 5, 7]
    assert choose_faces(identity, 99).tolist() == list(range(16))
    assert len(choose_faces(identity, 12)) == 12
