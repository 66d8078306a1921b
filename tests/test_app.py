"""The page, in a real browser: a clip is picked, a question is recorded, and the smoke model answers it rightly.

The picture in README.md: PAGE_PNG=docs/page.png python -m pytest tests/test_app.py -k recorded
"""

import html
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

import app
import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, ROOT, read_jsonl, refusal

FRAMES = [FIXTURES / "frames/fx-002" / f"{number}.png" for number in range(20318, 20347, 4)]
MOTION = FIXTURES / "audio/fx-002_qa_000101_scope_motion_type.mp3"  # which way the camera travels
FLAGS = ("--checkpoint_path", "c", "--data_path", "d", "--frames_dir", "f")
SECRET = (201, 37, 89)  # the colour of a picture that must not be shown


def write_video(path: Path, frames: int, rate: int = 10, codec: str = "libvpx", **options: str) -> Path:
    """A video whose frames grow lighter, each by 200 / frames levels."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            picture = Image.new("RGB", (64, 48), (20 + 200 * index // frames,) * 3)
            out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode(None))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Without a page
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (FLAGS[2:], "the following arguments are required: --checkpoint_path"),
        ((*FLAGS, "--max_new_tokens", "0"), "argument --max_new_tokens: must be 1 or more, found 0"),
        ((*FLAGS, "--frame_dir", "x"), "unrecognized arguments: --frame_dir x; did you mean --frames_dir?"),
    ],
)
def test_bad_flags_are_told_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        app.main(flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "GRADIO", "gradio>=99")
    assert refusal(app.main, FLAGS).endswith("; run `pip install -r requirements-app.txt`")


def test_wrong_folders_are_told_before_weights_load(trained, no_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "load_gradio", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = ["--checkpoint_path", str(trained), *EVAL_DATA, "--audio_dir", str(tmp_path / "none")]
    assert "no such folder; --audio_dir" in refusal(app.main, flags)
    assert "no adapter (adapter_config.json)" in refusal(app.main, ["--checkpoint_path", str(tmp_path), *EVAL_DATA])


def test_rows_with_broken_files_are_named_and_left_out(data, capsys):
    (data.audio / MOTION.name).write_bytes(b"<html>")
    args = app.parse_arguments(["--checkpoint_path", "c", *data.eval_flags])
    rows = app.read_rows(args, {"audio_pattern": None, "frame_pattern": None})
    assert [row.line for row in rows] == [1, 2, 3, 5]
    told = [line for line in capsys.readouterr().err.splitlines() if "page" in line]
    speech = f"speech {data.audio / MOTION.name} is an HTML page; replace it or remove the row"
    assert told == [
        f"{data.jsonl}:4: {speech} (not on the page)",
        f"{data.jsonl}: 4 rows are on the page, 1 problems",
    ]


def test_frames_are_taken_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 100):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"f_{number}.png")
    frames = app.uploaded_frames([*tmp_path.iterdir()], 384)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [9, 10, 100]


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.mp4", "mpeg4"), ("b.mp4", "libx264")])
def test_a_video_gives_eight_frames_evenly_spaced(name, codec, tmp_path):
    """Of 40 frames each fifth, the first among them; lighter by 25 levels each. B-frames are stored out of order."""
    options = {"bf": "2"} if codec == "libx264" else {}
    frames = app.uploaded_frames([write_video(tmp_path / name, 40, codec=codec, **options)], 32)
    assert [frame.size for frame in frames] == [(32, 24)] * 8
    np.testing.assert_allclose(
        [frame.getpixel((16, 12))[0] for frame in frames], [20 + 25 * i for i in range(8)], atol=4
    )


def test_uploads_that_cannot_be_asked_about(tmp_path):
    long = write_video(tmp_path / "long.webm", 62, rate=1)
    assert refusal(app.uploaded_frames, [long], 384) == f"video {long} lasts more than 60 s; shorten it"
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(write_video(tmp_path / "whole.mp4", 40, codec="mpeg4").read_bytes()[:-300])
    assert refusal(app.uploaded_frames, [cut], 384).startswith(f"video {cut} cannot be decoded (")
    image = shutil.copy(FRAMES[0], tmp_path / "image.mp4")
    assert refusal(app.uploaded_frames, [image], 384) == f"video {image} is a PNG image; give an MP4 or a WebM"
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.rate = 16000
        out.mux([*stream.encode(block), *stream.encode(None)])
    assert refusal(app.uploaded_frames, [sound], 384) == f"video {sound} holds no picture; give another"
    assert "2 more files; give it alone" in refusal(app.uploaded_frames, [*FRAMES[:2], long], 384)
    nine = [*FRAMES, FRAMES[0]]
    assert refusal(app.uploaded_frames, nine, 384) == "9 frames, and the model is shown 8 at most; give fewer"


def test_shares_are_of_sentences_and_sum_to_one(rows):
    wordings = app.wordings_of(rows)
    assert wordings["nbi_status"] == {
        "yes": ["Yes, NBI light is on in these frames."], "no": ["No, WL light is on instead."]
    }  # fmt: skip
    tools = {"forceps": ["Forceps are visible on screen."], "catheter": ["catheter"], "snare": ["snare"]}
    assert wordings["tool_identification"] == tools
    shares = app.shares_of({"a": -1000.0, "b": -1000.0, "c": -1000.0 + np.log(2)}, {"x": ["a", "b"], "y": ["c"]})
    assert shares == pytest.approx({"x": 0.5, "y": 0.5})


def test_a_model_of_words_is_asked_in_words(trained, rows):
    """On as many frames as evaluation shows; the shares come after the answer."""
    model = vqa.load_trained(trained, input_mode="text")
    asker, row = app.Asker(model, rows, 2, 4), rows[0]
    clip = asker.clip_of(row)
    frames = [Image.new("RGB", frame.size) for frame in clip.frames[:2]]
    (clip, page, early), (*_, shares) = asker.ask("black_frames", clip, None, row.question, "nbi_status")
    expected = model.model.answer(frames, question=row.question, max_new_tokens=4).text
    assert clip.told == [("Black frames", "in words", expected, False)]
    assert f"{html.escape(expected)}</p>" in page and "2 frames shown" in page
    assert early is None and shares.keys() == {"yes", "no"} and sum(shares.values()) == pytest.approx(1)
    assert [label for label, _ in asker.matching("fx-002", app.EVERY, "NARROW switched")] == [
        f"{rows[2].key} · {rows[2].question}"
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The running page
# ----------------------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def server(warm, smoke, tmp_path_factory):
    """The page of the smoke model on a copy of the fixtures, in a process of its own; ended by SIGTERM."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-app.txt")
    folder = tmp_path_factory.mktemp("page")
    data, temporary, empty = (folder / name for name in ("data", "tmp", "cwd"))
    for made in (temporary, empty):
        made.mkdir()
    shutil.copytree(FIXTURES, data)
    Image.new("RGB", (56, 56), SECRET).save(folder / "secret.png")
    soundfile.write(folder / "secret.wav", np.sin(np.arange(16000) / 9), 16000)
    (data / "frames" / "fx-001" / "link.png").symlink_to(folder / "secret.png")
    before = snapshot(data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--checkpoint_path", smoke[0] / "checkpoints" / "smoke", "--data_path", data / "smoke.jsonl"]
    flags += ["--frames_dir", data / "frames", "--audio_dir", data / "audio"]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_SERVER_NAME", None)
    command = [warm, str(ROOT / "app.py"), *map(str, flags)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=empty, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            if f"Ask at {url}" in (folder / "log").read_text():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        yield SimpleNamespace(url=url, port=port, folder=folder, data=data, temporary=temporary)
    finally:
        process.terminate()
        status = process.wait(30)
    told = (folder / "log").read_text()
    assert status == 128 + signal.SIGTERM, told
    assert 'app.py", line' not in told  # as in a traceback; gradio shows its own for a path that it refuses
    assert snapshot(data) == before
    assert not [*temporary.glob("surgvivqa*"), *empty.iterdir()]


@pytest.fixture(scope="module")
def context(server):
    """A real browser whose microphone plays MOTION once; nothing but 127.0.0.1 is asked for anything."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    samples, rate = vqa.decode_audio(MOTION)
    soundfile.write(server.folder / "microphone.wav", samples, rate, subtype="PCM_16")
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    flags.append(f"--use-file-for-fake-audio-capture={server.folder / 'microphone.wav'}%noloop")
    asked = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        # The smoke model knows five recordings by heart, so that they must come as they are.
        context.add_init_script(
            "const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);"
            "navigator.mediaDevices.getUserMedia = wanted => ask({...wanted, audio: wanted.audio &&"
            " {echoCancellation: false, noiseSuppression: false, autoGainControl: false}})"
        )
        context.on("request", lambda request: asked.append(request.url))
        context.set_default_timeout(60_000)
        yield context
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((server.url, "data:", f"blob:{server.url}"))]
    assert len(asked) > 50 and not elsewhere


@contextmanager
def visit(context, server):
    """A page on which the first row is shown."""
    page = context.new_page()
    page.goto(server.url)
    page.locator("#frames img").nth(7).wait_for()
    yield page
    page.close()


@contextmanager
def given_to_the_page(page):
    """Waits until the sound that is given meanwhile has arrived and can be played."""
    with page.expect_response(lambda response: response.url.partition("?")[0].endswith("/upload")):
        yield
    page.locator("#speech").get_by_label("Play", exact=True).wait_for()


def pick(page, **filters: str) -> None:
    for label, value in filters.items():
        page.get_by_label(label.replace("_", " "), exact=True).click()
        page.get_by_role("option", name=value).click()


def ask(page, button: str = "Ask") -> list[list[str]]:
    """Press a button; returns the table of all answers once the new one is there."""
    rows = page.locator("#answer tr")
    before = rows.count()
    page.get_by_role("button", name=button, exact=True).click()
    page.wait_for_function(f"document.querySelectorAll('#answer tr').length > {before}")
    return [row.locator("td").all_inner_texts() for row in rows.all()[1:]]


def shown(page, shares: str) -> None:
    """Wait until the shares of the closed answers read so; they come after the answer."""
    page.wait_for_function(f"/{shares}/.test(document.querySelector('#shares').innerText)")


@pytest.mark.slow
def test_a_recorded_question_is_answered(context, server):
    with visit(context, server) as page:
        assert "For research only." in page.inner_text("body")
        pick(page, Video="fx-002", Question_type="scope_motion_type")
        page.get_by_text("This row asks: “Which way does the camera travel").wait_for()
        page.get_by_text("Play as a flip book").click()
        flip = page.locator("#flip img").get_attribute("src").removeprefix("data:image/webp;base64,")
        with urllib.request.urlopen(f"data:image/webp;base64,{flip}") as content:
            assert Image.open(io.BytesIO(content.read())).n_frames == 8
        speech, right = page.locator("#speech"), ["as given", "yours", "The scope is primarily withdrawing.", "right"]
        for _ in range(3):  # a busy machine loses some of the sound, and the smoke model knows it by heart alone
            speech.get_by_label("Clear").click()
            speech.get_by_role("button", name="Record", exact=True).click()
            page.wait_for_timeout(4200)  # the question takes 3.4 s
            with given_to_the_page(page):
                speech.get_by_role("button", name="Stop", exact=True).click()
            latest, *_ = ask(page)
            if latest == right:
                break
        assert latest == right
        assert re.search(r"\d\.\d\d s, 7 tokens, stopped by itself; 8 frames shown", page.inner_text("#answer"))
        shown(page, r"withdrawing\s+(9\d|100)%\s+advancing\s+\d%")
        if picture := os.environ.get("PAGE_PNG"):  # docs/page.png is made so
            taken = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            taken.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


@pytest.mark.slow
def test_its_arms_are_those_of_evaluation(context, server, smoke, tmp_path):
    arms = ["audio", *app.AGAIN]
    flags = ["--checkpoint_path", str(smoke[0] / "checkpoints" / "smoke"), "--output_file", str(tmp_path / "x.jsonl")]
    assert ev.main([*flags, *EVAL_DATA, "--batch_size", "1", "--arms", ",".join(arms)]) == 0
    files = [tmp_path / "x.jsonl", *(tmp_path / f"x.{arm}.jsonl" for arm in app.AGAIN)]
    evaluated = [read_jsonl(file)[0] for file in files]
    with visit(context, server) as page:
        ask(page)
        for name in app.AGAIN.values():
            told = ask(page, f"Again: {name.lower()}")
        told.reverse()
        assert [row[2] for row in told] == [row["predicted_answer"] for row in evaluated]
        assert [row[3] for row in told] == ["right" if row["choice_correct"] else "wrong" for row in evaluated]
        assert [row[0] for row in told] == ["as given", *app.AGAIN.values()]
        assert [row[1] for row in told] == [
            "the row’s own",
            "“Name the instrument that you can see.”",
            *["the row’s own"] * 2,
        ]


@pytest.mark.slow
def test_frames_and_a_video_of_ones_own(context, server):
    with visit(context, server) as page:
        page.get_by_role("tab", name="Your own frames or video").click()
        page.locator("#files input").set_input_files(FRAMES)
        page.get_by_text("Your own clip").wait_for()
        assert page.locator("#frames img").count() == 8
        upload(page, MOTION)
        assert ask(page) == [["as given", "yours", "The scope is primarily withdrawing.", ""]]
        pick(page, Compare_the_closed_answers_of="nbi_status")
        ask(page)
        shown(page, r"(yes|no)\s+\d+%")
        page.locator("#files").get_by_label("Clear").click()
        page.locator("#files input").set_input_files(write_video(server.folder / "own.webm", 4))
        page.wait_for_function("document.querySelectorAll('#frames img').length == 4")
        upload(page, MOTION)
        assert len(ask(page)) == 1


def upload(page, sound: Path) -> None:
    """Give a sound file as the question."""
    speech = page.locator("#speech")
    if speech.get_by_label("Clear").count():
        speech.get_by_label("Clear").click()
    speech.get_by_label("Upload file").click()
    with given_to_the_page(page):
        speech.locator("input[type=file]").set_input_files(sound)


@pytest.mark.slow
def test_what_cannot_be_used_is_told_in_the_command_lines_words(context, server):
    folder = server.folder / "bad"
    folder.mkdir()
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "long.wav", np.sin(np.arange(31 * 8000) / 9), 8000)
    (folder / "broken.mp3").write_bytes(MOTION.read_bytes()[:9000])
    Image.new("RGB", (56, 56)).save(folder / "really.gif")
    (folder / "really.gif").rename(folder / "a_gif.png")
    with visit(context, server) as page:
        for name in ("silent.wav", "long.wav", "broken.mp3"):
            upload(page, folder / name)
            page.get_by_role("button", name="Ask", exact=True).click()
            told(page, refusal(vqa.load_speech, folder / name).replace(f"{folder}/", ""))
        page.get_by_role("tab", name="Your own frames or video").click()
        for files in ([folder / "a_gif.png"], [*FRAMES, folder / "a_gif.png"]):
            page.locator("#files input").set_input_files(files)
            told(page, refusal(app.uploaded_frames, files, 112).replace(f"{folder}/", ""))
            page.locator("#files").get_by_label("Clear").click()


def told(page, sentence: str) -> None:
    """The page shows the sentence; its box is closed again."""
    page.get_by_text(sentence).wait_for()
    page.get_by_test_id("toast-close").first.click()


@pytest.mark.slow
def test_two_people_at_once(context, server):
    with visit(context, server) as one, visit(context, server) as other:
        pick(other, Video="fx-002", Question_type="tool_identification")
        other.get_by_text("This row asks: “Name the instrument").wait_for()
        for page in (one, other):
            page.get_by_role("button", name="Ask", exact=True).click()
        one.locator(".answer", has_text="Yes, NBI light is on in these frames.").wait_for()
        other.locator(".answer", has_text="Forceps are visible on screen.").wait_for()


# ----------------------------------------------------------------------------------------------------------------------
# Tricks with paths
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def neighbour(server):
    """The URL of another server of this machine, which has the secret picture too."""
    content = (server.folder / "secret.png").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}/secret.png"
        http_server.shutdown()


def get(server, path: str) -> tuple[int, bytes]:
    """Status and content, the path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.slow
def test_no_path_leads_to_a_file(server, neighbour):
    secret = str(server.folder / "secret.png")
    cache = next(server.temporary.glob("surgvivqa_app_*"))
    files = [secret, "/etc/passwd", str(FRAMES[0]), str(server.data / "frames/fx-001/fx-001_1204.jpg"),
             str(server.data / "frames/fx-001/link.png"), f"{cache}/../../secret.png", f"{cache}/./../../secret.png",
             "../secret.png", "../../../../../../../../etc/passwd", f"file://{secret}", f"file:{secret}", neighbour,
             str(ROOT / "app.py"), "app.py", str(cache), f"{cache}/"]  # fmt: skip
    asked = []
    for file in files:
        for path in (file, quote(file, safe=""), quote(file, safe="").replace("%", "%25"), file.replace("/", "\\")):
            asked += [
                f"/gradio_api/file={path}",
                f"/file={path}",
                f"/gradio_api/proxy={path}",
                f"/gradio_api/stream/{path}",
            ]
            for folder in ("static", "assets", "svelte", "custom_component/1/component"):
                asked += [f"/{folder}/{up}{path}" for up in ("", "../" * 12, "..%2f" * 12)]
    contents = [Path(file).read_bytes() for file in files if Path(file).is_file()]
    for path in asked:
        status, content = get(server, quote(path, safe="/%=:\\."))
        assert status >= 400 or not any(part in content for part in contents), path
        assert not path.startswith(("/gradio_api/", "/file=")) or status >= 400, (path, status)


def call(server, name: str, *given) -> dict:
    """What the queue says in the end to a call of one of the page's functions, as the browser makes it."""
    with urllib.request.urlopen(f"{server.url}config") as answer:
        functions = json.load(answer)["dependencies"]
    session = uuid.uuid4().hex
    body = {
        "data": given,
        "fn_index": next(f["id"] for f in functions if f["api_name"] == name),
        "session_hash": session,
    }
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}gradio_api/queue/join", json.dumps(body).encode(), head)
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{server.url}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return message
    raise AssertionError("the queue said nothing")


def given(path, **more) -> dict:
    return {"path": str(path), "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.mark.slow
def test_no_call_opens_a_file_that_was_not_given(server, neighbour):
    secret, cache = server.folder / "secret.png", next(server.temporary.glob("surgvivqa_app_*"))
    own = server.data / "frames/fx-001/fx-001_1204.jpg"
    link = server.data / "frames/fx-001/link.png"
    for path in (
        secret,
        own,
        link,
        f"{cache}/../../secret.png",
        f"file://{secret}",
        neighbour,
        os.path.relpath(secret),
    ):
        for more in ({}, {"url": f"file://{secret}"}, {"url": neighbour}):
            message = call(server, "upload", [given(path, **more)])
            assert not message["success"], (path, more)
    sound = server.folder / "secret.wav"
    for path in (sound, server.data / "audio" / MOTION.name, f"file://{sound}"):
        assert not call(server, "partial", None, given(path), "", None)["success"]


@pytest.mark.slow
def test_an_upload_stays_in_the_temporary_folder(server):
    cache = next(server.temporary.glob("surgvivqa_app_*"))
    for name in ("../../../evil.png", "..%2f..%2fevil.png", "/tmp/evil.png", "..\\..\\evil.png", "evil.html"):
        mark = uuid.uuid4().hex
        body = (
            f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            f"Content-Type: image/png\r\n\r\n<script>\r\n--{mark}--\r\n"
        )
        head = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        request = urllib.request.Request(f"{server.url}gradio_api/upload", body.encode(), head)
        with urllib.request.urlopen(request) as answer:
            [stored] = json.load(answer)
        assert os.path.realpath(stored).startswith(f"{cache}/")
        with urllib.request.urlopen(f"{server.url}gradio_api/file={quote(stored)}") as answer:
            assert (
                answer.headers["Content-Type"] != "text/html" or "attachment" in answer.headers["Content-Disposition"]
            )
    assert not [*server.folder.glob("evil*"), *server.data.glob("**/evil*"), *server.temporary.glob("evil*")]
    assert not Path("/tmp/evil.png").exists()
