"""What is exported is scored by the scorer it is exported for."""

import json

import pytest
import torch
import yaml
from test_compare import calibrated, write  # noqa: F401

from experiments.cli import main
from experiments.compare import compare
from lightning_modules.protocol import read_results
from lightning_modules.weights import find


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture
def run(place, calibrated):  # noqa: F811
    if not (place / "run").exists():
        compare(write(place / "c.yaml"), place / "run")
    return place / "run"


def test_hifd_scores_an_export(run, tmp_path, capsys):
    hifd = pytest.importorskip("hifd")
    from hifd.cli import main as theirs

    assert main(["export", "--to", "hifd", str(run), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "out" / "noise"
    files = ["--methods", str(folder / "methods.yaml"), "--estimators", str(folder / "estimators.yaml")]
    assert theirs(["validate", *files, "--data-dir", str(folder)]) == 0
    scores = hifd.run_pipeline(files[1], str(folder), str(tmp_path / "scores"), estimators_config=files[3])
    rows = scores.per_method_df.set_index("method")
    assert set(rows.index) == {"blur", "SDN"}
    ours = {
        f.method: f.value
        for f in read_results(run / "results.jsonl")
        if (f.metric, f.leg, f.reference, f.carrier) == ("similarity", "anonymized", "same-image", "png")
    }
    for method, similarity in ours.items():
        assert rows.P[method] == pytest.approx((1 - similarity) / 2, abs=2e-3)
    assert ("age" in rows and rows.age.notna().all()) == bool(find("faceres"))
    assert ("landmark" in rows and rows.landmark.notna().all()) == bool(find("landmarks68"))
    assert rows.Q.isna().all()
    assert (scores.composite_df.balanced > 0).all()
    left_out = yaml.safe_load((folder / "methods.yaml").read_text())["left_out"]
    assert any("recovered" in text for text in left_out)
    assert all(text in said for text in left_out)


def test_an_export_holds_every_face_of_the_run(run, tmp_path):
    main(["export", str(run), str(tmp_path)])
    pages = [json.loads(file.read_text()) for file in tmp_path.rglob("*.json")]
    assert {len(page["predictions"]) for page in pages} == {6}
    assert {page["source"] for page in pages} == {"original", "deid"}
    vector = next(page for page in pages if page["task"] == "face_embedding")["predictions"]["000000"]["embedding"]
    assert torch.tensor(vector).norm() == pytest.approx(1, abs=1e-5)


def test_a_run_without_pictures_is_said_to_have_none(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"rows": [{"method": "blur", "data": "noise"}]}))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no pictures of noise" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "no run folder" in capsys.readouterr().err
