"""Key guessing: signs of the right key, their curve, and the verb."""

import json

import pytest
import torch
from scipy.stats import multivariate_normal

from datamodules.batch import face_batch
from datamodules.detection import Detection
from experiments import attack as room
from experiments.attack import attack
from experiments.report_run import Run
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.attackers import FaceLikelihood, guess_auc, guessing_signs, received_faces
from lightning_modules.keys import KeySpec
from lightning_modules.protocol import read_results


class FindsBright:
    """Surer of a face the brighter the picture."""

    name = "bright"

    def detect(self, picture):
        return [Detection(None, float(picture.mean()) / 255, None)] if picture.mean() > 10 else []


class Negative(ReversibleAnonymizer):
    """A face as its negative where the first bit says so: hiding again tells nothing, since each key undoes itself."""

    size, key_spec = 8, KeySpec("bits", 4)

    def anonymize(self, face, key):
        return face.image * key[:, :1, None, None]

    recover = anonymize


class Marked(Negative):
    """Writes its key into a corner, whatever the face: hiding again gives the right one away."""

    def anonymize(self, face, key):
        image = face.image.clone()
        image[:, 0, 0, :4] = key
        return image

    def recover(self, face, key):
        return face.image


KEYS = torch.tensor([[1.0, 1, 1, 1], [-1, 1, 1, 1], [1, -1, 1, 1]])


def signs_of(method):
    face = face_batch(torch.full((2, 3, 8, 8), 0.5))
    keys = KEYS.expand(2, 3, 4)
    received = received_faces(method, face, keys[:, 0])
    return guessing_signs(method, received, keys, FindsBright(), FaceLikelihood(torch.rand(20, 3, 8, 8), size=4))


def test_a_key_that_undoes_itself_gives_nothing_away_when_hidden_again():
    signs = signs_of(Negative().eval())
    assert guess_auc(signs["again"]).tolist() == [0.5, 0.5]
    assert guess_auc(signs["detector"]).tolist() == [0.75, 0.75]  # one of two wrong guesses opens a dark picture
    assert guess_auc(signs["likelihood"]).tolist() == [0.75, 0.75]


def test_a_picture_that_shows_its_key_gives_it_away():
    assert guess_auc(signs_of(Marked().eval())["again"]).tolist() == [1.0, 1.0]


def test_guess_auc_is_the_share_of_wrong_keys_below_the_right_one():
    assert guess_auc(torch.tensor([[2.0, 1, 3, 2, 0], [0, 1, 1, 1, 1]])).tolist() == [0.625, 0.0]


def test_likelihood_of_all_components_is_the_gaussian():
    faces = torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = FaceLikelihood(faces, components=12, size=2)(faces[:10])
    rows = faces.flatten(1).double().numpy()
    wanted = multivariate_normal(rows.mean(0), torch.tensor(rows).T.cov().numpy()).logpdf(rows[:10])
    torch.testing.assert_close(found - found[0], torch.from_numpy(wanted - wanted[0]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="two faces"):
        FaceLikelihood(faces[:1])


def test_the_verb_writes_figures_that_a_report_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "default_detector", FindsBright)
    monkeypatch.chdir(tmp_path)
    plan = {
        "judges": {},
        "data": {"noise": {"class_path": "conftest.NoiseFaces"}},
        "methods": {
            "negative": {"class_path": "test_attack.Negative"},
            "marked": {"class_path": "test_attack.Marked"},
            "blur": {"class_path": "lightning_modules.baselines.obscure.Blur", "init_args": {"size": 64}},
        },
    }
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    attack(tmp_path / "c.yaml", faces=6, guesses=4, dry_run=True)
    assert not (tmp_path / "runs").exists()
    attack(tmp_path / "c.yaml", faces=6, guesses=4)
    out = tmp_path / "runs" / "compare" / "c"
    figures = {figure.method: figure for figure in read_results(out / "attacks.jsonl")}
    assert set(figures) == {"negative", "marked"}
    assert figures["marked"].value > 0.9
    assert (figures["marked"].metric, figures["marked"].leg, figures["marked"].n) == ("key_guess_auc", "attacked", 6)
    assert "blur has no key" in capsys.readouterr().err
    (out / "run.json").write_text(json.dumps({"rows": [], "failures": [], "judges": []}))
    assert Run(out).methods == ["negative", "marked"]
    with pytest.raises(ValueError, match="one guess"):
        attack(tmp_path / "c.yaml", guesses=0)
