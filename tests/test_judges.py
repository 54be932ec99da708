"""Judges tell people apart, judge each face on its own, and say where they run."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from orl_faces import need, orl_faces
from torch.nn import functional as F

from experiments.judges import cross_validate, embeddings, make_judge, read_pairs
from lightning_modules.judges import Dlib, FaceRes, InsightFace, Judge, OnnxJudge, OwnNetwork
from lightning_modules.networks.faceres import SameConv, read_tfjs
from lightning_modules.weights import card, locate


def make(name):
    if name == "dlib":
        pytest.importorskip("dlib")
        need("dlib-recognition", "dlib-landmarks5")
        return Dlib()
    if name == "faceres":
        need("faceres", "faceres-graph")
        return FaceRes()
    need("mobilefacenet")
    path = locate("mobilefacenet")
    return {
        "mobilefacenet": OwnNetwork,
        "onnx": lambda: OnnxJudge(path, provider="cpu"),
        "insightface": lambda: InsightFace(path, provider="cpu"),
    }[name]()


@pytest.fixture(scope="module", params=["mobilefacenet", "dlib", "faceres", "onnx", "insightface"])
def judge(request):
    return make(request.param)


@pytest.fixture(scope="module")
def faces():
    return orl_faces().flatten(0, 1)


@pytest.fixture(scope="module")
def embedded(judge, faces):
    return judge.embed(faces)


def test_a_judge_is_a_judge(judge, embedded):
    assert isinstance(judge, Judge)
    assert judge.weights.startswith("sha256:")
    assert len(judge.weights) == 71
    assert judge.networks
    assert judge.name in judge.describe()
    assert embedded.dtype == torch.float32
    assert embedded.device.type == "cpu"
    assert not embedded.requires_grad


def test_one_person_is_more_alike_than_two(judge, embedded):
    first, second = embedded.view(4, 2, -1).unbind(1)
    similarity = judge.similarity(first, second)
    assert similarity.shape == (4, 4)
    assert (similarity.argmax(1) == torch.arange(4)).all()
    different = similarity[~torch.eye(4, dtype=torch.bool)]
    assert similarity.diagonal().mean() > different.mean() + different.std()


def test_a_face_is_most_alike_to_itself(judge, embedded):
    itself = judge.similarity(embedded, embedded).diagonal()
    torch.testing.assert_close(itself, torch.full_like(itself, 0.0 if judge.name == "dlib" else 1.0))


def test_a_face_is_judged_on_its_own(judge, faces, embedded):
    torch.testing.assert_close(judge.embed(faces[2:3]), embedded[2:3], atol=1e-4, rtol=0)


def test_a_judge_sees_the_same_person_at_another_size(judge, faces, embedded):
    small = judge.embed(F.interpolate(faces, size=(128, 128), mode="bilinear", antialias=True))
    similarity = judge.similarity(small, embedded)
    assert (similarity.argmax(1) == torch.arange(len(faces))).all()


def test_a_judge_keeps_its_precision_under_autocast(judge, faces, embedded):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(judge.embed(faces[:1]), embedded[:1], atol=1e-4, rtol=0)


def test_the_three_ways_to_run_one_file_agree(faces):
    own, onnx, insightface = (make(name).embed(faces[:2]) for name in ("mobilefacenet", "onnx", "insightface"))
    torch.testing.assert_close(onnx, own, atol=1e-4, rtol=0)
    torch.testing.assert_close(insightface, own, atol=1e-4, rtol=0)


def test_a_copy_of_a_loss_network_is_known_by_its_hash(tmp_path):
    need("mobilefacenet")
    copy = tmp_path / "another_name.onnx"
    copy.write_bytes(locate("mobilefacenet").read_bytes())
    judge = OnnxJudge(copy, provider="cpu")
    assert judge.name == "another_name"
    assert judge.networks == {"mobilefacenet"}
    assert judge.weights == card("mobilefacenet").digest


def test_a_gpu_that_was_asked_for_is_never_replaced(monkeypatch):
    need("mobilefacenet")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for kind in (OnnxJudge, InsightFace):
        with pytest.raises(ValueError, match="'cuda' was asked for, .* offers only CPUExecutionProvider"):
            kind(locate("mobilefacenet"), provider="cuda")
    assert "CPUExecutionProvider" in OnnxJudge(locate("mobilefacenet")).describe()


@pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has CUDA",
)
def test_a_gpu_that_is_offered_but_cannot_start_is_never_replaced(monkeypatch):
    need("mobilefacenet")
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    with pytest.raises((RuntimeError, ValueError), match=r"CUDA|cuda"):
        OnnxJudge(locate("mobilefacenet"), provider="cuda")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        OnnxJudge(tmp_path / "adaface.onnx")
    with pytest.raises(FileNotFoundError, match=r"no recogniser of insightface in .*buffalo_l"):
        InsightFace("buffalo_l", root=tmp_path)
    with pytest.raises(ValueError, match="unknown judge 'facenet'"):
        make_judge("facenet")


def test_a_pack_of_insightface_is_searched_for_its_recogniser(tmp_path):
    need("mobilefacenet", "gender")
    pack = tmp_path / "models" / "my_pack"
    pack.mkdir(parents=True)
    (pack / "a_other.onnx").write_bytes(locate("gender").read_bytes())
    (pack / "w600k.onnx").write_bytes(locate("mobilefacenet").read_bytes())
    assert InsightFace("my_pack", root=tmp_path, provider="cpu").name == "insightface-w600k"


def test_dlib_sees_what_its_own_detector_would_show_it(faces):
    judge = make("dlib")
    import dlib

    detector = dlib.get_frontal_face_detector()
    points = dlib.shape_predictor(str(locate("dlib-landmarks5")))
    network = dlib.face_recognition_model_v1(str(locate("dlib-recognition")))
    pixels = ((faces + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    found = [(number, detector(picture, 0)) for number, picture in enumerate(pixels)]
    found = [(number, boxes[0]) for number, boxes in found if boxes]
    assert found
    for number, box in found:
        shape = points(pixels[number], box)
        chip = dlib.get_face_chip(pixels[number], shape, size=150, padding=0.25)
        distance = np.linalg.norm(judge.embed(faces[number][None])[0] - np.array(network.compute_face_descriptor(chip)))
        assert distance < 0.2  # one person's pictures lie up to 0.6 apart


def test_dlib_in_processes_says_the_same(faces):
    alone = make("dlib").embed(faces[:3])
    torch.testing.assert_close(Dlib(processes=2).embed(faces[:3]), alone)


def test_faceres_names_apparent_gender_and_age(faces):
    judge = make("faceres")
    found = judge.attributes(faces)
    assert found.male.shape == found.age.shape == (8,)
    assert (found.male > 0.5).float().mean() > 0.7  # the first people of ORL are men
    assert 10 < found.age.min() <= found.age.max() < 90
    torch.testing.assert_close(judge.attributes(faces[3:4]).age, found.age[3:4], atol=1e-2, rtol=0)


def test_same_padding_is_tensorflows():
    """Stride 2 on an even side: nothing before, one after; as the reference formula of TensorFlow gives."""
    convolution = SameConv(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.tensor([[picture[0, 0, :3, :3].sum(), picture[0, 0, :3, 2:].sum()]])
    torch.testing.assert_close(convolution(picture)[0, 0, :1], expected)
    assert SameConv(1, 1, 3, 1)(picture).shape == (1, 1, 4, 4)


def test_a_tfjs_file_that_does_not_fit_is_refused(tmp_path):
    graph, binary = tmp_path / "g.json", tmp_path / "g.bin"
    weight = {"name": "w", "shape": [2], "dtype": "float32"}

    def write(entry, data):
        graph.write_text(json.dumps({"weightsManifest": [{"weights": [entry]}], "modelTopology": {"node": []}}))
        binary.write_bytes(data)

    write(weight, np.array([1, 2], np.float32).tobytes())
    assert read_tfjs(graph, binary)[1]["w"].tolist() == [1, 2]
    write({**weight, "quantization": {"dtype": "float16"}}, np.array([1, 2], np.float16).tobytes())
    assert read_tfjs(graph, binary)[1]["w"].dtype == np.float32
    write(weight, np.zeros(3, np.float32).tobytes())
    with pytest.raises(ValueError, match="12 bytes, but g.json describes 8"):
        read_tfjs(graph, binary)
    write({**weight, "quantization": {"dtype": "uint8", "scale": 1, "min": 0}}, b"12")
    with pytest.raises(ValueError, match="got 'uint8'"):
        read_tfjs(graph, binary)


def test_cross_validation_never_uses_the_fold_it_judges():
    same = np.tile([True, False], 50)
    fold = np.repeat(np.arange(10), 10)
    right, thresholds = cross_validate(np.where(same, 0.9, 0.1), same, fold)
    assert right.all()
    np.testing.assert_allclose(thresholds, 0.5)
    scores = np.where(same, 0.9, 0.1)
    scores[fold == 3] = 1 - scores[fold == 3]  # one fold that contradicts the others is wrong throughout
    right, thresholds = cross_validate(scores, same, fold)
    assert not right[fold == 3].any()
    assert right[fold != 3].all()


def test_the_pairs_of_another_list_are_refused(tmp_path):
    (tmp_path / "pairs.txt").write_text("10\t300\nA\t1\t2\n")
    with pytest.raises(ValueError, match="10 folds of 300"):
        read_pairs(tmp_path / "pairs.txt")


def test_embeddings_are_computed_once_for_each_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path))

    class Faces:
        folder, images = tmp_path / "faces", np.zeros((3, 8, 8, 3), np.uint8)

        def __len__(self):
            return 3

    class Counting:
        name, weights, asked = "counting", "sha256:" + "0" * 64, 0

        def embed(self, images):
            self.asked += 1
            return images.mean((2, 3))

    judge = Counting()
    first, again = embeddings(judge, Faces()), embeddings(judge, Faces())
    assert judge.asked == 1
    np.testing.assert_array_equal(first, np.full((3, 3), -1, np.float32))
    np.testing.assert_array_equal(first, again)
    judge.weights = "sha256:" + "1" * 64
    embeddings(judge, Faces())
    assert judge.asked == 2
