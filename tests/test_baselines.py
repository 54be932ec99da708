import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces

from datamodules.batch import face_batch
from lightning_modules.baselines.khorzooghi import StyleMixing
from lightning_modules.baselines.ksame import KSame
from lightning_modules.baselines.obscure import BlackBox, Blur, Pixelate
from lightning_modules.baselines.xue import LatentSteps
from lightning_modules.baselines.yang import AdversarialPerturbation, attention
from lightning_modules.keys import KeyRing


@pytest.mark.parametrize(
    "method", [Blur(size=64), Pixelate(size=64), BlackBox(size=64)], ids=lambda m: type(m).__name__
)
def test_the_floor_hides_detail_and_cannot_be_undone(method):
    faces = NoiseFaces().whole()
    trip = method.eval().round_trip(faces, KeyRing.from_seed(0))
    assert trip.anonymized.shape == faces.image.shape
    assert (trip.anonymized - faces.image).abs().mean() > 0.01
    assert trip.recovered.shape[1] == trip.other.shape[1] == 0
    with pytest.raises(ValueError, match="not reversible"):
        method.recover(faces, torch.zeros(len(faces.image), 0))


def test_pixelate_keeps_the_mean_of_each_block():
    image = torch.rand(1, 3, 64, 64)
    out = Pixelate(blocks=8, size=64).anonymize(face_batch(image), torch.zeros(1, 0))
    torch.testing.assert_close(out.mean(), image.mean())
    assert len(out[0, 0].unique()) == 64


def test_k_same_is_the_mean_of_k_training_faces():
    method, faces = KSame(LinearRecognizer(), k=3, size=64).eval(), NoiseFaces(people=6)
    method.prepare(faces)
    assert len(method.gallery) == 6
    whole = faces.whole()
    out = method.anonymize(whole, torch.zeros(len(whole.image), 0))
    nearest = (LinearRecognizer()(whole.image[:1]) @ method.codes.T).topk(3).indices[0]
    expected = (method.gallery[nearest].float() / 127.5 - 1).mean(0)
    torch.testing.assert_close(out[0], expected)


def test_k_same_shows_one_picture_to_at_least_k_gallery_people():
    """Each gallery person contributes at most 1/k of any picture, which is the published bound."""
    method, faces = KSame(LinearRecognizer(), k=6, size=64).eval(), NoiseFaces(people=6)
    method.prepare(faces)
    whole = faces.whole()
    out = method.anonymize(whole, torch.zeros(len(whole.image), 0))
    torch.testing.assert_close(out, out[:1].expand_as(out))


def test_k_same_says_what_it_lacks():
    with pytest.raises(ValueError, match="no gallery yet"):
        KSame(LinearRecognizer(), size=64).anonymize(face_batch(torch.zeros(1, 3, 64, 64)), torch.zeros(1, 0))
    with pytest.raises(ValueError, match="at least k = 9"):
        KSame(LinearRecognizer(), k=9, size=64).prepare(NoiseFaces(people=6))


INVERSION = {"size": 64, "trunk": "own", "width": 8, "blocks": 1, "live_rows": 5}


def edits(kind, **options):
    torch.manual_seed(0)
    return kind(generator=LinearGenerator(), recognizer=LinearRecognizer(), **INVERSION, **options).eval()


def likeness(image, faces):
    with torch.no_grad():
        recognizer = LinearRecognizer()
        return (recognizer(image) * recognizer(faces.image)).sum(1)


@pytest.mark.parametrize(
    "method",
    [edits(StyleMixing, cut=2), edits(LatentSteps, steps=3), AdversarialPerturbation(LinearRecognizer(), 64).eval()],
    ids=lambda m: type(m).__name__,
)
def test_edits_of_codes_and_pixels_are_repeatable_and_each_faces_own(method):
    faces = NoiseFaces(count=6).whole()
    nothing = torch.zeros(6, 0)
    made = method.anonymize(faces, nothing)
    assert made.shape == faces.image.shape
    assert made.abs().max() <= 1
    torch.testing.assert_close(method.anonymize(faces, nothing), made)
    alone = type(faces)(*(field[2:3] for field in faces))
    torch.testing.assert_close(method.anonymize(alone, nothing[:1])[0], made[2], rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in method.parameters())
    assert not any(p.grad is not None for p in method.parameters())
    with pytest.raises(ValueError, match="not reversible"):
        method.recover(faces, nothing)


def test_style_mixing_keeps_the_rows_up_to_the_cut():
    faces, nothing = NoiseFaces(count=4).whole(), torch.zeros(4, 0)
    with torch.no_grad():
        whole = edits(StyleMixing, cut=5)
        rendered = whole.render(whole.disentangler.encode(faces.image), faces.image)
    torch.testing.assert_close(whole.anonymize(faces, nothing), rendered)
    strangers = edits(StyleMixing, cut=0)
    first = strangers.anonymize(faces, nothing)
    torch.testing.assert_close(strangers.anonymize(faces._replace(image=-faces.image), nothing), first)
    assert (first - edits(StyleMixing, cut=0, seed=1).anonymize(faces, nothing)).abs().mean() > 0.01
    with pytest.raises(ValueError, match="from 0 to 5"):
        edits(StyleMixing, cut=6)


def test_steps_on_the_code_lead_away_from_the_identity_and_stop_where_it_is_far():
    faces, nothing = NoiseFaces(count=4).whole(), torch.zeros(4, 0)
    reached = [
        likeness(edits(LatentSteps, steps=steps, inner=0, far=-1.0).anonymize(faces, nothing), faces)
        for steps in (0, 5, 20)
    ]
    assert (reached[1] < reached[0]).all()
    assert (reached[2] < reached[1]).all()
    kept = edits(LatentSteps, steps=20, inner=0, far=2.0).anonymize(faces, nothing)  # all are far enough
    torch.testing.assert_close(kept, edits(LatentSteps, steps=0).anonymize(faces, nothing))


def test_a_perturbation_stays_within_its_levels_and_attention():
    faces, nothing = NoiseFaces(count=4).whole(), torch.zeros(4, 0)
    reached = []
    for levels in (0.0, 8.0, 16.0):
        method = AdversarialPerturbation(LinearRecognizer(), 64, levels=levels).eval()
        made = method.anonymize(faces, nothing)
        assert ((made - faces.image).abs() <= levels / 127.5 * attention(faces.image, 64) + 1e-6).all()
        reached.append(likeness(made, faces))
    torch.testing.assert_close(reached[0], torch.ones(4))
    assert (reached[1] < reached[0]).all()
    assert (reached[2] < reached[1]).all()
    assert attention(faces.image, 32).amax((1, 2, 3)).max() <= 1
