import pytest
import torch
from conftest import LinearRecognizer, NoiseFaces

from datamodules.batch import face_batch
from lightning_modules.baselines.ksame import KSame
from lightning_modules.baselines.obscure import BlackBox, Blur, Pixelate
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
