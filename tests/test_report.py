"""Properties of the report: it says all that a run folder holds, nothing else, and asks nobody for anything."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from experiments import report_knobs
from experiments.glossary import GLOSSARY, LEGS
from experiments.published import PUBLISHED
from experiments.report import write_report
from experiments.report_beside import beside
from experiments.report_pictures import folder_name
from experiments.report_run import Run
from experiments.report_scores import BITS, COSINES
from experiments.report_table import summary, table_of
from lightning_modules import protocol
from lightning_modules.metrics.scores import Histogram
from lightning_modules.protocol import KEYS, Figure, append_results, cell, read_results

TAR = "tar@far=1e-3"
HASH = "sha256:" + "ab" * 32
UNKNOWN = "no person with two or more pictures"


def figures_of(method, data, shift=0.0, reversible=True, near="one-bit"):
    """A row's lines, each with a value of its own; the second reference of one judge is n/a."""
    legs = [("anonymized", "right", 0.1)]
    if reversible:
        legs += [
            ("recovered", "right", 0.6),
            ("wrongly_recovered", "random", 0.03),
            ("wrongly_recovered", near, 0.04),
        ]
    found, step = [], 0.0
    for leg, key, base in legs:
        for judge in ("dlib", "faceres"):
            for reference in ("same-image", "other-image"):
                for metric in (TAR, "similarity", "rank1")[: 3 if leg == "anonymized" else 2]:
                    step += 0.001
                    value = base + step + shift
                    words = {"metric": metric, "leg": leg, "key": key, "judge": judge, "reference": reference}
                    found.append(
                        Figure(**words, value=None, n=0, why=UNKNOWN)
                        if (judge, reference, metric) == ("faceres", "other-image", "rank1")
                        else Figure(**words, value=value, low=value - 0.02, high=value + 0.03, n=40)
                    )
        for carrier in ("png", "jpeg75"):
            step += 0.01
            psnr = 20 + 10 * step + shift
            found.append(
                Figure(metric="psnr", leg=leg, key=key, carrier=carrier, value=psnr, low=psnr - 1, high=psnr + 1, n=40)
            )
    if reversible:
        found.append(Figure(metric="ssim", leg="recovered", region="face", value=0.777 + shift, n=40))
        found.append(Figure(metric="lpips", leg="recovered", value=None, why="weights missing: lpips", n=0))
    found.append(Figure(metric="params", value=1.19e6, n=1, carrier=None, key=None))
    common = {"method": method, "data": data, "config": "configs/compare/x.yaml", "commit": "abc123"}
    return [replace(figure, **common, weights=HASH) for figure in found]


def scores_of(method, data, linked=True):
    """What a judge's scores of a row would be: strangers low, one person high."""
    step, found = {"edges": tuple(x / 10 for x in range(-10, 11)), "threshold": 0.62}, []
    names = ("genuine", "impostor", "anonymized", "recovered", "wrongly_recovered")
    for place, name in enumerate((*names, "mated", "non-mated") if linked else names):
        counts = tuple(5 if place <= bin_ <= place + 6 else 0 for bin_ in range(20))
        found.append(Histogram(method=method, data=data, judge="dlib", name=name, counts=counts, **step))
    return found


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)


def about(**changes):
    rows = [
        {"method": m, "data": "orl", "weights": HASH, "steps": 4000, "seconds": 1530.0, "size": 256, "faces": 40}
        for m in ("blur", "sdn | long")
    ]
    rows[1]["note"] = "trained on two cores"
    judges = [
        {"name": n, "weights": HASH, "threshold": 0.62, "far": 1e-3, "pairs": 2030000, "low": 0.61, "high": 0.63}
        for n in ("dlib", "faceres")
    ]
    return {
        "name": "quick",
        "config": "configs/compare/x.yaml",
        "config_text": "size: 128  # <b>&\n",
        "commit": "abc123",
        "versions": {"torch": "2.6"},
        "rows": rows,
        "judges": judges,
        "left_out": ["celeba: nowhere to be found"],
        "failures": [{"method": "fit", "data": "orl", "why": "the encoder <x> is missing"}],
        **changes,
    }


def build(folder):
    """A run folder with two rows, one failure, and faces of some legs."""
    append_results(folder / "results.jsonl", figures_of("blur", "orl", reversible=False))
    append_results(folder / "results.jsonl", figures_of("sdn | long", "orl", 0.3))
    (folder / "run.json").write_text(json.dumps(about()))
    faces = folder / "faces" / "orl"
    for sample in ("000003", "000011"):
        paint(faces / "original" / f"{sample}.png", "teal")
        paint(faces / "blur" / "anonymized" / f"{sample}.png", "gray")
        for leg in ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered"):
            paint(faces / folder_name("sdn | long") / leg / f"{sample}.jpg", "olive")
    return folder


def written(out):
    write_report(out)
    return {name: (out / name).read_text(encoding="utf-8") for name in ("table.md", "report.html", "table.tex")}


@pytest.fixture
def out(tmp_path):
    """A run folder to change."""
    return build(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder to read."""
    return Run(build(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def files(run):
    """What was written into it."""
    return written(run.out)


class References(HTMLParser):
    """Collects what a page would fetch or lead to, and its visible text."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "poster", "action", "data", "xlink:href")
        self.found += [value for name, value in attributes if name in names]

    def handle_data(self, data):
        self.text += data


def test_every_figure_of_the_results_is_in_the_table_and_on_the_page(run, files):
    page = References()
    page.feed(files["report.html"])
    on_page = " ".join(page.text.split())
    for figure in read_results(run.out / "results.jsonl"):
        if figure.value is not None:
            assert cell(figure) in files["table.md"]
            assert cell(figure) in on_page


def test_a_figure_stands_in_the_row_of_its_method(run):
    rows = {row.method: row for row in table_of(run, "orl").rows}
    for method, row in rows.items():
        mine = [cell(f, interval=False) for f in run.of(method, "orl") if f.value is not None]
        assert all(line.value in (*mine, "—", "n/a") for lines in row.cells for line in lines)


def test_a_missing_value_is_na_and_a_footnote_says_why(run, files):
    table = table_of(run, "orl")
    number = table.notes.index(UNKNOWN) + 1
    assert any(line.value == "n/a" and line.note == number for lines in table.rows[0].cells for line in lines)
    assert UNKNOWN in files["table.md"]
    assert f"<li>{UNKNOWN}</li>" in files["report.html"]
    assert "weights missing: lpips" in files["table.md"]


def test_what_was_not_measured_is_an_em_dash(run):
    table = table_of(run, "orl")
    blur = table.rows[0]
    recovered = [lines for column, lines in zip(table.columns, blur.cells, strict=True) if column.leg == "recovered"]
    assert recovered
    assert all([line.value for line in lines] == ["—"] for lines in recovered)


def test_each_column_points_to_the_better_way(run, files):
    for column in table_of(run, "orl").columns:
        assert column.arrow == protocol.arrow(column.metric, column.leg, column.references[0])
    text = files["table.md"]
    assert "anonymized: accepted dlib ↓" in text
    assert "recovered: accepted dlib ↑" in text
    assert "recovered: PSNR (dB) ↑" in text
    assert "wrong key: accepted faceres ↓" in text


def test_rows_of_markdown_have_the_cells_of_their_head(files):
    blocks = re.findall(r"(?:^\|.*\n)+", files["table.md"], flags=re.MULTILINE)
    assert len(blocks) == 3 + len(PUBLISHED)  # the table, all other figures, those published elsewhere, the judges
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_page_asks_nobody_for_anything(files):
    text = files["report.html"]
    page = References()
    page.feed(text)
    assert page.found
    assert all(value.startswith(("data:", "#")) for value in page.found)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert "http" not in text


def test_text_of_the_run_is_text_and_not_markup(files):
    text = files["report.html"]
    assert "the encoder &lt;x&gt; is missing" in text
    assert "# &lt;b&gt;&amp;" in text


def test_a_failed_method_is_visible_with_its_reason(run, files):
    assert "| fit (failed) |" in files["table.md"]
    assert "the encoder &lt;x> is missing" in files["table.md"]
    assert "1 failed" in files["report.html"]
    assert any(s.failed and s.method == "fit" for s in summary(run, "orl"))


def test_left_out_data_and_judges_and_their_thresholds_are_named(files):
    for text in (files["table.md"], files["report.html"]):
        assert "celeba: nowhere to be found" in text
        assert "0.6200" in text
        assert "2,030,000" in text
        assert HASH in text
        assert "abc123" in text


def test_training_and_faces_stand_beside_the_figures(run, files):
    assert table_of(run, "orl").rows[1].cost == ["4,000", "26 min", "256", "40"]
    assert "trained on two cores" in files["table.md"]


def beside_the_paper(out):
    """The run, with a counterpart in the paper for its second row."""
    rows = about()["rows"]
    rows[1]["published"] = "SDN"
    (out / "run.json").write_text(json.dumps(about(rows=rows)))
    more = [
        Figure(metric="lpips", leg="anonymized", value=None, why="weights missing: lpips", n=0),
        Figure(metric="lpips_squeeze_caffe", leg="anonymized", value=0.123, n=40),
        Figure(metric="fd_efflite0", leg="anonymized", value=45.6, n=40),
        Figure(metric="background_shift", leg="anonymized", value=0.0078, n=40),
    ]
    common = {"method": "sdn | long", "data": "orl", "config": "x.yaml", "commit": "abc123", "weights": HASH}
    append_results(out / "results.jsonl", [replace(figure, **common) for figure in more])
    return out


def test_measured_figures_stand_beside_those_of_the_paper(out):
    assert beside(Run(out), "orl") == []
    hidden, back, pollution = beside(Run(beside_the_paper(out)), "orl")
    names = [f"{name}, {'ours' if ours else 'theirs'}" for name, ours in hidden.head]
    cells = dict(zip(names, dict(hidden.rows)["sdn | long"], strict=True))
    assert cells["LPIPS ↓, ours"].value == "n/a"
    assert hidden.notes == ["weights missing: lpips"]
    assert cells["LPIPS (SqueezeNet) ↓, ours"].value == "0.123"
    assert [cells[f"{name}, theirs"].value for name in ("LPIPS ↓", "FID ↓", "SSIM ↑")] == ["0.15", "28", "0.96"]
    assert {line.value for line in dict(hidden.rows)["blur"]} == {"—"}
    assert [name for name, _ in back.rows] == ["sdn | long"]  # what cannot be undone has no row
    assert [line.value for line, (_, ours) in zip(back.rows[0][1], back.head, strict=True) if not ours] == [
        *("0.034", "28.91", "0.872", "0.451")
    ]
    assert dict(pollution.rows)["sdn | long"][0].value == "0.008"
    files = written(out)
    for text in (files["table.md"], files["report.html"]):
        assert "Pan, Chen &amp; Wu" in text or "Pan, Chen & Wu" in text
        assert text.count("28.91") == 2  # the paper's own table stays


def test_rows_that_differ_in_a_number_become_a_curve(out):
    assert report_knobs.charts(Run(out), "orl") == []
    rows = about()["rows"]
    for row, value in zip(rows, (8, 2), strict=True):
        row["knob"] = {"of": "k-same", "name": "k", "value": value}
    (out / "run.json").write_text(json.dumps(about(rows=rows)))
    (chart,) = report_knobs.charts(Run(out), "orl")
    assert chart.title == "k-same: k"
    assert re.search(r"dlib: [\d.]+ % at 2, [\d.]+ % at 8", chart.text)
    assert chart.light in written(out)["report.html"]


def test_the_faces_of_a_run_are_known_by_their_hash(out):
    found = {"orl": {"faces": 40, "people": 20, "pixels": "sha256:" + "cd" * 32}}
    (out / "run.json").write_text(json.dumps(about(faces=found)))
    files = written(out)
    assert all(found["orl"]["pixels"] in files[name] for name in ("table.md", "report.html"))


def test_published_figures_stand_beside_and_are_marked_as_others(files):
    page = References()
    page.feed(files["report.html"])
    for text in (files["table.md"], page.text):
        assert "another protocol, other data, other judges" in text.lower()
        for published in PUBLISHED:
            assert published.source in text
            assert all(len(row) == len(published.head) for row in published.rows)
            assert all(word in text for row in published.rows for word in row)


def charts_of(out):
    write_report(out)
    text = (out / "report.html").read_text()
    return dict(re.findall(r'<figcaption>([^<]+)</figcaption>.*?alt="([^"]+)"', text, re.DOTALL))


def test_scores_are_drawn_where_there_are_any(out):
    assert not {"Scores of dlib", "Linkability under two keys, judged by dlib"} & set(charts_of(out))
    lines = [*scores_of("blur", "orl", linked=False), *scores_of("sdn | long", "orl")]
    (out / "scores.jsonl").write_text("".join(line.to_json() + "\n" for line in lines))
    charts = charts_of(out)
    assert "blur: 35 anonymized faces; sdn | long: 35" in charts["Scores of dlib"]
    assert "Linkability under two keys, judged by dlib" in charts
    assert "Scores of faceres" not in charts


def test_scores_that_are_none_are_named(out):
    (out / "scores.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1: not a histogram"):
        write_report(out)


@pytest.mark.parametrize(("near", "axis"), [("one-bit", BITS), ("cosine-0.9", COSINES)])
def test_sensitivity_is_drawn_over_the_keys_that_were_tried(tmp_path, near, axis):
    append_results(tmp_path / "results.jsonl", figures_of("sdn", "orl", near=near))
    found = charts_of(tmp_path)
    assert "Sensitivity to the key, judged by dlib" in found
    assert set(axis.ticks) <= set(KEYS)
    first = next(f for f in read_results(tmp_path / "results.jsonl") if f.key == near and f.metric == TAR)
    words = {"bits-4": "4 bits off", "cosine-0.99": "key at cosine 0.99"}
    key = next(key for key in words if key in axis.ticks)
    append_results(tmp_path / "results.jsonl", [replace(first, key=key, value=0.97, low=0.9, high=0.99)])
    page = (tmp_path / "report.html").read_text()
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() != page
    assert words[key] in (tmp_path / "table.md").read_text()
    assert f"97.0 % with a wrong one (dlib, same image, {words[key]})" in (tmp_path / "table.md").read_text()


def test_without_keys_that_are_nearly_right_there_is_no_curve(tmp_path):
    lines = [f for f in figures_of("ifadit", "orl") if f.key != "one-bit"]
    append_results(tmp_path / "results.jsonl", lines)
    assert not any(title.startswith("Sensitivity") for title in charts_of(tmp_path))


def test_recovery_by_carrier_is_drawn_for_pictures_and_judges(out):
    assert "Recovery by how the picture travelled" in charts_of(out)
    first = [f for f in read_results(out / "results.jsonl") if f.leg == "recovered" and f.metric == TAR]
    append_results(out / "results.jsonl", [replace(f, carrier="jpeg75") for f in first])
    assert "Recovery by how the picture travelled, judged by dlib" in charts_of(out)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
def test_the_page_fits_a_phone_and_a_desk_and_prints(out, tmp_path_factory):
    (out / "scores.jsonl").write_text("".join(line.to_json() + "\n" for line in scores_of("sdn | long", "orl")))
    write_report(out)
    outer, page = tmp_path_factory.mktemp("browser") / "outer.html", html.escape((out / "report.html").read_text())
    # in frames, since a window has a smallest width
    frames = [f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{page}"></iframe>' for w in (390, 1280)]
    told = "[0, 1].map(at => frames[at].document.documentElement.scrollWidth).join()"
    outer.write_text(f"<body>{''.join(frames)}<script>onload = () => {{ document.title = {told} }}</script>")

    def chromium(*words):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    said = chromium("--dump-dom", "--virtual-time-budget=5000", outer.as_uri())
    assert re.search(r"<title>([\d,]+)</title>", said).group(1) == "390,1280"  # nothing is wider than its frame
    chromium(f"--print-to-pdf={outer.parent / 'page.pdf'}", "--no-pdf-header-footer", (out / "report.html").as_uri())
    assert (outer.parent / "page.pdf").read_bytes().startswith(b"%PDF")


def test_plain_words_quote_the_judge_that_speaks_most_against_the_method(run):
    accepted = [f for f in run.of("sdn | long", "orl") if f.metric == TAR and f.carrier == "png"]
    hidden = max((f for f in accepted if f.leg == "anonymized"), key=lambda f: f.value)
    back = min((f for f in accepted if f.leg == "recovered"), key=lambda f: f.value)
    sentence = next(s.text for s in summary(run, "orl") if s.method == "sdn | long")
    assert sentence.startswith(f"{cell(hidden, interval=False)} of anonymized faces are still accepted")
    assert f"{cell(back, interval=False)} come back with the right key ({back.judge}" in sentence
    assert "no recovery was measured" in next(s.text for s in summary(run, "orl") if s.method == "blur")


def test_how_often_strangers_are_taken_for_one_stands_below_the_shares(out):
    common = {"metric": "fmr", "leg": "original", "data": "orl", "n": 40, "carrier": None}
    figures = [Figure(method="blur", judge=j, value=v, **common) for j, v in (("faceres", 0.007), ("dlib", 0.0235))]
    append_results(out / "results.jsonl", figures)
    said = "taken for one in 2.4 % by dlib, 0.7 % by faceres."
    assert all(said in " ".join(written(out)[name].split()) for name in ("table.md", "report.html"))


def test_a_key_without_bits_is_shown_as_what_it_is(tmp_path):
    append_results(tmp_path / "results.jsonl", figures_of("ifadit", "orl", near="cosine-0.9"))
    table = table_of(Run(tmp_path), "orl")
    assert any("cosine 0.9" in note for note in table.notes)
    cells = zip(table.columns, table.rows[0].cells, strict=True)
    assert all(lines[0].note for column, lines in cells if column.group.startswith("one bit off"))


def test_a_figure_that_was_measured_again_replaces_the_first(out):
    first = next(f for f in read_results(out / "results.jsonl") if f.metric == "psnr")
    for value in (71.23, 81.23):
        append_results(out / "results.jsonl", [replace(first, value=value, low=70.0, high=90.0)])
    text = written(out)["table.md"]
    assert "81.23" in text
    assert "71.23" not in text


def test_what_attackers_got_stands_beside_the_figures_of_the_comparison(out):
    common = {"method": "blur", "data": "orl", "judge": "dlib", "reference": "same-image", "n": 8}
    attacks = [
        Figure(metric="inverter_tar", leg="attacked", key="none", value=0.4321, low=0.4, high=0.5, **common),
        Figure(metric="known_plaintext@10", leg="attacked", key="shared", value=0.5432, low=0.5, high=0.6, **common),
        Figure(metric="adaptive_tar", leg="attacked", key="none", value=0.1, threshold=0.1234, **common),
        Figure(metric=TAR, leg="anonymized", value=0.9876, low=0.9, high=1.0, **common),
    ]
    before = [
        f for f in read_results(out / "results.jsonl") if (f.method, f.metric, f.leg) == ("blur", TAR, "anonymized")
    ]
    append_results(out / "attacks.jsonl", attacks)
    files = written(out)
    for figure in attacks[:3]:
        assert cell(figure) in files["table.md"]
        assert cell(figure, interval=False) in files["report.html"]
    assert "attacked: trained inverter dlib ↓" in files["table.md"]
    assert "one key a person" in files["table.md"]
    assert "0.1234" not in files["table.md"]  # not a threshold of the judge itself
    assert "98.8 %" not in files["table.md"]  # the comparison has that figure, of more faces
    assert all(cell(figure) in files["table.md"] for figure in before if figure.value is not None)
    (out / "results.jsonl").unlink()
    assert "98.8 %" in written(out)["table.md"]


def test_the_grid_has_a_row_for_each_method_and_a_tile_for_each_leg(out):
    write_report(out)
    with Image.open(out / "grid.png") as grid:
        colours = {colour for _, colour in grid.convert("RGB").getcolors(1 << 24)}
        assert grid.width > 6 * 112
        assert grid.height > 2 * 112
    assert (0, 128, 128) in colours  # an original
    assert (128, 128, 128) in colours  # a blurred face


def test_missing_legs_and_broken_files_leave_holes_and_no_errors(out):
    faces = out / "faces" / "orl"
    (faces / "blur" / "anonymized" / "000003.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf a pict")
    (faces / folder_name("sdn | long") / "recovered" / "000011.jpg").unlink()
    (faces / "original" / "000003.png").unlink()
    assert 'class="missing"' in written(out)["report.html"]


@pytest.mark.parametrize("there", [(), ("run.json",), ("results.jsonl",), ("faces",), ("run.json", "results.jsonl")])
def test_an_unfinished_run_shows_what_there_is(out, tmp_path_factory, there):
    part = tmp_path_factory.mktemp("part")
    for name in there:
        (out / name).rename(part / name)
    files = written(part)
    assert ("dlib" in files["table.md"]) == bool({"run.json", "results.jsonl"} & set(there))
    assert (part / "grid.png").exists() is False


def test_a_last_line_cut_by_a_killed_run_is_left_out(out):
    with (out / "results.jsonl").open("a") as file:
        file.write('{"method": "blur", "metr')
    assert "blur" in written(out)["table.md"]


def test_the_same_run_gives_the_same_files(out):
    first = written(out)
    assert written(out) == first
    assert not list(out.glob(".*.part"))


def test_a_folder_that_is_not_there_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_a_run_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not what a comparison writes"):
        write_report(tmp_path)


def test_every_word_of_the_protocol_is_explained():
    assert set(GLOSSARY) == set(protocol.METRICS)
    assert set(LEGS) == set(protocol.LEGS)
