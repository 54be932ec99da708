"""Clips through `keyveil anonymize` and `recover`: people followed, a surrogate each; frames, times and sound kept."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_photos import ToyDetector, ToyJudge, draw_alike, picture

import experiments.clips
from datamodules.clips import follow, frames, output_name
from datamodules.detection import Detection
from experiments.cli import main
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost, MasterKey, Record

av = pytest.importorskip("av")

TIMES = [0, 1, 2, 4, 5, 6, 9, 10, 11, 12]  # frames do not come at even steps


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("KEYVEIL_SECRET", "correct horse battery staple")
    monkeypatch.setattr("experiments.photos.default_detector", ToyDetector)
    monkeypatch.setattr("experiments.photos.Gate", lambda: Gate(ToyJudge(), 0.9))
    monkeypatch.setattr("experiments.anonymizing.Cost", lambda: Cost(1, 64, 1))
    draw_alike(monkeypatch)
    (tmp_path / "toy.yaml").write_text("model: {class_path: toy_photos.ToyMethod}")
    monkeypatch.chdir(tmp_path)


def film(name, faces=2, sound=True, times=TIMES, codec="ffv1"):
    """A clip of a smooth picture that brightens; with a tone."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with av.open(name, "w") as clip:
        clip.metadata["location"] = "+48.2+16.3/"
        shown = clip.add_stream(codec, rate=10)
        shown.codec_context.time_base = shown.time_base = Fraction(1, 10)
        shown.height, shown.width = picture(faces).shape[:2]
        shown.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        heard = clip.add_stream("pcm_s16le" if name.endswith("mkv") else "aac", rate=8000) if sound else None
        for number, time in enumerate(times):
            pixels = (picture(faces).astype(int) // 2 + 5 * number).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            clip.mux(shown.encode(frame))
        clip.mux(shown.encode(None))
        if heard is not None:
            tone = (8000 * np.sin(np.arange(8000) / 5)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            samples.sample_rate, samples.pts = 8000, 0
            resampler = av.AudioResampler(heard.format, heard.layout, heard.rate)
            for part in resampler.resample(samples):
                clip.mux(heard.encode(part))
            clip.mux(heard.encode(None))
    return name


def verb(which, *paths, out, **options):
    words = [f"--{name}={value}" for name, value in options.items()]
    return main([which, *map(str, paths), "--out", out, "--method", "toy.yaml", "--accelerator=cpu", *words])


def shown(path):
    return [frame.pixels.astype(int) for frame in frames(Path(path))]


def sound(path):
    with av.open(str(path)) as clip:
        return [bytes(packet) for packet in clip.demux(audio=0) if packet.dts is not None]


def seconds(path):
    with av.open(str(path)) as clip:
        return [round(float(frame.time), 2) for frame in clip.decode(video=0)]


def test_a_clip_is_hidden_and_comes_back_frame_by_frame(tmp_path):
    film("in/a.mkv")
    assert verb("anonymize", "in", out="safe", lossless="true") == 0
    assert verb("recover", "safe", out="back", lossless="true") == 0
    before, hidden, after = shown("in/a.mkv"), shown("safe/a.mkv"), shown("back/a.mkv")
    assert len(before) == len(hidden) == len(after) == len(TIMES)
    for original, anonymized, recovered in zip(before, hidden, after, strict=True):
        assert abs(original - anonymized).mean() > 5
        assert abs(original - recovered).mean() < 2
    assert seconds("safe/a.mkv") == seconds("back/a.mkv") == seconds("in/a.mkv") == [time / 10 for time in TIMES]
    assert sound("safe/a.mkv") == sound("in/a.mkv") != []
    with av.open("safe/a.mkv") as clip:
        assert not any("location" in name.lower() for name in clip.metadata)
    record = Record.from_json(Path("safe/a.mkv.keyveil").read_text())
    assert len(record.faces) == 2 * len(TIMES)
    assert len({face.nonce for face in record.faces}) == 2  # a person keeps one surrogate
    assert main(["verify", "safe"]) == 0


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.mov", "libx264"), ("c.avi", "ffv1")])
def test_containers_are_kept_where_they_can_be(name, codec):
    film(name, faces=1, codec=codec, times=range(5), sound=codec == "libx264")
    assert verb("anonymize", name, out="safe") == 0
    made = f"safe/{output_name(name, lossless=False)}"
    assert made.endswith({"a.mp4": "a.mp4", "b.mov": "b.mov", "c.avi": "c.avi.mkv"}[name])
    assert verb("recover", made, out="back") == 0
    recovered = shown(made.replace("safe", "back"))
    for original, hidden, back in zip(shown(name), shown(made), recovered, strict=True):
        assert abs(original - back).mean() < 0.5 * abs(original - hidden).mean()


def test_people_are_followed_and_missed_frames_filled():
    class Moving:
        """Two faces that move apart; the first is missed in the fourth frame, the second leaves after five."""

        name, count = "moving", 0

        def detect(self, pixels):
            number = round(float(pixels.mean()) / 10)
            faces = [(20 + 3 * number, number != 3), (120 - 3 * number, number < 5)]
            points = np.array([(20, 30), (40, 30), (30, 40), (22, 50), (38, 50)], np.float32)
            return [
                Detection(np.array([x, 20, x + 60, 90], np.float32), 0.7, points + np.float32((x, 10)))
                for x, there in faces
                if there
            ]

    with av.open("flat.mkv", "w") as clip:
        stream = clip.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 240, 120, "bgr0"
        for number in range(8):
            pixels = np.full((120, 240, 3), 10 * number, np.uint8)
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        clip.mux(stream.encode(None))
    first, second = follow(Path("flat.mkv"), Moving(), 64)
    assert sorted(first.places) == list(range(8))
    assert sorted(second.places) == list(range(7))  # held for a fifth of a second after it was last found
    assert first.places[3].box[0] == pytest.approx(29, abs=0.5)
    assert all(first.places[n].box[0] < first.places[n + 1].box[0] for n in range(7))
    assert len(first.crops) == 1


def test_what_is_wrong_with_a_clip_is_one_sentence(capsys):
    film("in/a.mkv", faces=1, times=range(4), sound=False)
    Path("in/text.mp4").write_text("no clip")
    Path("in/empty.mkv").write_bytes(b"")
    Path("in/cut.mkv").write_bytes(Path("in/a.mkv").read_bytes()[:600])
    film("in/nobody.mkv", faces=0, times=range(3), sound=False)
    assert verb("anonymize", "in", out="safe", lossless="true") == 1
    told = capsys.readouterr().err.splitlines()
    for name in ("text.mp4", "empty.mkv", "nobody.mkv"):
        assert sum(f"in/{name}: " in line for line in told) == 1
    assert [p.name for p in sorted(Path("safe").glob("[!.]*"))][:2] == ["a.mkv", "a.mkv.keyveil"]
    assert not list(Path("safe").glob(".*.part"))
    assert verb("anonymize", "in/a.mkv", out="other", seal="original") == 1
    assert verb("anonymize", "safe/a.mkv", out="twice") == 1  # it is an anonymized one
    assert verb("anonymize", "in/a.mkv", out="two", devices="2") == 1


def test_a_wrong_secret_an_altered_record_and_a_cut_clip_are_refused(monkeypatch, capsys):
    film("a.mkv", faces=1, times=range(6), sound=False)
    assert verb("anonymize", "a.mkv", out="safe", lossless="true") == 0
    record = Path("safe/a.mkv.keyveil")
    whole, text = Path("safe/a.mkv").read_bytes(), record.read_text()
    monkeypatch.setenv("KEYVEIL_SECRET", "another")
    assert verb("recover", "safe/a.mkv", out="back", lossless="true") == 1
    assert "wrong secret" in capsys.readouterr().err
    monkeypatch.setenv("KEYVEIL_SECRET", "correct horse battery staple")
    found = json.loads(text)
    found["faces"][0]["frame"] = 3
    record.write_text(json.dumps(found))
    assert verb("recover", "safe/a.mkv", out="back", lossless="true") == 1
    assert "altered" in capsys.readouterr().err
    record.write_text(text)
    film("short.mkv", faces=1, times=range(3), sound=False)
    Path("safe/a.mkv").write_bytes(Path("short.mkv").read_bytes())
    assert verb("recover", "safe/a.mkv", out="back", lossless="true") == 1
    assert "fewer frames" in capsys.readouterr().err
    Path("safe/a.mkv").write_bytes(whole)
    assert verb("recover", "safe/a.mkv", out="back", lossless="true") == 0


def test_a_second_run_leaves_a_clip_that_is_done(capsys):
    film("a.mkv", faces=1, times=range(3), sound=False)
    assert verb("anonymize", "a.mkv", out="safe") == 0
    stamp = Path("safe/a.mkv").stat().st_mtime_ns
    assert verb("anonymize", "a.mkv", out="safe") == 0
    assert Path("safe/a.mkv").stat().st_mtime_ns == stamp
    assert "done before" in capsys.readouterr().err
    assert verb("anonymize", "a.mkv", out="safe", lossless="true") == 0  # other options are not done before
    assert Path("safe/a.mkv").stat().st_mtime_ns > stamp


def test_in_decoy_mode_another_secret_gives_others_and_nothing_tells(monkeypatch):
    film("a.mkv", faces=1, times=range(4), sound=False)
    assert verb("anonymize", "a.mkv", out="safe", lossless="true", mode="decoy") == 0
    found = json.loads(Path("safe/a.mkv.keyveil").read_text())
    assert "mac" not in found
    assert "check" not in found["header"]
    assert verb("recover", "safe/a.mkv", out="back", lossless="true") == 0
    guesses = [f"guess {number}" for number in range(6)]
    for guess in guesses:  # one key of eight is alike
        monkeypatch.setenv("KEYVEIL_SECRET", guess)
        assert verb("recover", "safe/a.mkv", out=guess, lossless="true") == 0
    right, *wrong = (abs(shown("a.mkv")[2] - shown(f"{out}/a.mkv")[2]).mean() for out in ("back", *guesses))
    assert right < 2
    assert max(wrong) > right
    lines = [json.loads(line)["entry"] for line in Path("back/manifest.jsonl").read_text().splitlines()]
    assert lines[0]["files"] == {"a.mkv": None}  # a hash would tell guesses apart


def test_a_clip_without_its_record_is_told(capsys):
    film("a.mkv", faces=1, times=range(4), sound=False)
    assert verb("anonymize", "a.mkv", out="safe") == 0
    Path("safe/a.mkv.keyveil").unlink()
    assert main(["recover", "safe/a.mkv", "--out", "back", "--accelerator=cpu"]) == 1
    assert "holds no record" in capsys.readouterr().err


def test_somebody_who_stays_recognized_is_not_written(monkeypatch, capsys):
    film("a.mkv", faces=1, times=range(8), sound=False)
    gate = Gate(ToyJudge(), 0.9)
    calls = []

    def similarity(originals, others):
        calls.append(len(originals))
        return [0.0 if len(calls) < 4 else 0.99] * len(originals)  # known later on, in frames of which no crop was kept

    monkeypatch.setattr(gate, "similarity", similarity)
    monkeypatch.setattr("experiments.photos.Gate", lambda: gate)
    assert verb("anonymize", "a.mkv", out="safe") == 1
    assert "1 of its people are still recognized" in capsys.readouterr().err
    assert not list(Path("safe").glob("*.mkv*"))
    assert not list(Path("safe").glob(".*.part"))


@pytest.mark.parametrize(("misses", "taken"), [((0, 0, 0, 0), 0), ((2, 1, 0, 0), 2), ((2, 2, 1, 2), 2)])
def test_of_the_keys_tried_a_track_gets_one_under_which_faces_are_still_found(misses, taken, monkeypatch):
    crops, tried, asked = [picture(1)[:64, :64]] * 2, [], []

    class Misses:
        name = "misses"

        def detect(self, pixels):
            box = [Detection(np.array([10, 10, 50, 50], np.float32), 0.9, np.zeros((5, 2), np.float32))]
            if (pixels == crops[0]).all():
                return box
            asked.append(len(tried))
            return [] if asked.count(len(tried)) <= misses[len(tried) - 1] else box

    class Turned:
        size, key_spec, device = 64, SimpleNamespace(kind="bits"), "cpu"

        def predict_step(self, face):
            return -face.image

    monkeypatch.setattr(experiments.clips, "PhotoStep", lambda network, verb, key_of: network)
    monkeypatch.setattr(experiments.clips, "fresh", lambda: tried.append(bytes([len(tried)]) * 16) or tried[-1])
    gate = SimpleNamespace(similarity=lambda before, after: [0.0] * len(before), threshold=0.9)
    job = SimpleNamespace(detector=Misses())
    nonce = experiments.clips._nonce(crops, (), MasterKey.from_seed(0), Turned(), job, gate)
    assert nonce[0] == taken
    assert len(tried) == (misses.index(0) + 1 if 0 in misses else 4)


def test_a_turned_clip_is_written_upright():
    av_frame = film("a.mp4", faces=1, codec="libx264", times=range(3), sound=False)
    with av.open(av_frame) as clip, av.open("turned.mp4", "w") as made:
        stream = made.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    data = Path("turned.mp4").read_bytes()
    plain = b"".join(number.to_bytes(4, "big") for number in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    clockwise = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    assert data.count(plain) == 2  # of the film and of its track
    track = data.rindex(plain)
    Path("turned.mp4").write_bytes(data[:track] + clockwise + data[track + 36 :])
    upright, turned = shown("a.mp4")[0], shown("turned.mp4")[0]
    assert turned.shape[:2] == upright.shape[1::-1]
    assert abs(np.rot90(upright, -1) - turned).mean() < 2


def test_frames_without_faces_do_not_pile_up(monkeypatch):
    class Early(ToyDetector):
        def detect(self, pixels):
            return super().detect(pixels) if pixels.mean() < 70 else []

    film("a.mkv", faces=1, times=range(60), sound=False)
    monkeypatch.setattr("experiments.photos.default_detector", Early)
    waiting = []
    make = experiments.clips._Clip._make
    monkeypatch.setattr(
        experiments.clips._Clip,
        "_make",
        lambda self, opened, step: waiting.append(len(opened)) or make(self, opened, step),
    )
    assert verb("anonymize", "a.mkv", out="safe") == 0
    assert sum(waiting) == 60
    assert max(waiting) <= experiments.clips.WAITING


def test_a_mixed_folder_is_verified_and_a_stray_clip_told(capsys):
    film("in/a.mp4", faces=1, codec="libx264", times=range(3))
    Image.fromarray(picture(1)).save("in/b.png")
    assert verb("anonymize", "in", out="safe") == 0
    assert main(["verify", "safe"]) == 0
    assert main(["inspect", "safe/a.mp4"]) == 0
    assert '"last_frame": 2' in capsys.readouterr().out
    film("safe/stray.mp4", faces=1, codec="libx264", times=range(3))
    assert main(["verify", "safe"]) == 1
    assert "stray.mp4" in capsys.readouterr().err
