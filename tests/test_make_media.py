"""make_media.py: the drawings show the answers; names, folders, refusals and reports hold; the committed fixtures."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests import make_media
from tests.conftest import FIXTURES, read_jsonl, write_jsonl
from tests.make_media import REQUIREMENTS, Scene, draw_clip, draw_frame, scene_for, scene_for_rows

SIZE = (155, 135)
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")


def generator(seed=0):
    return np.random.default_rng(seed)


def pixels(scene, t=0.0):
    """One frame of `scene`, float64 [H, W, 3]."""
    return np.asarray(draw_frame(scene, t, SIZE, generator()), dtype=np.float64)


def row(n=1, **changes):
    """A row of the schema, with the keys that make_media.py reads."""
    numbers = [100 * n + 4 * i for i in range(8)]
    names = {"id": f"qa_{n:06d}", "video_id": "v-1", "frames": [f"v-1_{number}" for number in numbers]}
    asked = {"question": "Is the narrow band light on?", "question_type": "nbi_status", "short_answer": "yes"}
    return {**names, "frame_numbers": numbers, **asked, **changes}


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Makes the media of rows, with a tone for speech whose pitch the text decides; returns (files, report)."""

    def tone(text, voice, speed):
        return np.sin(np.arange(2205) * (0.05 + 0.001 * len(text))).astype(np.float32), 22050

    monkeypatch.setattr(make_media, "speak", tone)
    monkeypatch.setattr(make_media, "require_espeak", lambda: None)

    def run(rows, *flags, place="media", stems=("a",)):
        files = [write_jsonl(tmp_path / f"{stem}.jsonl", rows) for stem in stems]
        command = ["--data_path", *files, "--output_dir", tmp_path / place, "--size", "62x54", *flags]
        make_media.main([*map(str, command)])
        made = sorted(path for path in (tmp_path / place).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / place)): path for path in made}, capsys.readouterr().out

    return run


# ------------------------------------------------------------------------------------------------------------ drawings


@pytest.mark.slow
@pytest.mark.parametrize("kind", REQUIREMENTS)
def test_an_answer_is_drawn_and_changes_nothing_else_in_a_scene(kind):
    """Pictures of two answers differ, by nothing but what the question is about; a seed draws the same bytes again."""
    for seed in range(5):
        scenes = {answer: scene_for(kind, answer, generator(seed)) for answer in REQUIREMENTS[kind]}
        clips = {answer: draw_clip(scene, 3, SIZE, generator(seed)) for answer, scene in scenes.items()}
        drawn = {answer: np.stack([np.asarray(frame) for frame in clip]) for answer, clip in clips.items()}
        free = set(asdict(Scene())) - {name for needs in REQUIREMENTS[kind].values() for name in needs}
        held = [{name: getattr(scene, name) for name in free} for scene in scenes.values()]
        assert all(part == held[0] for part in held)
        for answer, scene in scenes.items():
            assert all(getattr(scene, name) in values for name, values in REQUIREMENTS[kind][answer].items())
            again = draw_clip(scene, 3, SIZE, generator(seed))
            assert drawn[answer].tobytes() == np.stack([np.asarray(frame) for frame in again]).tobytes()
            for other in scenes.keys() - {answer}:
                differs = np.abs(drawn[answer].astype(int) - drawn[other]).max(axis=(0, 3)) > 20
                assert scene == scenes[other] or differs.mean() > 0.004, (answer, other)


@pytest.mark.slow
def test_the_lesion_keeps_to_its_quadrant_and_drifts_its_way():
    expected = {"left": (-0.14, 0), "right": (0.14, 0), "up": (0, -0.14), "down": (0, 0.14), "stable": (0, 0)}
    for quadrant in REQUIREMENTS["lesion_screen_position"]:
        for drift in expected:
            scene = Scene(lesion=True, quadrant=quadrant, drift=drift, detail=len(quadrant + drift))
            ends = []
            for t in (0, 1):
                shown = np.abs(pixels(scene, t) - pixels(replace(scene, lesion=False), t)).max(axis=2) > 20
                y, x = (places.mean() / size for places, size in zip(np.nonzero(shown), SIZE[::-1], strict=True))
                assert ("lower" if y > 0.5 else "upper") + ("-right" if x > 0.5 else "-left") == quadrant
                ends.append((x, y))
            assert np.subtract(*ends[::-1]) == pytest.approx(expected[drift], abs=0.015)


@pytest.mark.slow
def test_rows_that_agree_are_all_shown_and_one_that_contradicts_is_left_out():
    asked = [("tool_catheter_check", "no"), ("nbi_status", "yes"), ("tool_identification", "snare")]
    scene, visible = scene_for_rows(asked, generator())
    assert (scene.tool, scene.lighting, visible) == ("snare", "NBI", [True, True, True])
    asked = [
        ("nbi_status", "yes"),
        ("scope_outside", "yes"),
        ("scope_motion", "yes"),
        ("scope_motion", "no"),
        ("x", "y"),
    ]
    scene, visible = scene_for_rows(asked, generator())
    assert (scene.view, scene.lighting, visible) == ("clear", "NBI", [True, False, True, False, False])


# ------------------------------------------------------------------------------------- names, folders, refusals, report


@pytest.mark.slow
def test_names_folders_reports_and_what_is_kept(make):
    files, report = make([row(1), row(2)], stems=("in_v-1", "out_v-1"))
    speech = [f"audio/{stem}/v-1_qa_00000{n}_nbi_status.mp3" for stem in ("in_v-1", "out_v-1") for n in (1, 2)]
    frames = [f"frames/v-1/v-1_{100 * n + 4 * i}.jpg" for n in (1, 2) for i in range(8)]
    assert list(files) == speech + frames
    assert {Image.open(files[name]).size for name in frames} == {(62, 54)}
    assert {soundfile.read(files[name])[0].shape for name in speech} == {(2205,)}
    assert "rows: 4\nframes: 16 drawn, 0 kept, for 2 clips\n" in report
    assert "speech: 4 files from 1 texts, 0 kept\n" in report  # one text, spoken once
    before = {name: path.read_bytes() for name, path in files.items()}
    files[frames[0]].write_bytes(b"mine")
    files[frames[1]].unlink()
    files, report = make([row(1), row(2)], stems=("in_v-1", "out_v-1"))
    assert files[frames[0]].read_bytes() == b"mine" and "frames: 1 drawn, 15 kept" in report
    files, _ = make([row(1), row(2)], "--overwrite", stems=("in_v-1", "out_v-1"))
    assert {name: path.read_bytes() for name, path in files.items()} == before
    alone, _ = make([row(2)], place="alone")  # a clip is drawn alike wherever it stands in a file
    other, _ = make([row(2)], "--seed", "1", place="other")
    assert alone[frames[8]].read_bytes() == before[frames[8]] != other[frames[8]].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("audio_format", ["mp3", "wav", "flac", "ogg"])
def test_two_runs_write_the_same_bytes(make, audio_format):
    flags = ("--audio_format", audio_format, "--audio_name", "id", "--frame_name", "number", "--frame_format", "png")
    one, two = (make([row(1)], *flags, place=place)[0] for place in ("one", "two"))
    assert list(one) == [f"audio/a/qa_000001.{audio_format}", *(f"frames/v-1/{n}.png" for n in range(100, 129, 4))]
    assert [path.read_bytes() for path in one.values()] == [path.read_bytes() for path in two.values()]


@pytest.mark.slow
def test_report_counts_the_rows_whose_answers_are_not_visible(make):
    overlapping = row(3)
    overlapping["frames"] = row(1)["frames"][4:] + overlapping["frames"][:4]
    rows = [
        row(1),
        row(1, id="qa_000009", short_answer="no"),  # contradicts the row above
        row(1, id="qa_000010", question_type="scope_motion", short_answer="yes"),
        overlapping,
        row(2, question_type="colour_of_the_wall", short_answer="green"),
        row(2, question_type="lesion_size_range", short_answer="11-20"),
    ]
    files, report = make(rows, "--only", "frames")
    assert not any(name.startswith("audio") for name in files)
    figures = [int(number) for number in re.findall(r"\d+", report)]
    assert figures == [6, 20, 0, 3, 4, 1, 1, 2]  # rows; drawn, kept, clips; hidden: contradict, overlap, unknown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "named"),
    [
        *[("{", "JSON"), ("[1]", "object"), ({"lacks": "all"}, "id, video_id, frames, frame_numbers, question")],
        *[({"frame_numbers": [1]}, "frames and frame_numbers"), ({"frames": "v-1_100"}, "frames and frame_numbers")],
        *[({"question": " "}, "question"), ({"short_answer": 5}, "short_answer"), ({"id": 7}, "7")],
        *[({"id": "../../x"}, "'../../x'"), ({"video_id": "/tmp"}, "'/tmp'")],
    ],
)
def test_a_bad_line_is_named(tmp_path, line, named):
    if isinstance(line, dict):
        line = json.dumps({} if "lacks" in line else row(1, **line))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="^" + re.escape(f"{path}:3: ") + ".*" + re.escape(named)):
        make_media.main(["--data_path", str(path), "--output_dir", str(tmp_path / "media")])
    assert not (tmp_path / "media").exists()


@pytest.mark.slow
def test_what_cannot_be_made_is_refused_before_anything_is(make, tmp_path, capsys):
    rows = [row(1), row(2), row(1, video_id="v-2", question="Is there a tool?")]
    with pytest.raises(SystemExit, match=r"a.jsonl:1 and .*a.jsonl:3 .*qa_000001.mp3.*--audio_name"):
        make(rows, "--audio_name", "id")
    with pytest.raises(SystemExit, match=r"x\.jsonl"):
        make_media.main(["--data_path", str(tmp_path / "x.jsonl")])
    assert not (tmp_path / "media").exists()
    files, _ = make(rows, "--audio_name", "video_id", "--only", "audio")
    assert list(files) == [f"audio/a/{name}.mp3" for name in ("v-1_qa_000001", "v-1_qa_000002", "v-2_qa_000001")]
    for argv in ([], ["--data_path", "x", "--fixtures"], ["--data", "x"], *(
        ["--data_path", "x", "--size", size] for size in ("310", "27x270", "310*270"))):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            make_media.parse_args(argv)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err
    command = [
        sys.executable,
        make_media.__file__,
        "--data_path",
        tmp_path / "a.jsonl",
        "--output_dir",
        tmp_path / "no",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "espeak-ng" in done.stderr and "apt install" in done.stderr and not (tmp_path / "no").exists()


@pytest.mark.slow
@needs_espeak
def test_speech_differs_by_text_voice_and_speed():
    text = "Which way does the camera travel?"
    samples, rate = make_media.speak(text, "en-us", 160)
    assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 22050)
    assert 1.0 < len(samples) / rate < 4.0 and 0.1 < np.abs(samples).max() <= 1.0
    assert np.array_equal(samples, make_media.speak(text, "en-us", 160)[0])
    assert len(make_media.speak(text, "en-us", 240)[0]) < 0.8 * len(samples)
    assert not np.array_equal(samples, make_media.speak(text, "en-gb", 160)[0])
    with pytest.raises(SystemExit, match=r"^espeak-ng could not speak 'Is it on[?]' as xx-none: [^\n]*$"):
        make_media.speak("Is it on?", "xx-none", 160)


# ---------------------------------------------------------------------------------------------- the committed fixtures


def fixture_speech():
    """The speech file of each row of smoke.jsonl, in order."""
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    return [FIXTURES / "audio" / f"{make_media.AUDIO_NAMES[name].format(**row)}.{audio_format}"
            for row, (name, audio_format, _, _) in zip(rows, make_media.FIXTURE_SPEECH, strict=True)]  # fmt: skip


@pytest.mark.slow
def test_the_fixtures_are_what_the_script_makes(tmp_path):
    """Pictures not to the bit: other builds of numpy and libjpeg round some pixels by one or a few levels."""
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    make_media.make_frames(rows[:2], tmp_path / "frames", size=make_media.FIXTURE_SIZE)
    make_media.make_frames(rows[2:], tmp_path / "frames", 0, make_media.FIXTURE_SIZE, "number", "png")
    drawn, held = (
        sorted(path.relative_to(root) for path in root.rglob("*.*"))
        for root in (tmp_path / "frames", FIXTURES / "frames")
    )
    assert drawn == held and [str(path) for path in drawn[7:9]] == ["fx-001/fx-001_1232.jpg", "fx-002/20318.png"]
    for name in drawn:
        one, other = (np.asarray(Image.open(root / "frames" / name), dtype=int) for root in (tmp_path, FIXTURES))
        assert one.shape == other.shape == (196, 224, 3) and np.abs(one - other).mean() < 0.5, name
    version = ["espeak-ng", "--version"]
    if shutil.which(version[0]) and "1.51" in subprocess.run(version, capture_output=True, text=True).stdout:
        make_media.make_fixtures(tmp_path)
        for path in fixture_speech():
            (one, one_rate), (other, rate) = (soundfile.read(f) for f in (tmp_path / "audio" / path.name, path))
            assert (one_rate, one.shape) == (rate, other.shape) and np.abs(one - other).max() < 0.01, path.name


def test_the_fixtures_have_the_real_schema_and_several_forms_and_are_small():
    paths = fixture_speech()
    assert sorted(p.name for p in (FIXTURES / "audio").iterdir()) == sorted(p.name for p in paths)
    infos = [soundfile.info(path) for path in paths]
    assert [(p.name, i.format, i.samplerate, i.channels) for p, i in zip(paths, infos, strict=True)] == [
        ("fx-001_qa_000101_nbi_status.wav", "WAV", 22050, 2),
        ("fx-001_qa_000102_scope_motion_type.mp3", "MP3", 22050, 1),
        ("fx-002_qa_000203.flac", "FLAC", 22050, 1),
        ("fx-002_qa_000101_scope_motion_type.mp3", "MP3", 22050, 1),
        ("qa_000205.ogg", "OGG", 44100, 2),
    ]
    assert all(1.0 < i.duration < 5.0 for i in infos)
    keys = "id video_id frames frame_numbers question question_type support_frames total_frames support_ratio "
    rows = read_jsonl(FIXTURES / "smoke.jsonl")
    assert [list(row) for row in rows] == [[*keys.split(), "support_percentage", "answer", "short_answer"]] * 5
    assert sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file()) < 1_000_000


def test_neither_ear_nor_eye_alone_can_answer_the_fixture_rows():
    rows = read_jsonl(FIXTURES / "smoke.jsonl")
    speech = [soundfile.read(p, always_2d=True)[0].mean(axis=1) for p in fixture_speech()]
    # Rows 0 and 2, and rows 1 and 3, sound the same to the last bit and have different answers: three by ear at most.
    for one, other in ((0, 2), (1, 3)):
        assert np.array_equal(speech[one], speech[other])
        assert rows[one]["question_type"] == rows[other]["question_type"]
        assert rows[one]["short_answer"] != rows[other]["short_answer"]
    # Two clips, and no two rows of a clip with one answer: two by eye at most.
    assert len({tuple(r["frames"]) for r in rows}) == 2 and len({(*r["frames"], r["answer"]) for r in rows}) == 5
    # With row i hearing the speech of row i + 1, whoever answers what is asked is wrong about all five rows.
    answers = {(r["video_id"], r["question"]): r["answer"] for r in rows}
    predicted = [answers[r["video_id"], rows[(i + 1) % 5]["question"]] for i, r in enumerate(rows)]
    assert not any(r["short_answer"] in p.lower() for r, p in zip(rows, predicted, strict=True))
