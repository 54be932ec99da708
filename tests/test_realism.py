"""Distances between sets are what their definitions say, and are of nothing but the networks that they name."""

import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from orl_faces import need, orl_faces
from scipy.linalg import sqrtm
from skimage.data import chelsea, coffee
from test_metrics import FakeJudge
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.functional import gaussian_blur

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics import perceptual, realism
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.perceptual import squeeze_network
from lightning_modules.metrics.realism import Realism, frechet_distance, kernel_distance
from lightning_modules.metrics.recovery import PictureQuality
from lightning_modules.networks.efficientnet_lite import EfficientNetLite0
from lightning_modules.weights import find, loader


def white(n, dim):
    """Features whose mean is exactly 0 and whose covariance is exactly the unit matrix."""
    x = torch.randn(n, dim, dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (n - 1) ** 0.5


def test_the_distance_of_two_gaussians_is_its_closed_form():
    """‖m − n‖² + Σ (s − t)² of independent coordinates with deviations s and t."""
    s, t, m = torch.rand(3, 6, dtype=torch.float64)
    expected = float(m.square().sum() + (s - t).square().sum())
    assert frechet_distance(white(40, 6) * s + m, white(30, 6) * t) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_any_two_gaussians_is_the_published_one():
    x, y = white(50, 5) @ torch.randn(5, 5).double(), white(60, 5) @ torch.randn(5, 5).double() + 1
    a, b = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    expected = 5 + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def features_of(kind, x, y, **more):
    """Somebody else's distance of ready features."""
    handed_on = nn.Identity()
    handed_on.num_features = x.shape[1]
    metric = kind(feature=handed_on, **more)
    metric.set_dtype(torch.float64)
    for features, real in ((x, False), (y, True)):
        metric.update(features, real=real)
    return metric.compute()


@pytest.mark.parametrize("n", [12, 200])
def test_distances_are_those_of_torchmetrics(n):
    """Also with fewer pictures than features."""
    x, y = torch.randn(n, 32).double(), torch.randn(n, 32).double() * 1.5 + 0.2
    assert frechet_distance(x, y) == pytest.approx(float(features_of(FrechetInceptionDistance, x, y)), rel=1e-5)
    theirs = features_of(KernelInceptionDistance, x, y, subsets=1, subset_size=n)[0]
    assert kernel_distance(x, y) == pytest.approx(float(theirs), rel=1e-6)


def test_the_kernel_distance_is_its_sum_over_pairs():
    x, y = torch.randn(4, 3).double(), torch.randn(5, 3).double()

    def mean(pairs):
        return float(np.mean([(float(a @ b) / 3 + 1) ** 3 for a, b in pairs]))

    def within(z):
        return mean([(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    across = mean([(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-9)


def test_few_features_are_no_distribution():
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="two pictures at least, got 1 and 4"):
            distance(torch.zeros(1, 3), torch.zeros(4, 3))


class Means(nn.Module):
    """A network for tests: means of four by four blocks."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def means(monkeypatch):
    monkeypatch.setattr(realism, "NETWORKS", {"inception": Means, "efficientnet": Means})
    realism._network.cache_clear()
    yield
    realism._network.cache_clear()


def trip(start, stop, seed=0):
    """Some of forty faces of noise."""
    random = torch.Generator().manual_seed(seed)
    made = {name: torch.rand(40, 3, 16, 16, generator=random)[start:stop] * 2 - 1 for name in ("original", "a", "r")}
    number = torch.arange(40)[start:stop]
    legs = {"anonymized": made["a"] * 0.5 + 0.4, "recovered": made["original"], "wrongly_recovered": made["r"]}
    return RoundTrip.of(made["original"], identity=number, sample=number, **legs)


def test_every_leg_is_compared_with_the_originals(means):
    metric = Realism()
    metric.update(trip(0, 40))
    found = {(f.metric, f.leg, f.key): f for f in metric.figures()}
    legs = (("anonymized", "right"), ("recovered", "right"), ("wrongly_recovered", "random"))
    assert set(found) == {(name, *leg) for name in ("fid", "kid", "fd_efflite0") for leg in legs}
    assert {(figure.n, figure.low, figure.judge) for figure in found.values()} == {(40, None, None)}
    assert found["fid", "recovered", "right"].value == pytest.approx(0, abs=1e-9)
    assert found["fid", "anonymized", "right"].value > found["fid", "wrongly_recovered", "random"].value > 0


def test_joined_processes_give_the_numbers_of_one(means):
    whole, parts = Realism(), [Realism(), Realism()]
    whole.update(trip(0, 40))
    for start, stop, metric in ((0, 8, parts[0]), (8, 23, parts[0]), (23, 40, parts[1])):
        metric.update(trip(start, stop))
    parts[0].merge_state(parts[1])
    for one, joined in zip(whole.figures(), parts[0].figures(), strict=True):
        assert (joined.metric, joined.leg, joined.n) == (one.metric, one.leg, 40)
        assert joined.value == pytest.approx(one.value, abs=1e-6)


def test_gathered_states_give_the_numbers_of_one(means):
    """What torchmetrics does between processes, with a gathering that holds both halves."""
    whole, halves = Realism(), [Realism(), Realism()]
    whole.update(trip(0, 40))
    for metric, (start, stop) in zip(halves, ((0, 20), (20, 40)), strict=True):
        metric.update(trip(start, stop))
    there = iter([])

    def gather(state, group=None):
        return [state, next(there)]

    states = {name: getattr(halves[1], name) for name in halves[1]._reductions}
    there = iter([torch.cat(s) if isinstance(s, list) else s for s in states.values() if not isinstance(s, list) or s])
    halves[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    for one, joined in zip(whole.measured(), halves[0].measured(), strict=True):
        torch.testing.assert_close(joined.values, one.values, atol=1e-6, rtol=0)
        assert joined.n == one.n == 40


def test_one_face_is_no_distribution_and_says_so(means):
    metric = Realism()
    metric.update(trip(0, 1))
    assert {(f.value, f.why) for f in metric.figures()} == {(None, "a distribution takes two faces at least")}


def test_without_its_weights_a_figure_says_so_and_nothing_is_fetched(monkeypatch):
    for room in (realism, perceptual):
        monkeypatch.setattr(room, "find", lambda name: None)
    monkeypatch.setattr(loader, "_fetch", lambda *_: pytest.fail("a download was tried"))
    realism._network.cache_clear()
    for loaded in perceptual.NETWORKS.values():
        loaded.cache_clear()
    figures = []
    for metric in (Realism(), PictureQuality(tuple(perceptual.NETWORKS))):
        metric.update(trip(0, 4))
        figures += [figure for figure in metric.figures() if figure.value is None]
    assert {(f.metric, f.why.removeprefix("weights missing: ")) for f in figures} == {
        ("fid", "inception-fid"),
        ("kid", "inception-fid"),
        ("fd_efflite0", "efficientnet-lite0"),
        ("lpips", "lpips-alex-backbone"),
        ("pieapp", "pieapp"),
        ("lpips_squeeze_caffe", "squeezenet-caffe"),
    }
    assert {f.leg for f in figures} == {"anonymized", "recovered", "wrongly_recovered"}


def test_fd_face_is_of_the_judges_embeddings_and_bears_its_name():
    metric = IdentityScores(FakeJudge(dim=6), threshold=0.5)
    metric.update(trip(0, 40))
    found = {f.leg: f for f in metric.figures() if f.metric == "fd_face"}
    assert {(f.judge, f.judge_weights, f.n) for f in found.values()} == {("fake", "sha256:fake", 40)}
    original, recovered, wrong = (
        metric.judge.embed(getattr(trip(0, 40), x)) for x in ("original", "recovered", "wrongly_recovered")
    )
    assert found["recovered"].value == pytest.approx(frechet_distance(recovered, original), abs=1e-9)
    assert found["wrongly_recovered"].value == pytest.approx(frechet_distance(wrong, original), abs=1e-9)


# --- the networks -------------------------------------------------------------------------------------


def square(picture):
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    pixels = picture[top : top + side, left : left + side].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_efficientnet_knows_a_cat_and_a_cup_of_coffee():
    """ImageNet's classes 281 to 285 are cats, 967 is espresso."""
    need("efficientnet-lite0")
    network = EfficientNetLite0()
    with torch.no_grad():
        assert 281 <= int(network.classify(square(chelsea())).argmax()) <= 285
        assert int(network.classify(square(coffee())).argmax()) == 967
    assert not list(network.state_dict())
    assert network(torch.rand(2, 3, 40, 40) * 2 - 1).shape == (2, 1280)


def test_the_more_blur_the_further_and_other_people_further_than_none():
    need("efficientnet-lite0")
    faces = orl_faces(people=8, each=2, size=128)
    one, other = faces[:, 0], faces[:, 1]
    metric = {}
    for name, images in {"same": one, "a little": blurred(one, 1), "much": blurred(one, 4), "others": other}.items():
        measure = Realism()
        number = torch.arange(8)
        measure.update(RoundTrip.of(one, identity=number, sample=number, anonymized=images))
        metric[name] = next(f.value for f in measure.figures() if f.metric == "fd_efflite0")
    assert metric["same"] == pytest.approx(0, abs=1e-6)
    assert 0 < metric["a little"] < metric["much"]
    assert metric["others"] > 0


def blurred(images, sigma):
    return gaussian_blur(images, 2 * 4 * sigma + 1, sigma)


def card_of(monkeypatch, tmp_path, name, weights):
    """A file of ours under a card's name, whose card has its hash."""
    entry = loader.card(name)
    file = tmp_path / entry.file
    torch.save(weights, file)
    page = yaml.safe_load(loader.CARDS.read_text())
    page["cards"][name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "cards.yaml").write_text(yaml.safe_dump(page))
    monkeypatch.setattr(loader, "CARDS", tmp_path / "cards.yaml")
    monkeypatch.setenv("KEYVEIL_WEIGHTS", str(tmp_path))


def test_fid_takes_the_features_of_torchmetrics_from_the_file(monkeypatch, tmp_path):
    """With random weights: the real ones are a download."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as without:
        without.setattr(fidelity.torch, "load", lambda *_, **__: {})
        without.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        weights = fidelity.FeatureExtractorInceptionV3("x", ["2048"], "x").state_dict()
    card_of(monkeypatch, tmp_path, "inception-fid", weights)
    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(find("inception-fid"))).inception
    images = trip(0, 6).anonymized
    found = realism.Inception()(images)
    torch.testing.assert_close(found, theirs(((images + 1) * 127.5).round().byte()))
    assert found.std(0).mean() > 0


def test_pieapp_is_piqs_with_the_weights_of_the_file(monkeypatch, tmp_path):
    """With random weights: the real ones are a download."""
    import piq

    weights = piq.pieapp.PieAPPModel().state_dict()
    weights["ref_score_subtract.weight"] = weights["ref_score_subtract.weight"].squeeze(1)  # as published
    card_of(monkeypatch, tmp_path, "pieapp", weights)
    perceptual.pieapp_network.cache_clear()
    images, originals = (torch.rand(2, 3, 96, 96) * 2 - 1 for _ in range(2))
    found = perceptual.pieapp_network()(images, originals)
    perceptual.pieapp_network.cache_clear()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: dict(weights))
    theirs = piq.PieAPP(reduction="none")(images / 2 + 0.5, originals / 2 + 0.5)
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-4)


def test_squeezenet_gives_what_its_file_gives():
    need("squeezenet-caffe")
    network = squeeze_network()
    model = onnx.load(str(find("squeezenet-caffe")))
    taps = ["conv1_2", *(f"fire{number}/concat_1" for number in (3, 5, 6, 7, 8, 9))]
    kind = onnx.TensorProto.FLOAT16
    model.graph.output.extend(onnx.helper.make_tensor_value_info(tap, kind, None) for tap in taps)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    levels = network.scaling_layer(torch.rand(1, 3, 224, 224) * 2 - 1)
    theirs = session.run(taps, {"data_0": levels.half().numpy()})
    with torch.no_grad():
        ours = network.net(levels)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - torch.tensor(other).float()).abs().max() / one.abs().max()) < 2e-3


def test_the_squeeze_distance_grows_with_blur_and_is_largest_to_somebody_else():
    need("squeezenet-caffe")
    network, one = squeeze_network(), orl_faces(people=4, each=2, size=128)[:, 0]
    with torch.no_grad():
        found = [float(network(x, one).mean()) for x in (one, blurred(one, 1), blurred(one, 2), one.roll(1, 0))]
    assert found == sorted(found)
    assert found[0] == 0
