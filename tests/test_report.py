"""The page of --report and the curves of --plot: what they hold, what they refuse, and the page in a browser.

The browser tests need `pip install playwright` and Debian's chromium; they are skipped without.
"""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from PIL import Image

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, EVALUATION, FIXTURES, ROOT, SIX_STEPS, read_jsonl, refusal, write_jsonl

HOSTILE = (
    "<script>document.title = 'taken'</script></script><img src=x onerror=alert(1)> $title & \"quotes\" 'single' "
    "\u202eright to left \u05d0\u05d1 \u2028 \\u003c"
)


def annotation(number, kind="scope_motion", short="yes", **more):
    texts = {"question": f"Question {number} about {kind}?", "answer": f"{short}, so it is.", "short_answer": short}
    frames = [f"v1_{number}0", f"v1_{number}1"]
    return {"id": f"q{number}", "video_id": "v1", "frames": frames, "question_type": kind, **texts, **more}


def published(row, text):
    """A result row of the shape of the public scripts' files: no video, no media."""
    right = int(row["short_answer"] in text.lower())
    names = {"question_id": row["id"], "question_type": row["question_type"], "question": row["question"]}
    gold = {"ground_truth": row["answer"], "short_answer": row["short_answer"]}
    return {**names, **gold, "predicted_answer": text, "exact_match": right, "correct": right, "inference_time_ms": 2.5}


ROWS = [
    annotation(0),
    annotation(1, short="no"),
    annotation(2, "lesion_site", "rectum", question=HOSTILE),
    annotation(3, "lesion_site", "sigma"),
    annotation(4, "made_up_type", HOSTILE),
]
ANSWERS = {"a": ["Yes.", "yes", HOSTILE, "sigma", "x" * 60_000], "b": ["no", "No.", "rectum", "rectum", "y"]}


class Page(html.parser.HTMLParser):
    """What a page holds: `data` (the JSON), `tables` by caption (lists of lists of text), `islands` by id, the number
    of `scripts`, `labels` of pictures, and `text`."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.islands, self.scripts, self.labels = defaultdict(list), {}, 0, []
        self.caption, self.cell, self.text, self.inside, self.island = "", None, "", None, None
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.data = json.loads(self.islands["data"])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside = tag
        self.labels += [attrs["aria-label"]] if tag == "svg" else []
        if tag == "script":
            self.scripts += 1
            self.island = attrs.get("id")
        elif tag == "tr":
            self.tables[self.caption].append([])
        elif tag in ("th", "td"):
            self.tables[self.caption][-1].append("")
            self.cell = True
        elif tag == "caption":
            self.caption = ""

    def handle_endtag(self, tag):
        self.island = None
        self.inside = None if tag == self.inside else self.inside
        self.cell = self.cell and tag not in ("th", "td")

    def handle_data(self, data):
        if self.island:
            self.islands[self.island] = self.islands.get(self.island, "") + data
        self.caption += data * (self.inside == "caption")
        if self.cell and self.inside != "title":
            self.tables[self.caption][-1][-1] += data
        self.text += data


def as_text(table):
    header, rows = table
    return [[ev._show(cell) for cell in row] for row in (header, *rows)]


def without(column, rows):
    return [[cell for i, cell in enumerate(row) if i != column] for row in rows]


@pytest.fixture()
def world(tmp_path, monkeypatch, capsys):
    """Annotations, two result files, frames and speech of some rows; `run` gives (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    for name, texts in ANSWERS.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [published(row, text) for row, text in zip(ROWS, texts, strict=True)])
    frames, audio = tmp_path / "my frames#1" / "v1", tmp_path / "audio"
    frames.mkdir(parents=True)
    audio.mkdir()
    pictures, sounds = sorted((FIXTURES / "frames/fx-001").iterdir()), sorted((FIXTURES / "audio").iterdir())
    for number in range(3):
        for i in range(2):
            shutil.copy(pictures[number], frames / f"v1_{number}{i}.jpg")
        shutil.copy(sounds[number], audio / f"v1_q{number}{sounds[number].suffix}")
    (frames / "v1_21.jpg").write_bytes(b"\xff\xd8 half")
    media = ("--frames_dir", "my frames#1", "--audio_dir", "audio")
    score = ("--score_only", "--output_file", "a.jsonl", "--eval_data_path", "data.jsonl", "--report", "pages/a.html")
    compare = ("--compare", "a.jsonl", "b.jsonl", "--eval_data_path", "data.jsonl", "--report", "pages/ab.html")

    def run(*argv):
        capsys.readouterr()
        return ev.main([*map(str, argv)]), *capsys.readouterr()

    return SimpleNamespace(folder=tmp_path, media=media, score=score, compare=compare, run=run)


# ------------------------------------------------------------------------------------------------------ what it holds


def test_the_page_holds_the_figures_of_the_summary(world):
    status, out, _ = world.run(*world.score)
    page, summary = Page("pages/a.html"), json.loads((world.folder / "a.summary.json").read_text())
    assert status == 0 and out.endswith("Report: pages/a.html\n")
    assert page.tables["All metrics, in %"] == as_text(ev.metrics_table(summary["metrics"]))
    floors = page.tables["choice beside what needs neither speech nor frames, in %"]
    assert floors == as_text(ev.reference_table(summary))
    types = page.tables["Accuracy in % by question type, and by family of types"]
    shown = without(len(types[0]) - 2, without(1, types))
    assert shown == as_text(ev.types_table(summary["by_type"], summary["by_family"]))
    assert [row[0] for row in types[-3:]] == ["[motion]", "[anatomy]", "[other]"]
    assert "choice 40.0 %" in page.text and "95 % interval 11.8 to 76.9; 2 of 5 right; floors: chance 60.0" in page.text
    for sentence in ("Does it hear? Not tested: ", "Does it see? Not tested: ", *summary["warnings"]):
        assert sentence in page.text
    assert '"data.jsonl"' in page.text and summary["manifest"]["sha256"]["eval_data_path"] in page.text
    assert "choice 50.0 %, 95 % 9.5 to 90.5; chance 50.0 %; test majority 50.0 %" in page.labels


def test_a_confusion_matrix_a_type_sums_to_its_rows(world):
    world.run(*world.score)
    matrix = Page("pages/a.html").tables["lesion_site: rows by gold answer and by what was answered"]
    assert matrix == [
        ["gold / answered", "rectum", "sigma", "several or none"],
        ["rectum", "", "", "1"],
        ["sigma", "", "1", ""],
    ]


def test_answers_that_failed_or_name_another_option_have_columns_of_their_own():
    rows = [annotation(i, "lesion_site", "rectum") for i in range(3)]
    keys = [ev.row_key(row) for row in rows]
    texts = dict(zip(keys, ({"predicted_answer": text} for text in (None, "the sigma", "rectum")), strict=True))
    table = ev.confusion_table(ev.score_rows(rows, texts))
    assert table == (("gold / answered", "rectum", "sigma", "no answer"), [("rectum", 1, 1, 1)])


def test_text_of_the_data_shows_as_text(world):
    world.run(*world.compare)
    page, source = Page("pages/ab.html"), Path("pages/ab.html").read_text()
    assert page.scripts == 2 and "<img src=x" not in source and source.count("</script>") == 2
    rows = {row[0]: row for row in page.data["rows"]}
    assert rows["v1/q2/lesion_site"][2] == HOSTILE and rows["v1/q2/lesion_site"][7][0][0] == HOSTILE
    assert rows["v1/q4/made_up_type"][3] == HOSTILE and rows["v1/q4/made_up_type"][7][0][0] == "x" * 60_000
    matrix = page.tables["made_up_type: rows by gold answer and by what was answered"]
    assert matrix[1][0] == ev.normalise(HOSTILE)


def test_two_runs_show_the_rows_that_changed_and_the_paired_test(world):
    world.run(*world.compare)
    page = Page("pages/ab.html")
    scored = [ev.score_rows(ROWS, ev.match_predictions(ROWS, f"{name}.jsonl")) for name in "ab"]
    pairs = {metric: ev.paired_comparison(*scored, metric) for metric in ev.METRICS}
    assert page.tables["Paired over the same rows, in %"] == as_text(ev.comparison_table(pairs))
    assert "Right in A alone, by choice: 2 rows" in page.text and "Right in B alone, by choice: 2 rows" in page.text
    source = Path("pages/ab.html").read_text()
    assert '<a href="#row=v1%2Fq1%2Fscope_motion">v1/q1/scope_motion</a>' in source
    assert page.data["columns"] == ["A", "B"]
    bits = {row[0]: [cell[1] & 1 for cell in row[7]] for row in page.data["rows"]}
    assert list(bits.values()) == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 0]]
    for rows in scored:
        assert f"choice {ev._show(ev.accuracy(rows, 'choice')['accuracy'])} %" in page.text


# -------------------------------------------------------------------------------------------------------------- media


def test_links_are_relative_and_what_is_missing_is_named(world):
    world.run(*world.score, *world.media)
    page = Page("pages/a.html")
    media = dict(map(tuple, page.data["media"]))
    assert media["v1_00"] == "../my%20frames%231/v1/v1_00.jpg" and media["v1_40"] is None
    assert media["speech of q0"].startswith("../audio/v1_q0.") and media["speech of q3"] is None
    assert "6 frames or recordings are missing; see --frames_dir and --audio_dir" in page.text
    assert [len(row[5]) for row in page.data["rows"]] == [2] * 5


def test_names_that_lead_out_of_the_folders_are_not_followed(world):
    rows = [annotation(0, frames=["../../secret", ".."], id="../q0"), annotation(1)]
    write_jsonl(world.folder / "data.jsonl", rows)
    write_jsonl(world.folder / "a.jsonl", [published(row, "yes") for row in rows])
    Image.new("RGB", (8, 8)).save(world.folder / "secret.jpg")
    world.run(*world.score, *world.media)
    assert Page("pages/a.html").data["rows"][0][5:7] == [[0, 1], 2]
    assert [link for _, link in Page("pages/a.html").data["media"][:3]] == [None] * 3


def test_one_recording_for_questions_in_other_words_is_told(world):
    rows = [annotation(0), annotation(0, "flush_action", question="Is it flushed?")]
    write_jsonl(world.folder / "data.jsonl", rows)
    write_jsonl(world.folder / "a.jsonl", [published(row, "yes") for row in rows])
    world.run(*world.score, *world.media)
    assert "2 rows play a recording that also serves a question in other words" in Page("pages/a.html").text


@pytest.mark.parametrize("opus", (True, False))
def test_embedded_media_are_small_whole_and_each_there_once(world, opus, monkeypatch):
    if not opus:
        monkeypatch.setattr(ev, "has_opus", lambda: False)
    elif not ev.has_opus():
        pytest.skip("this PyAV has no Opus encoder")
    rows = [*ROWS, annotation(5, frames=["v1_00", "v1_11"])]  # frames of two others
    write_jsonl(world.folder / "data.jsonl", rows)
    write_jsonl(world.folder / "a.jsonl", [published(row, "yes") for row in rows])
    _, out, _ = world.run(*world.score, *world.media, "--embed_media")
    assert "Embedding 6 frames and 3 recordings" in out
    page, links = Page("pages/a.html"), Path("pages/a.html").read_text().count("my%20frames")
    media = page.data["media"]
    there = {name: page.islands[f"m{i}"] for i, (name, link) in enumerate(media) if link == 1}
    assert links == 0 and len(there) == 8 and ["v1_21 (UnidentifiedImageError)", None] in media
    for name, content in there.items():
        kind, _, data = content.partition(";base64,")
        data = io.BytesIO(base64.b64decode(data))
        if name.startswith("v1_"):
            with Image.open(data) as image:
                assert kind == "image/jpeg" and image.format == "JPEG" and max(image.size) <= 384
            continue
        with av.open(data) as sound:
            decoded = list(sound.decode(audio=0))
            assert sound.streams.audio[0].codec_context.name == ("libopus" if opus else "pcm_s16le") or opus
        seconds = sum(block.samples / block.sample_rate for block in decoded)
        source = next((world.folder / "audio").glob(f"v1_{name.removeprefix('speech of ')}.*"))
        with av.open(str(source)) as original:
            wanted = sum(block.samples / block.sample_rate for block in original.decode(audio=0))
        assert kind == ("audio/ogg" if opus else "audio/wav") and abs(seconds - wanted) < 0.06
    assert ("embedded as WAV" in page.text) is not opus


def test_many_frames_share_the_room_of_the_page(world, monkeypatch):
    def sizes():
        world.run(*world.score, *world.media, "--embed_media")
        media = defaultdict(list)
        for kind, _, data in (text.partition(";base64,") for text in Page("pages/a.html").islands.values()):
            media[kind].append(data)
        pictures = [base64.b64decode(data) for data in media["image/jpeg"]]
        sound = sum(len(base64.b64decode(data)) for kind, parts in media.items() if "audio" in kind for data in parts)
        return len(pictures), sum(map(len, pictures)), max(max(Image.open(io.BytesIO(p)).size) for p in pictures), sound

    n, most, side, sound = sizes()
    monkeypatch.setattr(ev, "EMBEDDED_BYTES", sound + most // 2)
    monkeypatch.setattr(ev, "SMALL_JPEGS", ((side, 75), (side // 2, 50), (side // 4, 30)))
    fewer, less, smaller, _ = sizes()
    assert n == fewer == 5 and less <= most // 2 and smaller == side // 2


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("flags", "told"),
    (
        (("--report", "page.txt"), "--report page.txt: the name must end in .html"),
        (("--report", "data.jsonl/x.html"), "data.jsonl cannot be written; choose another name"),
        (("--plot", "x.jpg"), "--plot x.jpg: the name must end in .png"),
        (("--frame_pattern", "{clip}/{frame}"), "--frame_pattern: 'clip' is not a field"),
        (("--audio_pattern", "{id"), "--audio_pattern: "),
        (("--runs", "nowhere"), "nowhere: no trainer_state.json in it or its checkpoints; name a folder that training"),
    ),
)
def test_what_a_page_cannot_use_is_told_in_a_line_before_anything_is_scored(world, flags, told):
    status, out, err = world.run(*world.score, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1) and told in err
    assert not (world.folder / "a.summary.json").exists() and not (world.folder / "pages").exists()


def test_a_missing_package_is_named(world, monkeypatch):
    there = ev.importlib.util.find_spec
    monkeypatch.setattr(ev.importlib.util, "find_spec", lambda name: name not in ("av", "matplotlib") and there(name))
    _, _, err = world.run(*world.score, "--embed_media")
    assert err.endswith("--embed_media: needs a package that is not installed: pip install av\n")
    _, _, err = world.run("--plot", "x.png", "--runs", "here")
    assert err.endswith("--plot: needs a package that is not installed: pip install matplotlib\n")


@pytest.mark.parametrize("flags", (("--embed_media",), ("--runs", "x"), ("--frames_dir", "x")))
def test_flags_of_the_page_without_one_are_refused(world, flags):
    with pytest.raises(SystemExit) as stop:
        world.run(*world.score[:-2], *flags)
    assert stop.value.code == 2


def test_scoring_with_a_page_imports_no_torch(world):
    blocked = "".join(f"sys.modules[{name!r}] = None;" for name in ("torch", "numpy", "PIL", "av", "train_vqa"))
    code = f"import sys;{blocked} import evaluate_checkpoint as ev; sys.exit(ev.main(sys.argv[1:]))"
    for flags in (world.score, world.compare):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, *flags, *world.media], env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


# ------------------------------------------------------------------------------------------------------- a run's page


@pytest.fixture(scope="module")
def of_arms(trained, tmp_path_factory):
    """The page of all arms of a tiny model on the fixtures, with the rows and the summary of that run."""
    path = tmp_path_factory.mktemp("arms") / "x.jsonl"
    page = path.with_name("arms.html")
    flags = ("--checkpoint_path", trained, *EVAL_DATA, "--max_new_tokens", "4", "--arms", "all", "--report", page)
    assert ev.main([*map(str, flags), "--output_file", str(path)]) == 0
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    return SimpleNamespace(page=page, path=path, rows=read_jsonl(path), summary=summary)


def test_a_run_writes_rows_and_a_page_with_their_files_and_arms(of_arms, trained, tmp_path):
    path, done = of_arms.page, of_arms
    for row in done.rows:
        assert row["question_id"] == row["id"] and row["exact_match"] == int(row["correct"])
        assert len(row["frames"]) == 2 and all(Path(frame).is_file() for frame in row["frames"])
    page = Page(path)
    assert page.data["columns"] == list(done.summary["arms"]) and len(page.data["columns"]) == 9
    shown = without(1, page.tables["Arms, paired with the first"])
    assert shown[1:] == as_text(ev.arms_table(done.summary["arms"]))[1:]
    assert all(sentence in page.text for sentence in ev.arm_sentences(done.summary["arms"]))
    assert all(link and (path.parent / link).resolve().is_file() for _, link in page.data["media"])
    by_key = {row[0]: dict(zip(page.data["columns"], row[7], strict=True)) for row in page.data["rows"]}
    shuffled = {
        ev.key_text(ev.row_key(row)): row for row in read_jsonl(done.path.with_suffix(".shuffled_frames.jsonl"))
    }
    lent = {
        ev.key_text(ev.row_key(row)): row["audio_of"]
        for row in read_jsonl(done.path.with_suffix(".mismatched_audio.jsonl"))
    }
    for key, cells in by_key.items():
        assert cells["shuffled_frames"][0] == shuffled[key]["predicted_answer"]
        assert cells["mismatched_audio"][3] == lent[key]
    left_out = done.summary["arms"]["mismatched_frames"]["left_out"]
    assert {key for key, cells in by_key.items() if cells["mismatched_frames"] is None} == set(left_out) != set()
    assert str(trained) in page.text and "training loss. " in " ".join(page.labels)
    shutil.copytree(done.path.parent, tmp_path / "copy")
    rescored = (
        "--score_only",
        "--output_file",
        tmp_path / "copy/x.jsonl",
        "--eval_data_path",
        FIXTURES / "smoke.jsonl",
    )
    assert ev.main([*map(str, rescored), "--report", str(tmp_path / "again.html")]) == 0
    again = Page(tmp_path / "again.html").data
    assert again["rows"] == page.data["rows"] and again["media"] == page.data["media"]


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_come_from_the_log_of_the_folder_or_its_newest_checkpoint(trained, tmp_path):
    curves = ev.read_curves(trained)
    assert [step for step, _ in curves["loss"]] == [2, 4, 6] and [step for step, _ in curves["eval_loss"]] == [3, 6]
    assert {"learning_rate", "grad_norm", "samples_per_second"} <= curves.keys()
    assert all(speed > 0 for _, speed in curves["samples_per_second"])
    running = tmp_path / "running"
    for step in (2, 4):
        folder = running / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        shutil.copy(trained / folder.name / "trainer_state.json", folder)
    assert ev.read_curves(running)["loss"] == curves["loss"][:2]


def test_evaluations_saves_and_uploads_do_not_count_as_training_time(train, tmp_path, monkeypatch):
    """Steps of one sample a second, by a clock that stands still but in steps, evaluations, saves and uploads."""
    now = [0.0]
    monkeypatch.setattr(vqa.time, "monotonic", lambda: now[0])
    step, evaluate, save = vqa.VQATrainer.training_step, vqa.VQATrainer.evaluate, vqa.VQATrainer.save_model

    def taking(seconds, method):
        def timed(*args, **kwargs):
            now[0] += seconds
            return method(*args, **kwargs)

        return timed

    monkeypatch.setattr(vqa.VQATrainer, "training_step", taking(1, step))
    monkeypatch.setattr(vqa.VQATrainer, "evaluate", taking(1000, evaluate))
    monkeypatch.setattr(vqa.VQATrainer, "save_model", taking(1000, save))
    monkeypatch.setattr(vqa, "open_repo", lambda name, **_: name)
    monkeypatch.setattr(vqa, "upload", taking(1000, lambda *_, **__: "its address"))
    push = ("--push_to_hub", "True", "--hub_strategy", "every_save")
    assert train(tmp_path / "out", *SIX_STEPS, *EVALUATION, "--save_steps", "1", "--eval_steps", "2", *push) == 0
    assert [speed for _, speed in ev.read_curves(tmp_path / "out")["samples_per_second"]] == [1.0, 1.0, 1.0]


def test_several_runs_are_drawn_in_one_picture(trained, world):
    pytest.importorskip("matplotlib")
    shutil.copytree(trained / "checkpoint-4", world.folder / "other")
    status, out, _ = world.run("--plot", "curves/x.png", "--runs", trained, "other")
    assert (status, out) == (0, "Curves: curves/x.png\n")
    with Image.open("curves/x.png") as picture:
        assert picture.format == "PNG" and picture.width == 900
    world.run(*world.compare, "--runs", trained, "other")
    page = Page("pages/ab.html")
    (label,) = (label for label in page.labels if label.startswith("evaluation loss. "))
    assert f"{trained}: " in label and "other: " in label and label.count(" at step 3") == 3


def test_values_that_are_not_finite_are_no_points(tmp_path):
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log}))
    assert ev.read_curves(tmp_path) == {"loss": [(2, 1.5)]}
    (tmp_path / "trainer_state.json").write_text("{")
    assert "trainer_state.json: not JSON" in refusal(ev.read_curves, tmp_path)


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not (path := shutil.which("chromium")):
        pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture()
def opened(chromium):
    """Opens a page from disk; afterwards it must have said nothing and asked for no file but its media."""
    said, asked = [], []
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def open_page(path, hash=""):
        page.goto(f"{Path(path).resolve().as_uri()}{hash}")
        return page

    yield open_page
    page.close()
    assert said == [] and asked and all(re.match("file:|data:", url) for url in asked)


def until(page, expression):
    """Wait until an expression is true; the page's own policy refuses Playwright's way of asking."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


PLAYABLE = "(a => { a.preload = 'auto'; return a.duration > 0.1; })(document.querySelector('audio'))"


def listed(page):
    return page.locator("#list option").count()


def test_all_arms_in_a_browser(of_arms, opened):
    done, page = of_arms, opened(of_arms.page)
    assert page.inner_text("#count") == "5 of 5 rows" and page.inner_text("#key") == "fx-001/qa_000101/nbi_status"
    choice = done.summary["metrics"]["choice"]
    assert page.inner_text(".head") == f"choice {ev._show(choice['accuracy'])} %"
    until(page, "document.getElementById('frame').naturalWidth > 0")
    alt = page.get_attribute("#frame", "alt")
    assert re.fullmatch(r"frame 1 of 2, fx-001_\d+", alt)
    page.click("#next")
    assert page.get_attribute("#frame", "alt").startswith("frame 2 of 2, ")
    page.click("#play")
    until(page, "document.getElementById('frame').alt.startsWith('frame 1 of 2')")
    page.click("#play")
    until(page, PLAYABLE)
    right = {arm: part["metrics"]["choice"]["correct"] for arm, part in done.summary["arms"].items()}
    wrong = {arm: part["metrics"]["choice"]["n"] - right[arm] for arm, part in done.summary["arms"].items()}
    for verdict, counts in (("right", right), ("wrong", wrong)):
        page.select_option("#verdict", verdict)
        for column, arm in enumerate(right):
            page.select_option("#column", str(column))
            assert listed(page) == counts[arm], (verdict, arm)
    page.select_option("#verdict", "all")
    kinds = [row["question_type"] for row in done.rows]
    page.select_option("#type", "nbi_status")
    assert listed(page) == kinds.count("nbi_status") == 2
    page.select_option("#type", "=motion")
    assert listed(page) == kinds.count("scope_motion_type") == 2
    page.select_option("#type", "")
    page.fill("#search", "narrow BAND")
    assert listed(page) == sum("narrow band" in row["question"].lower() for row in done.rows)


def test_a_page_is_used_by_the_keyboard_alone(of_arms, opened):
    page = opened(of_arms.page)
    keys = [row[0] for row in Page(of_arms.page).data["rows"]]

    def shows(number):
        """Wait until the page, which follows its address, shows that row."""
        page.wait_for_function("key => document.querySelector('#key').innerText === key", arg=keys[number])

    for number in (1, 2):
        page.keyboard.press("ArrowRight")
        shows(number)
    assert page.url.endswith(f"#row={keys[2].replace('/', '%2F')}")
    page.keyboard.press("ArrowLeft")
    shows(1)
    page.focus("#list")
    page.keyboard.press("ArrowDown")
    shows(2)
    page.go_back()
    shows(1)
    order = []
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.focus("body > a")
    for _ in range(60):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    places = [order.index(name) for name in ("type", "column", "metric", "verdict", "search", "list", "back", "play")]
    assert places == sorted(places) and order[0] == "A" and "SUMMARY" in order
    page.focus("#verdict")
    page.keyboard.press("ArrowDown")  # in a filter the keys are its own
    assert page.inner_text("#key") == keys[1] and page.input_value("#verdict") == "right"
    page.focus("#play")
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Stop"


CONTRAST = """() => {
  const part = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  return Math.min(...[...document.querySelectorAll("body *:not(script)")]
    .filter(e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => { const s = getComputedStyle(e), b = luminance(ground(e));
      const a = luminance(e.closest("svg") ? s.fill : s.color);
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); }"""


def test_text_has_contrast_and_every_control_and_picture_a_name(of_arms, opened):
    page = opened(of_arms.page)
    assert page.evaluate(CONTRAST) >= 4.5
    nameless = "e => !(e.labels && e.labels.length) && !e.ariaLabel && !e.textContent.trim() && !e.title"
    controls = page.locator("select, input, button, audio").all()
    assert len(controls) > 8 and [e.get_attribute("id") for e in controls if e.evaluate(nameless)] == []
    assert all(svg.get_attribute("aria-label") for svg in page.locator("svg").all())
    assert page.locator("th:not([scope])").count() == 0 and page.get_attribute("html", "lang") == "en"


def test_hostile_text_and_changed_rows_in_a_browser(world, opened):
    world.run(*world.compare, *world.media)
    page = opened("pages/ab.html", "#row=v1%2Fq2%2Flesion_site")
    assert page.title() == "a.jsonl and b.jsonl" and page.text_content("#question") == HOSTILE
    assert page.text_content("#answers .text") == HOSTILE
    assert page.locator("main script, main img[src=x]").count() == 0
    page.select_option("#column", "1")
    for verdict, mark, numbers in (("gained", "✓", (1, 2)), ("lost", "✗", (0, 3))):
        page.select_option("#verdict", verdict)
        shown = page.locator("#list option").all_text_contents()
        rows = [ROWS[number] for number in numbers]
        assert shown == [f"{mark} {row['question_type']}: {row['question'][:100]}" for row in rows]
    page.click("summary:has-text('Right in A alone')")
    page.click("a:has-text('v1/q3/lesion_site')")
    assert page.inner_text("#key") == "v1/q3/lesion_site"
    assert page.inner_text("#caption").startswith("missing: v1_30") and "missing: speech of q3" in page.inner_text(
        "#speech"
    )
    page.goto(page.url.partition("#")[0] + "#row=v1%2Fq4%2Fmade_up_type")
    assert page.text_content("#answers .text") == "x" * 60_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_an_embedded_page_opens_anywhere(world, opened):
    world.run(*world.compare, *world.media, "--embed_media")
    elsewhere = world.folder / "elsewhere.html"
    shutil.move("pages/ab.html", elsewhere)
    shutil.rmtree("my frames#1")
    page = opened(elsewhere)
    until(page, "document.getElementById('frame').naturalWidth > 0")
    until(page, PLAYABLE)


def test_files_that_went_away_after_the_page_was_written_are_shown_as_missing(world, chromium):
    world.run(*world.score, *world.media)
    shutil.rmtree("my frames#1")
    page = chromium.new_page()
    page.goto(Path("pages/a.html").resolve().as_uri())
    until(page, "document.getElementById('caption').textContent === 'missing: frame 1 of 2, v1_00'")
    page.close()
