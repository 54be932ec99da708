"""Key guessing: signs of the right key, their curve, and the verb."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces
from rich.console import Console
from scipy.stats import multivariate_normal

from datamodules.batch import FaceBatch, face_batch
from datamodules.detection import Detection
from experiments import attack as room
from experiments.attack import _one_each, attack
from experiments.report_run import Run
from flows.conjugate import Conjugate
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.attackers import (
    FaceLikelihood,
    adapted,
    codes_of,
    guess_auc,
    guessing_signs,
    known_plaintext,
    learned_blocks,
    learned_codes,
    received_faces,
)
from lightning_modules.calibration import Calibration
from lightning_modules.ifadit import IFADITTransform
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


class Signs(ReversibleAnonymizer):
    """Each pixel's sign by the key."""

    size, key_spec = 64, KeySpec("bits", 3 * 64 * 64)

    def anonymize(self, face, key):
        return face.image * key.view(-1, 3, 64, 64)

    recover = anonymize


class Judged(Signs):
    """One whose loss used the judge."""

    loss_networks = frozenset({"linear-judge"})


class ManyFaces(NoiseFaces):
    def __init__(self):
        super().__init__(count=300)


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


def test_pairs_of_codes_teach_a_rotation_of_people_and_one_pair_does_not():
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(400, 24, generator=generator) * torch.linspace(0.2, 2, 24)
    people = torch.nn.functional.normalize(people, dim=1)
    flow = Conjugate(24, 24).fit_(people, shrink=0.0)
    key = torch.linalg.qr(torch.randn(1, 24, 24, generator=generator))[0].expand(400, 24, 24)
    hidden = flow(people, key)[0]

    def agreement(count):
        guessed = learned_codes(hidden[:count], people[:count], people)(hidden[200:])
        return float((guessed * people[200:]).sum(1).mean())

    assert agreement(100) > 0.99
    assert agreement(1) < 0.4


def test_pairs_of_pictures_teach_what_is_linear_in_blocks():
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(300, 3, 16, 16, generator=generator) * 2 - 1
    signs = torch.randint(0, 2, (1, 3, 16, 16), generator=generator) * 2.0 - 1
    hidden = shown * signs

    def error(count):
        return float((learned_blocks(hidden[:count], shown[:count])(hidden[250:]) - shown[250:]).abs().mean())

    assert error(250) < 0.1
    assert error(1) > 0.4
    lone = learned_blocks(hidden[:1], shown[:1])(hidden[1:2])
    torch.testing.assert_close(lone, shown[:1])  # one pair teaches its original and nothing else


@pytest.mark.parametrize(("fixed", "sees"), [(True, True), (False, False)])
def test_known_originals_help_where_a_key_comes_twice(fixed, sees):
    """Under keys of their own, what is known of some pictures says nothing of others."""
    method, faces = Signs().eval(), NoiseFaces(count=400).whole()
    keys = method.key_spec.random(400, torch.Generator().manual_seed(0))
    keys = keys[:1].expand(400, -1) if fixed else keys
    known, others = (FaceBatch(*(field[part] for field in faces)) for part in (slice(0, 380), slice(380, 400)))
    received = received_faces(method, others, keys[380:]).image
    hidden = received_faces(method, known, keys[:380]).image
    opened = known_plaintext(method, known.image, hidden, received, codes_of(method, known.image), [10, 380])
    assert set(opened[380]) == {"blocks"}

    def alike(images):
        return float(torch.corrcoef(torch.stack([images.flatten(), others.image.flatten()]))[0, 1])

    assert (alike(opened[380]["blocks"]) > 0.9) == sees
    if not sees:
        assert alike(opened[380]["blocks"]) < 0.1
    assert alike(opened[10]["blocks"]) < max(0.1, alike(opened[380]["blocks"]))


def test_a_method_with_codes_is_attacked_through_them_too():
    torch.manual_seed(0)
    method = IFADITTransform(
        LinearGenerator(), LinearRecognizer(), Conjugate(512, 16), size=64, width=8, blocks=1, live_rows=4
    ).eval()
    faces = NoiseFaces(count=60)
    with torch.no_grad():
        method.prepare(faces)
    whole = faces.whole()
    keys = method.key_spec.random(1).expand(60, -1, -1)
    hidden = received_faces(method, whole, keys).image
    people = codes_of(method, whole.image[:50])
    opened = known_plaintext(method, whole.image[:50], hidden[:50], hidden[50:], people, [50])
    assert set(opened[50]) == {"blocks", "codes"}
    assert opened[50]["codes"].shape == (10, 3, 64, 64)


def test_a_judge_is_adapted_by_what_pairs_have_in_common_and_by_nothing_else():
    generator = torch.Generator().manual_seed(0)
    shown, noise = (torch.randn(240, 16, generator=generator) for _ in range(2))
    turned = shown @ torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    known, tested = slice(0, 200), slice(200, 240)
    torch.testing.assert_close(adapted(turned[known], shown[known])(turned[tested]), shown[tested], atol=0.02, rtol=0)
    kept = adapted(shown[known], shown[known])(noise[tested])
    torch.testing.assert_close(kept, noise[tested], atol=1e-3, rtol=0)
    taught = adapted(noise[known], shown[known])(noise[tested])  # what has nothing in common is drawn to the mean
    assert (taught - shown[tested]).square().mean() < 1.2 * shown[tested].square().mean()
    with pytest.raises(ValueError, match="four pairs"):
        adapted(shown[:3], shown[:3])


def test_the_verb_tells_pairs_under_one_key_from_pairs_under_their_own(tmp_path, monkeypatch, capsys):
    threshold = Calibration(threshold=0.9, far=1e-3, pairs=1000, low=0.8, high=0.95)
    monkeypatch.setattr(room, "load_calibration", lambda judge: threshold)
    monkeypatch.chdir(tmp_path)
    plan = {
        "judges": {"linear": {"class_path": "test_compare.LinearJudge"}},
        "data": {"noise": {"class_path": "test_attack.ManyFaces"}},
        "methods": {"signs": {"class_path": "test_attack.Signs"}},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    attack(tmp_path / "c.yaml", faces=6, guesses=0, pairs=[300, 1], inverter_steps=0)
    figures = read_results(tmp_path / "runs" / "compare" / "c" / "attacks.jsonl")
    value = {(figure.metric, figure.key): figure.value for figure in figures}
    known = {(f"known_plaintext@{n}", key) for n in (1, 300) for key in ("none", "fixed")}
    shared = {("known_plaintext@1", "shared"), ("known_person", "shared")}
    assert set(value) == known | shared | {("adaptive_tar", "none")}
    assert value["adaptive_tar", "none"] is None  # thirty pairs of strangers
    assert value["known_plaintext@300", "fixed"] == 1
    assert value["known_plaintext@300", "none"] < 1
    attack(tmp_path / "c.yaml", faces=6, guesses=0, pairs=[301, 10], inverter_steps=0)
    assert "has 300 training faces: without [301] pairs" in " ".join(capsys.readouterr().err.split())
    kept = read_results(tmp_path / "runs" / "compare" / "c" / "attacks.jsonl")
    words = {"adaptive_tar", "known_person", *(f"known_plaintext@{n}" for n in (1, 10, 300))}
    assert {f.metric for f in kept} == words
    assert len(kept) == 10  # the figures of the adapted judge and of a known person took the place of the older ones
    plan["methods"] = {"known": {"class_path": "test_attack.Judged"}, **plan["methods"]}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    assert attack(tmp_path / "c.yaml", faces=6, guesses=0, pairs=[10], inverter_steps=0) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "failed known on noise: judge 'linear' is a loss network of this method" in told
    assert "noise: signs: attacked: known_plaintext@10" in told  # the others are attacked all the same
    run = json.loads((tmp_path / "runs/compare/c/run.json").read_text())
    assert [attack["command"].partition("--pairs ")[2].split(" --")[0] for attack in run["attacks"]] == [
        "'[300, 1]'",
        "'[301, 10]'",
        "'[10]'",
    ]


def test_a_sign_that_is_less_for_the_right_key_tells_it_as_well(monkeypatch):
    target = SimpleNamespace(
        **{"whole": NoiseFaces(count=4).whole(), "plan": SimpleNamespace(batch_size=2), "data": "d", "name": "m"},
        **{"method": None, "ring": None, "console": Console(quiet=True)},
    )
    signs = {"again": torch.full((2,), 0.5), "detector": torch.full((2,), 0.1)}
    monkeypatch.setattr(room, "_told_apart", lambda *_: signs)
    (found,) = room._by_guessing(target, 8, None)
    assert found.figure().value == pytest.approx(0.9)


def test_pairs_are_of_as_many_people_as_there_are():
    faces = NoiseFaces(count=24, people=6).whole()
    ordered = _one_each(faces, seed=0)
    assert ordered.sample.sort().values.tolist() == list(range(24))
    assert all(len(set(ordered.identity[at : at + 6].tolist())) == 6 for at in range(0, 24, 6))
    assert not torch.equal(ordered.sample, _one_each(faces, seed=1).sample)


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
    attack(tmp_path / "c.yaml", faces=6, guesses=4, pairs=[])
    assert "key guessing" in (tmp_path / "runs" / "compare" / "c" / "table.md").read_text()
    out = tmp_path / "runs" / "compare" / "c"
    figures = {figure.method: figure for figure in read_results(out / "attacks.jsonl")}
    assert set(figures) == {"negative", "marked"}
    assert figures["marked"].value > 0.9
    assert (figures["marked"].metric, figures["marked"].leg, figures["marked"].n) == ("key_guess_auc", "attacked", 6)
    assert "blur has no key" in capsys.readouterr().err
    (out / "run.json").write_text(json.dumps({"rows": [], "failures": [], "judges": []}))
    assert Run(out).methods == ["negative", "marked"]
    with pytest.raises(ValueError, match="guesses from 0"):
        attack(tmp_path / "c.yaml", guesses=-1)
    with pytest.raises(ValueError, match="a size in sixteens"):
        attack(tmp_path / "c.yaml", inverter_size=24)
    with pytest.raises(ValueError, match="no method 'nobody'; there are negative"):
        attack(tmp_path / "c.yaml", only="negative,nobody")
