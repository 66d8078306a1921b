"""Do the drawings show the answers, and do names, folders, refusals and reports of make_media.py hold?"""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import make_media
import numpy as np
import pytest
import soundfile
from make_media import Scene, draw_clip, draw_frame, scene_for, scene_for_rows
from PIL import Image

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SIZE = (155, 135)

ANSWERS = {
    "blue_dye_presence": {"yes", "no"},
    "endoscope_visibility": {"yes", "no"},
    "fluid_occlusion_level": {"absent", "complete"},
    "flush_action": {"yes", "no"},
    "lesion_histology_extended": {"adenoma", "hyperplastic"},
    "lesion_motion_direction": {"left", "right", "up", "down", "stable"},
    "lesion_screen_position": {"upper-left", "upper-right", "lower-left", "lower-right"},
    "lesion_site": {"ascending", "descending", "rectum", "sigma"},
    "lesion_size_range": {"<5", "5-10", ">10"},
    "lighting_mode": {"NBI", "WL"},
    "mucosa_visibility": {"yes", "no"},
    "nbi_status": {"yes", "no"},
    "occlusion_check": {"yes", "no"},
    "scope_backward_motion": {"yes", "no"},
    "scope_forward_motion": {"yes", "no"},
    "scope_motion": {"yes", "no"},
    "scope_motion_type": {"advancing", "withdrawing"},
    "scope_outside": {"yes", "no"},
    "tool_catheter_check": {"yes", "no"},
    "tool_identification": {"catheter", "forceps", "snare"},
}
EVERY_ANSWER = [(kind, answer) for kind, answers in ANSWERS.items() for answer in sorted(answers)]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixels(scene: Scene, t: float = 0.0, seed: int = 0) -> np.ndarray:
    """One frame of `scene` as float64 [H, W, 3]; the same flicker for the same seed."""
    return np.asarray(draw_frame(scene, t, SIZE, generator(seed)), dtype=np.float64)


def footprint(scene: Scene, without: Scene, t: float = 0.0) -> np.ndarray:
    """Where two scenes differ clearly; bool [H, W]."""
    return np.abs(pixels(scene, t) - pixels(without, t)).max(axis=2) > 20


def lesion_centre(scene: Scene, t: float) -> tuple[float, float]:
    """Where the lesion is drawn, as fractions of width and height."""
    y, x = np.nonzero(footprint(scene, replace(scene, lesion=False), t))
    return x.mean() / SIZE[0], y.mean() / SIZE[1]


def row(n: int = 1, **changes) -> dict:
    """A row of the schema, with the keys that make_media.py reads."""
    numbers = [100 * n + 4 * i for i in range(8)]
    base = {
        "id": f"qa_{n:06d}",
        "video_id": "v-1",
        "frames": [f"v-1_{number}" for number in numbers],
        "frame_numbers": numbers,
        "question": "Is the narrow band light on?",
        "question_type": "nbi_status",
        "short_answer": "yes",
    }
    return base | changes


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def fake_speech(monkeypatch):
    """Speech without espeak-ng: a tone whose pitch depends on the text. Lists the texts that were spoken."""
    spoken = []

    def tone(text: str, voice: str, speed: int) -> tuple[np.ndarray, int]:
        spoken.append(text)
        return np.sin(np.arange(2205) * (0.05 + 0.001 * len(text))).astype(np.float32), 22050

    monkeypatch.setattr(make_media, "speak", tone)
    monkeypatch.setattr(make_media, "require_espeak", lambda: None)
    return spoken


# ---------------------------------------------------------------- scenes


def test_the_twenty_question_types_and_their_answers():
    assert {kind: set(answers) for kind, answers in make_media.REQUIREMENTS.items()} == ANSWERS


@pytest.mark.parametrize(("kind", "answer"), EVERY_ANSWER)
def test_a_scene_holds_what_its_answer_needs(kind, answer):
    for seed in range(20):
        scene = asdict(scene_for(kind, answer, generator(seed)))
        for name, values in make_media.requirements(kind, answer).items():
            assert scene[name] in values


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_answer_changes_nothing_else_in_a_scene(kind):
    """No cue but the answer itself: what the question is not about is the same for each of its answers."""
    for seed in range(20):
        rest = []
        for answer in ANSWERS[kind]:
            scene = asdict(scene_for(kind, answer, generator(seed)))
            rest.append({k: v for k, v in scene.items() if k not in make_media.requirements(kind, answer)})
        shared = set.intersection(*(set(r) for r in rest))
        assert all({k: r[k] for k in shared} == {k: rest[0][k] for k in shared} for r in rest)


def test_distractors_are_drawn():
    scenes = [scene_for("nbi_status", "yes", generator(seed)) for seed in range(200)]
    assert {scene.tool for scene in scenes} == {"none", "catheter", "forceps", "snare"}
    assert {scene.scope_motion for scene in scenes} == {"none", "advancing", "withdrawing"}
    assert 90 < sum(scene.lesion for scene in scenes) < 150  # 60 % of 200


def test_an_unknown_type_gets_a_neutral_scene():
    scene, visible = scene_for_rows([("colour_of_the_wall", "green")], generator())
    assert (scene.view, visible) == ("clear", [False])


def test_rows_that_agree_are_all_shown():
    asked = [("tool_catheter_check", "no"), ("nbi_status", "yes"), ("tool_identification", "snare")]
    scene, visible = scene_for_rows(asked, generator())
    assert (scene.tool, scene.lighting, visible) == ("snare", "NBI", [True, True, True])


def test_a_row_that_contradicts_an_earlier_one_is_left_out_whole():
    asked = [("nbi_status", "yes"), ("scope_outside", "yes"), ("scope_motion", "yes"), ("scope_motion", "no")]
    scene, visible = scene_for_rows(asked, generator())
    assert (scene.view, scene.lighting, visible) == ("clear", "NBI", [True, False, True, False])
    assert scene.scope_motion in ("advancing", "withdrawing")


# ---------------------------------------------------------------- drawings


@pytest.mark.parametrize(("kind", "answer"), EVERY_ANSWER)
def test_the_same_seed_draws_the_same_bytes(kind, answer):
    first, again, other = (draw_clip(scene_for(kind, answer, generator(s)), 3, SIZE, generator(s)) for s in (1, 1, 2))
    assert [image.size for image in first] == [SIZE] * 3
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert first[0].tobytes() != other[0].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_light_is_reddish_or_blue_green(seed):
    red, green, blue = pixels(scene_for("nbi_status", "no", generator(seed))).mean(axis=(0, 1))
    assert red > 1.3 * green and red > 1.3 * blue
    red, green, blue = pixels(scene_for("nbi_status", "yes", generator(seed))).mean(axis=(0, 1))
    assert green > 1.5 * red and blue > 1.5 * red


@pytest.mark.parametrize("size", ["<5", "5-10", ">10"])
@pytest.mark.parametrize("drift", sorted(ANSWERS["lesion_motion_direction"]))
@pytest.mark.parametrize("quadrant", sorted(ANSWERS["lesion_screen_position"]))
def test_the_lesion_keeps_to_its_quadrant_and_drifts_its_way(quadrant, drift, size):
    scene = Scene(lesion=True, quadrant=quadrant, drift=drift, lesion_size=size, detail=len(quadrant + drift + size))
    first, last = lesion_centre(scene, 0), lesion_centre(scene, 1)
    for x, y in (first, last):
        assert ("lower" if y > 0.5 else "upper") + ("-right" if x > 0.5 else "-left") == quadrant
    # 0.14 of the width or height over the clip, to within two of 135 pixels
    expected = {"left": (-0.14, 0), "right": (0.14, 0), "up": (0, -0.14), "down": (0, 0.14), "stable": (0, 0)}
    assert np.subtract(last, first) == pytest.approx(expected[drift], abs=0.015)


def test_nothing_hides_the_lesion():
    alone = Scene(lesion=True, lesion_size="<5")
    crowded = replace(alone, tool="forceps", endoscope_body=True, blue_dye=True, flush=True)
    shown = footprint(alone, replace(alone, lesion=False))
    y, x = np.nonzero(shown)
    assert shown.sum() > 150  # a disc of 0.06 * 135 = 8 pixels' radius has 206
    assert np.array_equal(pixels(alone)[y, x], pixels(crowded)[y, x])


def test_lesion_sizes_differ_in_area():
    areas = []
    for size in ("<5", "5-10", ">10"):
        scene = Scene(lesion=True, lesion_size=size)
        areas.append(footprint(scene, replace(scene, lesion=False)).sum())
    assert areas[1] > 1.7 * areas[0] and areas[2] > 1.5 * areas[1]


@pytest.mark.parametrize("lighting", ["WL", "NBI"])
def test_histology_is_pale_or_dark(lighting):
    mean = {}
    for histology in ("hyperplastic", "adenoma"):
        scene = Scene(lesion=True, histology=histology, lighting=lighting)
        mean[histology] = pixels(scene)[footprint(scene, replace(scene, lesion=False))].mean()
    mucosa = pixels(Scene(lighting=lighting)).mean()
    assert mean["adenoma"] < 0.8 * mucosa and mean["hyperplastic"] > 1.3 * mucosa


@pytest.mark.parametrize("site", sorted(ANSWERS["lesion_site"]))
def test_fold_rings_grow_shrink_or_stay(site):
    """Brightness falls behind an outward-moving edge: correlate its change with its radial gradient."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]] - np.array([SIZE[1], SIZE[0]])[:, None, None] / 2
    change = {}
    for motion in ("advancing", "withdrawing", "none"):
        scene = Scene(site=site, scope_motion=motion, detail=3)
        frames = [pixels(scene, t).mean(axis=2) for t in (0, 1 / 7)]
        down, right = np.gradient(frames[0])
        outward = (x * right + y * down) / np.hypot(x, y).clip(1)
        change[motion] = (frames[1] - frames[0]).ravel(), outward.ravel()
    assert np.corrcoef(*change["advancing"])[0, 1] < -0.4
    assert np.corrcoef(*change["withdrawing"])[0, 1] > 0.4
    assert np.abs(change["none"][0]).max() == 0


def test_sites_have_folds_of_different_shape():
    sites = [pixels(Scene(site=site)).mean(axis=2).ravel() for site in sorted(ANSWERS["lesion_site"])]
    alike = np.corrcoef(sites) - np.eye(4)
    assert alike.max() < 0.9


@pytest.mark.parametrize("lighting", ["WL", "NBI"])
def test_dye_is_the_only_deep_blue(lighting):
    def blue_share(scene: Scene) -> float:
        red, green, blue = np.moveaxis(pixels(scene), 2, 0)
        return ((blue > 1.6 * green) & (blue > 1.6 * red)).mean()

    assert blue_share(Scene(lighting=lighting, blue_dye=True)) > 0.05
    assert blue_share(Scene(lighting=lighting, tool="catheter", lesion=True, flush=True, endoscope_body=True)) < 0.02


def test_endoscope_body_is_a_large_dark_tube():
    body = footprint(Scene(endoscope_body=True), Scene())
    assert body.mean() > 0.04
    assert np.median(pixels(Scene(endoscope_body=True))[body]) < 40


def test_flush_is_a_bright_jet_whose_droplets_move():
    scene = Scene(flush=True)
    jet = footprint(scene, Scene())
    assert jet.mean() > 0.04
    assert pixels(scene)[jet].mean() > 1.3 * pixels(Scene())[jet].mean()
    assert np.abs(pixels(scene, seed=1) - pixels(scene, seed=2)).max() > 50


def test_tools_differ_in_shape():
    shapes = {tool: footprint(Scene(tool=tool), Scene()) for tool in ("catheter", "forceps", "snare")}
    for tool, shape in shapes.items():
        assert shape.mean() > 0.02
        for other in shapes.keys() - {tool}:
            # Loop, jaws and thick shaft stand where the other tools have nothing.
            assert (shape & ~shapes[other]).mean() > 0.008


def test_views_without_clean_mucosa():
    def looks(view: str) -> tuple[float, float, float]:
        """Red over blue, edge strength, share of brown residue."""
        image = pixels(Scene(view=view))
        brown = (np.abs(image - (95, 62, 22)).max(axis=2) < 5).mean()
        return image[..., 0].mean() / image[..., 2].mean(), np.abs(np.diff(image.mean(axis=2))).mean(), brown

    clear, fluid, closeup, dirty, outside = map(looks, ("clear", "fluid", "closeup", "dirty", "outside"))
    assert clear[0] > 1.5 and clear[1] > 2 and clear[2] == 0
    assert fluid[0] > 2.3 and fluid[1] < clear[1] / 2  # yellow, without folds
    assert 1.3 < closeup[0] < 2.3 and closeup[1] < clear[1] / 2  # pink, without folds
    assert dirty[2] > 0.4
    assert outside[0] < 1.1  # no tissue


# ---------------------------------------------------------------- names, folders, refusals, report


def test_names_and_folders(tmp_path, fake_speech, capsys):
    data = [write_rows(tmp_path / f"{stem}.jsonl", [row(1), row(2)]) for stem in ("in_v-1", "out_v-1")]
    make_media.main(["--data_path", *map(str, data), "--output_dir", str(tmp_path / "media"), "--size", "62x54"])
    made = sorted(str(p.relative_to(tmp_path / "media")) for p in (tmp_path / "media").rglob("*") if p.is_file())
    assert made == [
        "audio/in_v-1/v-1_qa_000001_nbi_status.mp3",
        "audio/in_v-1/v-1_qa_000002_nbi_status.mp3",
        "audio/out_v-1/v-1_qa_000001_nbi_status.mp3",
        "audio/out_v-1/v-1_qa_000002_nbi_status.mp3",
        *(f"frames/v-1/v-1_{n}.jpg" for n in (100, 104, 108, 112, 116, 120, 124, 128)),
        *(f"frames/v-1/v-1_{n}.jpg" for n in (200, 204, 208, 212, 216, 220, 224, 228)),
    ]
    assert Image.open(tmp_path / "media/frames/v-1/v-1_100.jpg").size == (62, 54)
    assert fake_speech == ["Is the narrow band light on?"]  # one text, spoken once for four files
    assert capsys.readouterr().out == (
        "rows: 4\n"
        "frames: 16 drawn, 0 kept, for 2 clips\n"
        "answers not visible, or not in every frame: 0 rows\n"
        "  0 contradict another row on the same frames\n"
        "  0 share some frames with a clip drawn before\n"
        "  0 have a question type or answer that cannot be drawn\n"
        "speech: 4 files from 1 texts, 0 kept\n"
    )


@pytest.mark.parametrize("audio_format", ["mp3", "wav", "flac", "ogg"])
def test_two_runs_write_the_same_bytes(tmp_path, fake_speech, audio_format):
    data = write_rows(tmp_path / "a.jsonl", [row(1)])
    for out in ("one", "two"):
        command = ["--data_path", str(data), "--output_dir", str(tmp_path / out), "--size", "62x54", "--seed", "7"]
        command += ["--audio_format", audio_format, "--audio_name", "id", "--frame_name", "number"]
        make_media.main([*command, "--frame_format", "png"])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).rglob("*.*")} for out in ("one", "two"))
    assert sorted(one) == sorted([f"{n}.png" for n in range(100, 129, 4)] + [f"qa_000001.{audio_format}"])
    assert one == two
    samples, rate = soundfile.read(io.BytesIO(one[f"qa_000001.{audio_format}"]))
    assert (samples.shape, rate) == ((2205,), 22050)


def test_a_clip_is_drawn_alike_wherever_it_stands_in_a_file(tmp_path):
    make_media.make_frames([row(1), row(2)], tmp_path / "a", size=(62, 54))
    make_media.make_frames([row(2)], tmp_path / "b", size=(62, 54))
    make_media.make_frames([row(2)], tmp_path / "c", size=(62, 54), seed=1)
    a, b, c = ((tmp_path / folder / "v-1/v-1_200.jpg").read_bytes() for folder in "abc")
    assert a == b != c


def test_files_that_exist_are_kept_unless_overwrite(tmp_path, fake_speech, capsys):
    command = ["--data_path", str(write_rows(tmp_path / "a.jsonl", [row(1)])), "--output_dir", str(tmp_path)]
    command += ["--size", "62x54"]
    make_media.main(command)
    frame, speech = tmp_path / "frames/v-1/v-1_100.jpg", tmp_path / "audio/a/v-1_qa_000001_nbi_status.mp3"
    made = frame.read_bytes(), speech.read_bytes()
    frame.write_bytes(b"mine")
    (tmp_path / "frames/v-1/v-1_104.jpg").unlink()
    speech.write_bytes(b"mine")
    capsys.readouterr()
    make_media.main(command)
    assert (frame.read_bytes(), speech.read_bytes()) == (b"mine", b"mine")
    out = capsys.readouterr().out
    assert "frames: 1 drawn, 7 kept, for 1 clips\n" in out and "speech: 0 files from 0 texts, 1 kept\n" in out
    make_media.main([*command, "--overwrite"])
    assert (frame.read_bytes(), speech.read_bytes()) == made


def test_report_counts_the_rows_whose_answers_are_not_visible(tmp_path, capsys):
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
    data = write_rows(tmp_path / "a.jsonl", rows)
    make_media.main(["--data_path", str(data), "--output_dir", str(tmp_path), "--size", "62x54", "--only", "frames"])
    assert capsys.readouterr().out == (
        "rows: 6\n"
        "frames: 20 drawn, 0 kept, for 3 clips\n"
        "answers not visible, or not in every frame: 4 rows\n"
        "  1 contradict another row on the same frames\n"
        "  1 share some frames with a clip drawn before\n"
        "  2 have a question type or answer that cannot be drawn\n"
    )
    assert not (tmp_path / "audio").exists()


def test_one_file_cannot_speak_two_questions(tmp_path, fake_speech):
    data = write_rows(tmp_path / "a.jsonl", [row(1), row(2), row(1, video_id="v-2", question="Is there a tool?")])
    command = ["--data_path", str(data), "--output_dir", str(tmp_path / "media"), "--size", "62x54"]
    with pytest.raises(SystemExit) as stop:
        make_media.main([*command, "--audio_name", "id"])
    assert stop.value.code == (
        f"{data}:1 and {data}:3 ask different questions, and qa_000001.mp3 would have to serve both: "
        "use a longer --audio_name"
    )
    assert not (tmp_path / "media").exists()
    make_media.main([*command, "--audio_name", "video_id", "--only", "audio"])
    assert sorted(p.name for p in (tmp_path / "media/audio/a").iterdir()) == [
        "v-1_qa_000001.mp3",
        "v-1_qa_000002.mp3",
        "v-2_qa_000001.mp3",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "not a JSON object"),
        ("{}", "lacks id, video_id, frames, frame_numbers, question, question_type, short_answer"),
        (json.dumps(row(1, frame_numbers=[1])), "frames and frame_numbers are not lists of one length"),
        (json.dumps(row(1, frames="v-1_100")), "frames and frame_numbers are not lists of one length"),
        (json.dumps(row(1, question=" ")), "question is not a text"),
        (json.dumps(row(1, short_answer=5)), "short_answer is not a text"),
        (json.dumps(row(1, id="../../x")), "'../../x' cannot be part of a file name"),
        (json.dumps(row(1, video_id="/tmp")), "'/tmp' cannot be part of a file name"),
        (json.dumps(row(1, id=7)), "7 cannot be part of a file name"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="^" + re.escape(f"{path}:3: {message}") + "$"):
        make_media.read_rows([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match="^" + re.escape(f"{tmp_path / 'x.jsonl'}: no such file") + "$"):
        make_media.read_rows([tmp_path / "x.jsonl"])


@pytest.mark.parametrize("argv", [[], ["--data_path", "x.jsonl", "--fixtures"], ["--data", "x.jsonl"]])
def test_flags_that_make_no_sense_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        make_media.parse_args(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("size", ["310", "27x270", "310*270"])
def test_a_bad_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        make_media.parse_args(["--data_path", "x.jsonl", "--size", size])
    assert f"argument --size: {size!r} is not WIDTHxHEIGHT with both at least 28" in capsys.readouterr().err


def test_without_espeak_one_line_says_how_to_get_it(tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [row(1)])
    command = [sys.executable, make_media.__file__, "--data_path", str(data), "--output_dir", str(tmp_path / "media")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "espeak-ng is not installed: `apt install espeak-ng` (Debian, Ubuntu) or `brew install espeak-ng` (macOS)\n"
    )
    assert not (tmp_path / "media").exists()


# ---------------------------------------------------------------- speech

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")


@needs_espeak
def test_speech_differs_by_text_voice_and_speed():
    text = "Which way does the camera travel?"
    samples, rate = make_media.speak(text, "en-us", 160)
    assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 22050)
    assert 1.0 < len(samples) / rate < 4.0 and 0.1 < np.abs(samples).max() <= 1.0
    assert np.array_equal(samples, make_media.speak(text, "en-us", 160)[0])
    assert len(make_media.speak(text, "en-us", 240)[0]) < 0.8 * len(samples)
    assert not np.array_equal(samples, make_media.speak(text, "en-gb", 160)[0])


@needs_espeak
def test_an_unknown_voice_is_an_error_of_one_line():
    with pytest.raises(SystemExit) as stop:
        make_media.speak("Is it on?", "xx-none", 160)
    assert stop.value.code.startswith("espeak-ng could not speak 'Is it on?' as xx-none: ")
    assert "\n" not in stop.value.code


# ---------------------------------------------------------------- the committed fixtures


def fixture_speech_paths() -> list[Path]:
    """The speech file of each row of smoke.jsonl, in order."""
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    return [
        FIXTURES / "audio" / f"{make_media.AUDIO_NAMES[name].format(**r)}.{audio_format}"
        for r, (name, audio_format, _, _) in zip(rows, make_media.FIXTURE_SPEECH, strict=True)
    ]


def test_fixture_frames_are_what_the_script_draws(tmp_path):
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    make_media.make_frames(rows[:2], tmp_path, size=make_media.FIXTURE_SIZE)
    make_media.make_frames(rows[2:], tmp_path, 0, make_media.FIXTURE_SIZE, "number", "png")
    drawn = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert drawn == sorted(p.relative_to(FIXTURES / "frames") for p in (FIXTURES / "frames").rglob("*.*"))
    assert [str(p) for p in drawn[7:9]] == ["fx-001/fx-001_1232.jpg", "fx-002/20318.png"]
    for name in drawn:
        fresh, committed = (np.asarray(Image.open(root / name), dtype=int) for root in (tmp_path, FIXTURES / "frames"))
        assert fresh.shape == committed.shape == (196, 224, 3)
        # Not to the bit: other builds of numpy and libjpeg round some pixels by one or a few levels.
        assert np.abs(fresh - committed).mean() < 0.5, name


@needs_espeak
def test_fixture_speech_is_what_the_script_speaks(tmp_path):
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    if "1.51" not in version:
        pytest.skip(f"the fixtures were spoken by espeak-ng 1.51, this is {version.split(':')[1].split()[0]}")
    make_media.make_fixtures(tmp_path)
    for path in fixture_speech_paths():
        (fresh, fresh_rate), (committed, rate) = (soundfile.read(f) for f in (tmp_path / "audio" / path.name, path))
        assert (fresh_rate, fresh.shape) == (rate, committed.shape)
        assert np.abs(fresh - committed).max() < 0.01, path.name


def test_fixture_speech_comes_in_four_formats_three_namings_two_rates():
    paths = fixture_speech_paths()
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


def test_neither_ear_nor_eye_alone_can_answer_the_fixture_rows():
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    speech = [soundfile.read(p, always_2d=True)[0].mean(axis=1) for p in fixture_speech_paths()]
    # Rows 0 and 2, and rows 1 and 3, sound the same to the last bit and have different answers: three by ear at most.
    for one, other in ((0, 2), (1, 3)):
        assert np.array_equal(speech[one], speech[other])
        assert rows[one]["question_type"] == rows[other]["question_type"]
        assert rows[one]["short_answer"] != rows[other]["short_answer"]
    # Two clips, and no two rows of a clip with one answer: two by eye at most.
    assert len({tuple(r["frames"]) for r in rows}) == 2
    assert len({(tuple(r["frames"]), r["answer"]) for r in rows}) == 5


def test_exchanged_fixture_speech_asks_for_another_answer():
    """With row i hearing the speech of row i + 1, whoever answers what is asked is wrong about all five rows."""
    rows = make_media.read_rows([FIXTURES / "smoke.jsonl"])
    answers = {(r["video_id"], r["question"]): r["answer"] for r in rows}
    heard = [rows[(i + 1) % 5]["question"] for i in range(5)]
    predicted = [answers[r["video_id"], question] for r, question in zip(rows, heard, strict=True)]
    assert predicted == [
        "The scope is primarily advancing.",
        "Yes, NBI light is on in these frames.",
        "The scope is primarily withdrawing.",
        "Forceps are visible on screen.",
        "No, WL light is on instead.",
    ]
    assert [r["short_answer"] for r in rows] == ["yes", "advancing", "no", "withdrawing", "forceps"]
    assert not any(r["short_answer"] in p.lower() for r, p in zip(rows, predicted, strict=True))


def test_fixtures_have_the_real_schema_and_are_small():
    lines = (FIXTURES / "smoke.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    for line in lines:
        assert list(json.loads(line)) == [
            "id", "video_id", "frames", "frame_numbers", "question", "question_type", "support_frames", "total_frames",
            "support_ratio", "support_percentage", "answer", "short_answer",
        ]  # fmt: skip
    assert sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file()) < 1_000_000
