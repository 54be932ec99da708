"""`keyveil serve`: what the page does, by itself, through the page's own interface, and on it in a browser."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_photos import ToyDetector, ToyJudge, picture

import experiments.photo_methods
from experiments.serve import Desk, build, launch
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost

SECRET = "correct horse battery staple"


@pytest.fixture
def desk(monkeypatch, tmp_path):
    """A desk with toys for the networks, a cheap Argon2id, and a folder for the signing key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is put back
    monkeypatch.setattr("experiments.photos.default_detector", ToyDetector)
    monkeypatch.setattr("experiments.photos.Gate", lambda: Gate(ToyJudge(), 0.9))
    monkeypatch.setattr("experiments.anonymizing.Cost", lambda: Cost(1, 64, 1))
    (tmp_path / "toy.yaml").write_text("model: {class_path: toy_photos.ToyMethod}")
    monkeypatch.setitem(experiments.photo_methods.METHODS, "toy", {"config": str(tmp_path / "toy.yaml")})
    (tmp_path / "desk").mkdir()
    return Desk(tmp_path / "desk", accelerator="cpu")


def save(path, seed=0, faces=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(faces, seed)).save(path)
    return str(path)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_are_hidden_and_come_back(desk, tmp_path):
    files = [save(tmp_path / "a.png"), save(tmp_path / "b ü.png", seed=1, faces=2)]
    told = []
    pairs, made, said = desk.anonymize(files, "toy", "verify", "none", SECRET, SECRET, told.append)
    assert told == [0.5, 1.0]
    assert said == "2 of 2 pictures done."
    assert [caption for _, caption in pairs] == ["before", "after"] * 2
    for before, after in zip(files, made, strict=True):
        assert abs(pixels(before) - pixels(after)).mean() > 5
    pairs, back, said = desk.recover(made, SECRET, told.append)
    assert len(pairs) == 4
    for before, after in zip(files, back, strict=True):
        assert abs(pixels(before) - pixels(after)).mean() < 2
    _, nothing, said = desk.recover(made, "wrong", told.append)
    assert nothing == []
    assert said.startswith("0 of 2 pictures done.")
    assert "wrong secret" in said
    for file in desk.folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


def test_what_cannot_be_done_is_told(desk, tmp_path):
    file, text = save(tmp_path / "a.png"), tmp_path / "text.png"
    text.write_text("no picture")
    work = desk.anonymize

    def refused(files, mode="verify", seal="none", secret=SECRET, again=SECRET):
        with pytest.raises(ValueError, match=".") as error:
            work(files, "toy", mode, seal, secret, again, lambda share: None)
        return str(error.value)

    assert refused([]) == "drop some pictures first"
    assert refused([file], again="other") == "the two secrets differ"
    assert refused([file], secret="", again="") == "type a secret"
    assert "--seal needs" in refused([file], mode="decoy", seal="original")
    assert "two of the files" in refused([file, save(tmp_path / "other" / "a.png")])
    _, made, said = work([file, str(text)], "toy", "verify", "none", SECRET, SECRET, lambda share: None)
    assert len(made) == 1
    assert said.startswith("1 of 2 pictures done.\n\ntext.png: ")
    _, made, said = work([save(tmp_path / "none.png", faces=0)], "toy", "verify", "none", SECRET, SECRET, lambda _: 0)
    assert made == []
    assert "no face" in said


@pytest.fixture
def page(desk):
    pytest.importorskip("gradio")
    page = build(desk)
    yield launch(page, server_name="127.0.0.1")
    page.close(verbose=False)


def test_the_page_listens_here_and_does_both(page, desk, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(page, verbose=False, download_files=tmp_path / "got")
    file = save(tmp_path / "a.png")
    shown, made, said = client.predict(
        [handle_file(file)], "toy", "decoy", "none", SECRET, SECRET, api_name="/anonymize"
    )
    assert said == "1 of 1 pictures done."
    assert len(shown) == 2
    _, back, _ = client.predict([handle_file(made[0])], SECRET, api_name="/recover")
    assert abs(pixels(file) - pixels(back[0])).mean() < 2
    assert abs(pixels(file) - pixels(made[0])).mean() > 5
    with pytest.raises(AppError, match="the two secrets differ"):
        client.predict([handle_file(file)], "toy", "verify", "none", SECRET, "other", api_name="/anonymize")
    assert list(desk.folder.glob("uploads/**/a.png"))  # what is uploaded goes when the run does


@pytest.mark.slow
def test_the_page_in_a_browser(page, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("there is no chromium")
    file = save(tmp_path / "a.png")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.goto(page)

        def fetch(name):
            with tab.expect_download() as download:
                tab.locator("a[download]:visible").last.click()  # the first is what was dropped
            download.value.save_as(tmp_path / name)
            return str(tmp_path / name)

        tab.locator("input[type=file]").first.set_input_files(file)
        tab.get_by_label("toy").check()
        tab.get_by_label("Secret", exact=True).first.fill(SECRET)
        tab.get_by_label("Secret again").fill(SECRET)
        tab.get_by_role("button", name="Anonymize").click()
        tab.get_by_text("1 of 1 pictures done.").wait_for(timeout=60_000)
        hidden = fetch("hidden.png")
        tab.screenshot(path=tmp_path / "anonymized.png")
        tab.get_by_role("tab", name="Recover").click()
        tab.locator("input[type=file]").last.set_input_files(hidden)
        tab.get_by_label("Secret", exact=True).last.fill(SECRET)
        tab.get_by_role("button", name="Recover").click()
        tab.get_by_text("1 of 1 pictures done.").locator("visible=true").wait_for(timeout=60_000)
        back = fetch("back.png")
        tab.screenshot(path=tmp_path / "recovered.png")
        assert SECRET not in tab.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        browser.close()
    assert abs(pixels(file) - pixels(back)).mean() < 2
    assert abs(pixels(file) - pixels(hidden)).mean() > 5
    assert Path(tmp_path / "recovered.png").stat().st_size > 1000
