"""Does the drawn world of benchmarks/learnability.py show the answers, and nothing else that would give them away?"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import learnability as world
import make_media as media

import evaluate_checkpoint as ev
import train_vqa as vqa

N = world.N_FRAMES
STEP, FOLD_STEP = world.LESION_TRAVEL / (N - 1), world.FOLD_TRAVEL / (N - 1)  # of the circle, a frame
DRIFTS = tuple(media.DRIFT_XY)


def paths(drift: str, count: int = 2000) -> np.ndarray:
    """Lesion paths on the whole screen as places on their two circles, 0 to 1; [count, frames, 2]."""
    rng = np.random.default_rng(DRIFTS.index(drift))
    low, high = world.ROAM
    drawn = [world.lesion_path(drift, (world.ROAM, world.ROAM), N, False, rng) for _ in range(count)]
    return (np.array(drawn) - low) / (high - low)


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_lesion_steps_along_its_drift_and_sways_across(drift):
    """One step of the circle a frame, the right way; along the other axis there and back, ending where it began."""
    for axis, direction in enumerate(media.DRIFT_XY[drift]):
        steps = np.diff(paths(drift, 100)[:, :, axis], axis=1)
        around = ((steps + 0.5) % 1 - 0.5) / STEP  # the short way round, in steps
        if direction:
            np.testing.assert_allclose(around, direction, atol=1e-6)
        else:
            ways = {tuple(np.round(row).astype(int)) for row in around}
            assert ways == {(2, 2, 2, 1, -2, -2, -2), (-2, -2, -2, -1, 2, 2, 2),
                            (2, 2, 2, -1, -2, -2, -2), (-2, -2, -2, 1, 2, 2, 2)}  # fmt: skip


@pytest.mark.parametrize("n", (2, 3, 5, 6, 8, 16))
def test_a_sway_visits_every_place_once(n):
    """So that the places of a drift and of a sway are the same set."""
    assert sorted(world.swaying(n, np.random.default_rng(n))) == list(range(n))


def test_no_single_frame_tells_a_drift():
    """In each frame the place is uniform on its circle, whatever the drift: ten bins hold a tenth each."""
    for drift in DRIFTS:
        places = paths(drift)
        for frame in range(N):
            for axis in range(2):
                shares = np.histogram(places[:, frame, axis], bins=10, range=(0, 1))[0] / len(places)
                np.testing.assert_allclose(shares, 0.1, atol=0.03)  # 4.5 standard deviations of 0.0067


def test_the_set_of_places_is_the_same_for_every_drift():
    """Frames out of order tell nothing: sorted round the circle, the places are equal steps from a uniform start."""
    for drift in DRIFTS:
        for path in paths(drift, 50):
            for axis in range(2):
                gaps = np.diff(np.sort(path[:, axis]), append=np.sort(path[:, axis])[0] + 1)
                np.testing.assert_allclose(np.sort(gaps)[:-1], STEP, atol=1e-9)


@pytest.mark.parametrize("quadrant", media.CHOICES["quadrant"])
def test_a_lesion_whose_quadrant_is_asked_for_stays_in_it(quadrant):
    """Its middle never crosses the middle of the frame, wherever it drifts."""
    down, right = quadrant.split("-")
    scene = media.Scene(lesion=True, quadrant=quadrant)
    for drift in DRIFTS:
        path = world.lesion_path(drift, world.lesion_spans(scene, roams=False), N, False, np.random.default_rng(0))
        assert ((path[:, 0] > 0.5) == (right == "right")).all()
        assert ((path[:, 1] > 0.5) == (down == "lower")).all()


def row(question_type: str, short_answer: str, name: str = "clip") -> dict:
    """A row as `clip_of` wants it."""
    return {"question_type": question_type, "short_answer": short_answer, "frames": [f"{name}_{i}" for i in range(N)]}


def test_folds_flow_the_other_way_when_the_scope_withdraws():
    """The same bowel, one step of its circle a frame: the one direction run backwards is the other."""
    advancing, withdrawing, still = (
        world.Bowel(media.Scene(scope_motion=motion), 60, 60, N, False, np.random.default_rng(3))
        for motion in ("advancing", "withdrawing", "none")
    )
    np.testing.assert_allclose(np.diff(advancing.fold), FOLD_STEP)
    np.testing.assert_allclose(withdrawing.fold, advancing.fold[::-1])
    assert np.abs(advancing.draw(0) - advancing.draw(N - 1)).mean() > 5
    np.testing.assert_array_equal(still.draw(0), still.draw(N - 1))
    radius = [np.hypot(advancing.u, advancing.v)[bowel_is_dark(advancing, i)].mean() for i in (0, N - 1)]
    assert (radius[1] > radius[0]) == (np.floor(advancing.fold[0]) == np.floor(advancing.fold[-1]))


def bowel_is_dark(bowel, frame: int) -> np.ndarray:
    """Where the middle of the dark fold whose place is known stands, bool [h, w]."""
    return np.abs(bowel.log_radius - (bowel.fold[frame] % 1 - 1)) < 0.03


def test_no_single_frame_tells_the_motion_of_the_scope():
    """In each frame the place of the folds is uniform on its circle, whether it moves or how."""
    for motion in ("advancing", "withdrawing", "none"):
        rng = np.random.default_rng(len(motion))
        places = np.array([world.Bowel.flow(motion, N, False, 0.7, rng) for _ in range(2000)]) % 1
        for frame in range(N):
            shares = np.histogram(places[:, frame], bins=10, range=(0, 1))[0] / len(places)
            np.testing.assert_allclose(shares, 0.1, atol=0.03)


def test_practice_passes_no_end_of_the_circle_and_is_never_tested():
    """A lesion keeps going one way across the frame, a fold too; training alone has such clips, about half."""
    rng = np.random.default_rng(0)
    for drift in DRIFTS:
        for _ in range(200):
            path = world.lesion_path(drift, ((0, 1), (0, 1)), N, True, rng)
            for axis, direction in enumerate(media.DRIFT_XY[drift]):
                if direction:
                    np.testing.assert_allclose(np.diff(path[:, axis]), direction * STEP)
    for motion, direction in (("advancing", 1), ("withdrawing", -1)):
        folds = world.Bowel.flow(motion, N, True, 0.7, rng)
        np.testing.assert_allclose(np.diff(folds), direction * FOLD_STEP)
        assert folds.min() >= 0 and folds.max() <= 0.7
    rows = [{**row("nbi_status", "yes"), "id": "q", "video_id": "v", "question": "NBI?", "answer": "Yes."}]
    train, test = (world.derive(rows, split, {("nbi_status", "yes"): 400}, 0) for split in ("train", "test"))
    assert 150 < sum(r["practice"] for r in train) < 250
    assert not any("practice" in r for r in test)


def test_an_answer_changes_its_own_pixels_only():
    """The clips of two drifts with the same names differ where the lesion is or was, and nowhere else."""
    for seed in range(6):
        left, right = (world.clip_of(row("lesion_motion_direction", d, f"c{seed}"), 0) for d in ("left", "right"))
        rng = np.random.default_rng(media.clip_seed(0, row("", "", f"c{seed}")["frames"]))
        scene = media.scene_for("lesion_motion_direction", "left", rng)
        reach = world.LESION_SCALE * media.LESION_RADIUS[scene.lesion_size] * (min(world.SIZE) + 2 * world.PAD) + 2
        for one, other in zip(left, right, strict=True):
            changed = (one != other).any(axis=-1).sum()
            assert changed <= 2 * np.pi * reach**2  # two discs
        assert (left[-1] != right[-1]).any()


def test_training_and_test_share_no_clip_and_no_voice():
    """Names, which seed the drawings, and voices are apart, whatever the rows."""
    rows = [{**row("nbi_status", "yes"), "id": f"q{i}", "video_id": "v", "question": "NBI?", "answer": "Yes."}
            for i in range(40)]  # fmt: skip
    repeats = {("nbi_status", "yes"): 3}
    train, test = (world.derive(rows, split, repeats, 0) for split in ("train", "test"))
    assert len(train) == len(test) == 120  # none of these questions is one of SHARED
    assert len({r["video_id"] for r in (*train, *test)}) == 240
    voice_of = lambda r: r["id"].split("_")[1]  # noqa: E731
    assert {voice_of(r) for r in train} <= set(world.VOICES)
    assert {voice_of(r) for r in test} <= set(world.HELD_OUT_VOICES)
    assert not set(world.VOICES) & set(world.HELD_OUT_VOICES)


def test_training_clips_are_asked_more_and_once_in_reversed_order():
    """The rows that share a clip are true in its scene; reversed frames turn the motion, and ids tell rows apart."""
    kinds = ("lesion_motion_direction", "scope_motion_type", "lesion_screen_position", "lesion_site", "nbi_status")
    place, way = "lesion_screen_position", "lesion_motion_direction"
    rows = [{**row(kind, answer), "id": f"{kind}-{answer}", "video_id": "v", "question": f"{kind}?", "answer": answer}
            for kind in kinds for answer in media.REQUIREMENTS[kind]]  # fmt: skip
    derived = world.derive(rows, "train", dict.fromkeys(((r["question_type"], r["short_answer"]) for r in rows), 5), 0)
    assert len({(r["video_id"], r["id"], r["question_type"]) for r in derived}) == len(derived)
    own = {r["video_id"]: r for r in derived if not r.get("shares")}
    turned = 0
    assert len(own) == 5 * len(rows) and len(derived) > 2 * len(own)
    assert {r["question_type"] for r in derived if r.get("shares")} == {*kinds} - {"nbi_status"}
    for shared in (r for r in derived if r.get("shares")):
        first = own[shared["video_id"]]
        scene, _, _ = world.scene_of(first, 0)
        if shared["frames"] == first["frames"][::-1]:
            scene = world.reversed_scene(scene)
            if first["question_type"] in ("lesion_motion_direction", "scope_motion_type"):
                assert shared["question_type"] == first["question_type"]
                assert shared["short_answer"] == world.REVERSED[first["short_answer"]]
                turned += 1
        else:
            assert shared["frames"] == first["frames"] and shared["question_type"] != first["question_type"]
        needs = media.REQUIREMENTS[shared["question_type"]][shared["short_answer"]]
        assert all(getattr(scene, name) in values for name, values in needs.items())
        # A lesion keeps to its quadrant in the clips that were drawn for that, and roams in the others.
        assert shared["question_type"] != (way if first["question_type"] == place else place)
    assert turned == 5 * (5 + 2)


@pytest.mark.parametrize("practice", (True, False, None))
def test_only_clips_that_say_so_are_drawn_as_practice(practice, monkeypatch):
    """Rows of the test do not say so."""
    drawn, way = set(), world.way

    def noting(direction, travel, n, as_practice, room, rng):
        drawn.add(as_practice)
        return way(direction, travel, n, as_practice, room, rng)

    monkeypatch.setattr(world, "way", noting)
    world.clip_of(row("lesion_motion_direction", "left") | ({} if practice is None else {"practice": practice}), 0)
    assert drawn == {bool(practice)}


def test_clips_of_another_world_are_not_kept(tmp_path, monkeypatch):
    """The same flags go on with what is there; others, or other code, are refused."""
    files = {"train": [row("nbi_status", "yes")]}
    flags = ["--stage", "render", "--data_dir", "d", "--speech_dir", "s", "--work_dir", str(tmp_path)]
    world.refuse_other_world(world.parse_args(flags), files)
    world.refuse_other_world(world.parse_args(flags), files)
    for other, of in (
        (["--seed", "1"], files),
        (["--size", "64x64"], files),
        ([], {"train": [row("nbi_status", "no")]}),
    ):
        with pytest.raises(SystemExit, match="holds clips of another world"):
            world.refuse_other_world(world.parse_args([*flags, *other]), of)
    changed = tmp_path / "code.py"
    changed.write_text("")
    monkeypatch.setattr(media, "__file__", str(changed))
    with pytest.raises(SystemExit, match="holds clips of another world"):
        world.refuse_other_world(world.parse_args(flags), files)


def test_six_frames_in_eight_places_are_those_that_evaluation_takes():
    row = {"id": "a", "frames": [f"f{i}" for i in range(8)]}
    filled = world.in_eight_places(row)
    assert filled["frames"] == ["f0", "f1", "f2", "f2", "f4", "f5", "f6", "f6"] and filled["id"] == "a"
    evaluated = vqa.select_frames(row["frames"], 6)
    assert sorted(set(filled["frames"])) == evaluated


def test_answers_of_a_type_get_equal_shares_of_its_clips():
    """Three rows of one answer and one of another: the one is drawn three times as often."""
    rows = [row("nbi_status", answer) for answer in ("yes", "yes", "yes", "no")]
    scale = 24 / world.CLIPS_OF_TYPE["nbi_status"]
    assert world.repeats_for(rows, scale) == {("nbi_status", "yes"): 4, ("nbi_status", "no"): 12}


def test_the_same_names_draw_the_same_clip():
    """A clip depends on the seed and its frame names alone, and differs with either."""
    clip = world.clip_of(row("tool_identification", "snare"), 0)
    np.testing.assert_array_equal(clip, world.clip_of(row("tool_identification", "snare"), 0))
    assert clip.shape == (N, world.SIZE[1], world.SIZE[0], 3) and clip.dtype == np.uint8
    assert (clip != world.clip_of(row("tool_identification", "snare"), 1)).any()
    assert (clip != world.clip_of(row("tool_identification", "snare", "other"), 0)).any()


def test_a_report_without_matplotlib_is_refused_before_any_stage(tmp_path, monkeypatch, capsys):
    """Naming the package and how to get it; hours of training would otherwise end in a traceback."""
    monkeypatch.setattr(world.importlib.util, "find_spec", lambda name: None)
    flags = ["--data_dir", tmp_path / "no", "--speech_dir", tmp_path / "no", "--work_dir", tmp_path / "work"]
    with pytest.raises(SystemExit) as stop:
        world.main(["--stage", "render,report", *map(str, flags)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(
        "--stage report needs matplotlib for the curves; `pip install matplotlib`, or leave report out"
    )
    assert not (tmp_path / "work").exists()


def test_evaluations_that_are_not_there_are_refused(tmp_path):
    """A misspelt one would otherwise leave its figure out without a word."""
    folder = tmp_path / "work" / "runs" / "full"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    flags = ["--stage", "evaluate", "--data_dir", "no", "--speech_dir", "no", "--work_dir", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as stop:
        world.main([*flags, "--variants", "full", "--only", "test-8,test-9"])
    assert str(stop.value) == "--only test-9: there are test-8, test-6"


def test_a_later_training_remembers_the_earlier_ones(tmp_path):
    """Steps, rates and losses of both are in the report's figures, in their order; the first began from nothing."""
    for name, steps, rate in (("first", 40, 1e-3), ("second", 60, 5e-4)):
        log = [{"step": steps, "loss": steps / 100}, {"step": steps, "train_runtime": steps / 10}]
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": log}))
        training = {"per_device_train_batch_size": 128, "learning_rate": rate}
        (folder / "vqa_settings.json").write_text(json.dumps({"training": training}))
    first = world.parts_of(tmp_path / "first" / "images")
    expected = {"steps": 40, "batch": 128, "learning_rate": 1e-3, "seconds": 4.0, "losses": [(40, 0.4)]}
    assert first == [expected]
    (tmp_path / "second" / "images" / "earlier.json").write_text(json.dumps(first))
    parts = world.parts_of(tmp_path / "second" / "images")
    assert [part["steps"] for part in parts] == [40, 60] and parts[1]["losses"] == [(60, 0.6)]
    settings = {"training": {**training, "resume_from_checkpoint": True}}
    assert world.part_of({"global_step": 60, "log_history": log}, settings)["seconds"] is None  # of its last session


def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path):
    folders = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    args = world.parse_args(["--stage", "train", *folders])
    assert "--resume_from_checkpoint" not in world.train_command(args, "images", 0)
    (tmp_path / "runs" / "images" / "checkpoint-20").mkdir(parents=True)
    command = world.train_command(args, "images", 0)
    assert command[command.index("--resume_from_checkpoint") + 1] == "True"
    assert "--resume_from_checkpoint" not in world.train_command(args, "video", 0)


def write_question(folder: Path) -> None:
    """The question file of a training."""
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(json.dumps({"question": "NBI?", "answer": "Yes."}) + "\n")


def write_checkpoint(folder: Path) -> None:
    """What a training of the variant tiny leaves after step 20, as far as it is read."""
    checkpoint = folder / "runs" / "tiny" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (folder / "runs" / "tiny" / "checkpoint-40").mkdir()  # the machine went down while this one was written
    (checkpoint / "manifest.json").touch()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": []}))
    training = {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
    (checkpoint / "vqa_settings.json").write_text(json.dumps({"training": training}))


def program(status: int) -> list[str]:
    """The command of a program that ends with `status`; below 0: that waits for a signal."""
    return [sys.executable, "-c", f"import sys, time; sys.exit({status}) if {status} >= 0 else time.sleep(60)"]


def test_answers_do_not_outlive_the_weights_that_gave_them(tmp_path, monkeypatch, capsys):
    """A training that goes on leaves no answer for `evaluate` to keep; other variants' answers stay."""
    write_question(tmp_path)
    write_checkpoint(tmp_path)
    answers = tmp_path / "results" / "answers"
    answers.mkdir(parents=True)
    kept = ["images-test-8.summary.json", "tiny_naive_pad-test-8.jsonl"]
    for name in (*kept, "tiny-test-8.jsonl", "tiny-test-8.summary.json"):
        (answers / name).write_text("{}")
    monkeypatch.setattr(world, "train_command", lambda *_: program(0))
    folders = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    world.train(world.parse_args(["--stage", "train", "--variants", "tiny", *folders]))
    assert sorted(path.name for path in answers.iterdir()) == kept
    assert "tiny: 2 files of answers removed, given before its weights are trained on\n" in capsys.readouterr().out


@pytest.mark.parametrize("report_ends", [False, True])
def test_what_failed_is_named_at_the_end_and_keeps_nothing_from_running(report_ends, tmp_path, monkeypatch, capsys):
    """Also where the report ends the script, as it does when no training has left figures."""
    write_question(tmp_path)
    trainings = {"tiny": program(3), "tiny_naive_pad": program(0)}
    evaluations = {"tiny-test-8": program(2), "tiny-test-6": program(0), "tiny-eval-8": program(1)}

    def report(args):
        print("reported")
        if report_ends:
            raise SystemExit("no figures")

    monkeypatch.setattr(world, "train_command", lambda args, name, workers: trainings[name])
    monkeypatch.setattr(world, "evaluations", lambda args: evaluations)
    monkeypatch.setattr(world, "report", report)
    monkeypatch.setattr(world.importlib.util, "find_spec", lambda name: True)
    flags = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    flags += ["--stage", "train,evaluate,report", "--variants", "tiny,tiny_naive_pad", "--jobs", "1"]
    with pytest.raises(SystemExit) as stop:
        world.main(flags)
    assert stop.value.code == ("no figures" if report_ends else 1)
    told = capsys.readouterr()
    assert "tiny_naive_pad: exit status 0\n" in told.out and "tiny-test-6: exit status 0\n" in told.out
    assert "reported\n" in told.out
    assert told.err == (
        f"error: failed: training tiny (exit status 3), evaluation tiny_naive_pad (no model in {tmp_path / 'runs'}/"
        "tiny_naive_pad), evaluation tiny-test-8 (exit status 2), evaluation tiny-eval-8 (exit status 1); "
        f"see the logs in {tmp_path / 'results'} and its folder answers\n"
    )


@pytest.mark.parametrize(
    ("status", "saved", "fails"),
    [
        (-15, True, False),  # --train_seconds ended it before it took signals; an earlier call had saved
        (143, True, False),
        (-15, False, True),  # nothing to go on from
        (143, False, True),
        (1, True, True),
    ],
)
def test_a_stopped_training_has_not_failed_if_there_is_something_to_go_on_from(
    status, saved, fails, tmp_path, monkeypatch
):
    write_question(tmp_path)
    if saved:
        write_checkpoint(tmp_path)
    monkeypatch.setattr(world, "train_command", lambda *_: program(status))
    flags = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    flags += ["--train_seconds", "0" if status < 0 else "60"]
    failed = world.train(world.parse_args(["--stage", "train", "--variants", "tiny", *flags]))
    assert failed == [f"training tiny (exit status {status})"] * fails
    assert json.loads((tmp_path / "results" / "train_tiny.json").read_text())["status"] == status


def test_going_on_needs_a_model_of_each_variant(tmp_path, capsys):
    """And its command names that model in place of one to draw."""
    flags = [
        "--stage",
        "train",
        "--data_dir",
        str(tmp_path),
        "--speech_dir",
        str(tmp_path),
        "--start_dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit):
        world.parse_args([*flags, "--variants", "video"])
    assert "has no trained model video; leave video out of --variants" in capsys.readouterr().err
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "trainer_state.json").write_text("{}")
    command = world.train_command(world.parse_args([*flags, "--variants", "video"]), "video", 1)
    assert command[command.index("--model_name_or_path") + 1] == str(tmp_path / "video")
    assert "--init" not in command
    command = world.train_command(world.parse_args([*flags[:-2], "--variants", "video"]), "video", 1)
    assert command[command.index("--init") + 1] == "random"


class Judged:
    """Stands for `Answers`: `shares` is the accuracy of each type, of 50 rows each."""

    def __init__(self, eos: int = 1000, loops: int = 0, **shares: float):
        self.shares, self.discriminative, self.rows = shares, list(shares), range(1000)
        self.counts = {"eos": eos, "loops": loops}

    def choice(self, types=None) -> dict:
        share = float(np.mean([self.shares[kind] for kind in types or self.shares if kind in self.shares]))
        return {"accuracy": share, "ci95": (share - 0.03, share + 0.03), "n": 50}

    def line(self, name: str) -> float:
        return {"train_majority": 0.42}[name]

    def chance(self, types) -> float:
        return 0.5

    def finish_counts(self) -> dict:
        return self.counts

    def finish(self) -> str:
        return f"{self.counts['eos']} of 1000"


def judged(direction: float, still: float) -> Judged:
    """An arm whose directions of motion and other types are right so often."""
    return Judged(**dict.fromkeys(world.DIRECTIONS, direction), nbi_status=still)


@pytest.mark.parametrize(
    ("arm", "figures", "met"),
    [
        ("audio", (0.95, 0.96), [True, True]),
        ("audio", (0.74, 0.96), [False, False]),  # 0.784 in all
        ("silent_audio", (0.5, 0.55), [True]),
        ("silent_audio", (0.53, 0.53), [False]),  # the majority line is 0.42
        ("black_frames", (0.53, 0.53), [False]),
        ("mismatched_audio", (0.88, 0.88), [True]),
        ("mismatched_audio", (0.92, 0.92), [False]),  # the intervals meet
        ("shuffled_frames", (0.59, 0.92), [True]),
        ("shuffled_frames", (0.61, 0.96), [False]),  # chance is 0.5
        ("shuffled_frames", (0.59, 0.90), [False]),
    ],
)
def test_an_aim_is_met_or_missed_by_its_own_measure(arm, figures, met):
    arms = {"audio": judged(0.95, 0.96), arm: judged(*figures)}
    aims = world.aims_of_arms(arms)
    of_arm = aims[:2] if arm == "audio" else aims[2:]
    assert [aim[2] for aim in of_arm] == met and all(arm == "audio" or f"`{arm}`" in aim[0] for aim in of_arm)


@pytest.mark.parametrize(("eos", "loops", "met"), [(1000, 0, True), (990, 0, True), (989, 0, False), (1000, 1, False)])
def test_one_loop_or_more_than_one_in_a_hundred_cut_off_misses_the_aim(eos, loops, met):
    assert world.stops_by_itself("it", Judged(eos, loops)) == ("it", f"{eos} of 1000, {loops} loop", met)


def test_every_question_file_and_arm_is_evaluated(tmp_path):
    (tmp_path / "runs" / "images").mkdir(parents=True)
    (tmp_path / "runs" / "images" / "config.json").write_text("{}")
    folders = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    commands = world.evaluations(world.parse_args(["--stage", "evaluate", *folders]))
    asked = {label: Path(c[c.index("--eval_data_path") + 1]).stem for label, c in commands.items()}
    assert asked == {
        **{f"images-test-{kind}": "test" for kind in ("8", "6", "8-arms0", "8-arms1", "8-arms2")},
        **{f"images-{split}-8": split for split in ("six", "eval", "other", "same")},
    }
    frames = {label: c[c.index("--max_eval_frames") + 1] for label, c in commands.items()}
    assert [label for label, count in frames.items() if count == "6"] == ["images-test-6"]


def test_a_row_without_an_answer_is_wrong(tmp_path):
    """Two questions, one answered: the report's accuracy is a half, not one of one."""
    rows = [{**row("nbi_status", "yes", name), "id": name, "video_id": name, "question": "NBI?", "answer": "Yes."}
            for name in ("a", "b")]  # fmt: skip
    summary = {"discriminative": {"types": ["nbi_status"], "baselines": {}}}
    answered = ev.answer_row(rows[0], "Yes.", finish_reason="eos", n_tokens=2, input_mode="audio", audio_file="a.wav")
    for name, text in (
        ("data/test.jsonl", "".join(json.dumps(r) + "\n" for r in rows)),
        ("answers/images-test-8.jsonl", json.dumps(answered) + "\n"),
        ("answers/images-test-8.summary.json", json.dumps(summary)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    answers = world.Answers(argparse.Namespace(out_dir=tmp_path), "images-test-8", "test")
    assert (answers.choice()["n"], answers.choice()["accuracy"]) == (2, 0.5)
