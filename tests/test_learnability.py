"""Does the drawn world of benchmarks/learnability.py show the answers, and nothing else that would give them away?
test_learning.py runs all of it."""

import json
import sys

import numpy as np
import pytest

from benchmarks import learnability as world

pytestmark = pytest.mark.slow
media, N = world.media, world.N_FRAMES
STEP, FOLD_STEP = world.LESION_TRAVEL / (N - 1), world.FOLD_TRAVEL / (N - 1)  # of the circle, a frame
DRIFTS = tuple(media.DRIFT_XY)


def paths(drift, count=2000):
    """Lesion paths on the whole screen as places on their two circles, 0 to 1; [count, frames, 2]."""
    rng = np.random.default_rng(DRIFTS.index(drift))
    low, high = world.ROAM
    drawn = [world.lesion_path(drift, (world.ROAM, world.ROAM), N, False, rng) for _ in range(count)]
    return (np.array(drawn) - low) / (high - low)


def assert_uniform(places):
    """In each frame ten bins hold a tenth each; places [count, frames]."""
    for frame in range(N):
        shares = np.histogram(places[:, frame], bins=10, range=(0, 1))[0] / len(places)
        np.testing.assert_allclose(shares, 0.1, atol=0.03)  # 4.5 standard deviations of 0.0067


def row(question_type, short_answer, name="clip", **more):
    """A row as `clip_of` wants it."""
    frames = [f"{name}_{i}" for i in range(N)]
    return {"question_type": question_type, "short_answer": short_answer, "frames": frames, **more}


def asked(*rows):
    return [{"id": f"q{n}", "video_id": "v", "question": "NBI?", "answer": "Yes.", **r} for n, r in enumerate(rows)]


@pytest.mark.parametrize("drift", DRIFTS)
def test_only_the_order_of_frames_tells_a_drift(drift):
    """One step of the circle a frame, the right way; along the other axis there and back. No single frame tells it, and
    sorted round the circle the places are equal steps from a uniform start."""
    for axis, direction in enumerate(media.DRIFT_XY[drift]):
        places = paths(drift)[:, :, axis]
        assert_uniform(places)
        around = ((np.diff(places, axis=1) + 0.5) % 1 - 0.5) / STEP  # the short way round, in steps
        if direction:
            np.testing.assert_allclose(around, direction, atol=1e-6)
        else:
            ways = {tuple(np.round(way).astype(int)) for way in around}
            there = {(2, 2, 2, 1, -2, -2, -2), (2, 2, 2, -1, -2, -2, -2)}
            assert ways == there | {tuple(-step for step in way) for way in there}
        for path in places[:50]:
            gaps = np.diff(np.sort(path), append=np.sort(path)[0] + 1)
            np.testing.assert_allclose(np.sort(gaps)[:-1], STEP, atol=1e-9)


def test_only_the_order_of_frames_tells_the_motion_of_the_scope():
    """The one direction run backwards is the other, and a scope at rest draws the same bowel."""
    for motion in ("advancing", "withdrawing", "none"):
        rng = np.random.default_rng(len(motion))
        assert_uniform(np.array([world.Bowel.flow(motion, N, False, 0.7, rng) for _ in range(2000)]) % 1)
    advancing, withdrawing, still = (
        world.Bowel(media.Scene(scope_motion=motion), 60, 60, N, False, np.random.default_rng(3))
        for motion in ("advancing", "withdrawing", "none")
    )
    np.testing.assert_allclose(np.diff(advancing.fold), FOLD_STEP)
    np.testing.assert_allclose(withdrawing.fold, advancing.fold[::-1])
    assert np.abs(advancing.draw(0) - advancing.draw(N - 1)).mean() > 5
    np.testing.assert_array_equal(still.draw(0), still.draw(N - 1))


def test_an_answer_changes_its_own_pixels_only_and_names_and_seed_draw_a_clip():
    for seed in range(3):
        left, right = (world.clip_of(row("lesion_motion_direction", d, f"c{seed}"), 0) for d in ("left", "right"))
        rng = np.random.default_rng(media.clip_seed(0, row("", "", f"c{seed}")["frames"]))
        scene = media.scene_for("lesion_motion_direction", "left", rng)
        reach = world.LESION_SCALE * media.LESION_RADIUS[scene.lesion_size] * (min(world.SIZE) + 2 * world.PAD) + 2
        for one, other in zip(left, right, strict=True):
            assert (one != other).any(axis=-1).sum() <= 2 * np.pi * reach**2  # two discs
        assert (left[-1] != right[-1]).any()
        assert left.shape == (N, world.SIZE[1], world.SIZE[0], 3) and left.dtype == np.uint8
        np.testing.assert_array_equal(left, world.clip_of(row("lesion_motion_direction", "left", f"c{seed}"), 0))
        assert (left != world.clip_of(row("lesion_motion_direction", "left", f"c{seed}"), 1)).any()
    for quadrant in media.CHOICES["quadrant"]:  # a lesion whose quadrant is asked for stays in it
        spans = world.lesion_spans(media.Scene(lesion=True, quadrant=quadrant), roams=False)
        for drift in DRIFTS:
            path = world.lesion_path(drift, spans, N, False, np.random.default_rng(0))
            assert ((path[:, 0] > 0.5) == quadrant.endswith("right")).all()
            assert ((path[:, 1] > 0.5) == quadrant.startswith("lower")).all()


def test_training_and_test_share_no_clip_and_no_voice_and_practice_is_not_tested():
    rows = asked(*[row("nbi_status", "yes")] * 40)
    train, test = (world.derive(rows, split, {("nbi_status", "yes"): 3}, 0) for split in ("train", "test"))
    assert len(train) == len(test) == 120 and len({r["video_id"] for r in (*train, *test)}) == 240
    heard = [{r["id"].split("_")[1] for r in part} for part in (train, test)]
    assert heard[0] <= set(world.VOICES) and heard[1] <= set(world.HELD_OUT_VOICES) and not heard[0] & heard[1]
    assert 30 < sum(r["practice"] for r in train) < 90 and not any("practice" in r for r in test)


def test_training_clips_are_asked_more_and_once_in_reversed_order():
    """The rows that share a clip are true in its scene; reversed frames turn the motion, and ids tell rows apart."""
    kinds = ("lesion_motion_direction", "scope_motion_type", "lesion_screen_position", "lesion_site", "nbi_status")
    rows = asked(*(row(kind, answer, id=f"{kind}-{answer}") for kind in kinds for answer in media.REQUIREMENTS[kind]))
    derived = world.derive(rows, "train", dict.fromkeys(((r["question_type"], r["short_answer"]) for r in rows), 5), 0)
    assert len({(r["video_id"], r["id"], r["question_type"]) for r in derived}) == len(derived)
    own, turned = {r["video_id"]: r for r in derived if not r.get("shares")}, 0
    assert len(own) == 5 * len(rows) and len(derived) > 2 * len(own)
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
    assert turned == 5 * (5 + 2)


@pytest.fixture
def args(tmp_path):
    """Makes the arguments of the benchmark, all folders being the test's own."""
    folders = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    return lambda stage, *more: world.parse_args(["--stage", stage, *folders, *map(str, more)])


def test_clips_of_another_world_and_evaluations_that_are_not_there_are_refused(args, tmp_path):
    files = {"train": [row("nbi_status", "yes")]}
    for _ in range(2):
        world.refuse_other_world(args("render"), files)
    for more, of in ((("--seed", 1), files), (("--size", "64x64"), files), ((), {"train": [row("nbi_status", "no")]})):
        with pytest.raises(SystemExit, match="another world"):
            world.refuse_other_world(args("render", *more), of)
    (tmp_path / "runs/full").mkdir(parents=True)
    (tmp_path / "runs/full/config.json").touch()
    folders = [f"--{name}={tmp_path}" for name in ("data_dir", "speech_dir", "work_dir")]
    with pytest.raises(SystemExit, match="--only test-9"):
        world.main(["--stage", "evaluate", *folders, "--variants", "full", "--only", "test-8,test-9"])


def program(status):
    """The command of a program that ends with `status`; below 0: that waits for a signal."""
    return [sys.executable, "-c", f"import sys, time; sys.exit({status}) if {status} >= 0 else time.sleep(60)"]


@pytest.mark.parametrize(
    ("status", "saved", "fails"),
    [
        (-15, True, False),  # --train_seconds ended it before it took signals; an earlier call had saved
        (143, True, False),
        (143, False, True),  # nothing to resume from
        (1, True, True),
    ],
)
def test_a_training_goes_on_from_its_checkpoint_and_leaves_no_older_answers(
    status, saved, fails, args, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"question": "NBI?", "answer": "Yes."}) + "\n")
    answers, checkpoint = tmp_path / "results" / "answers", tmp_path / "runs" / "tiny" / "checkpoint-20"
    answers.mkdir(parents=True)
    for name in ("images-test-8.jsonl", "tiny_naive_pad-test-8.jsonl", "tiny-test-8.jsonl", "tiny-test-8.summary.json"):
        (answers / name).write_text("{}")
    if saved:
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": []}))
        training = {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
        (checkpoint / "vqa_settings.json").write_text(json.dumps({"training": training}))
    arguments = args("train", "--variants", "tiny", "--train_seconds", 0 if status < 0 else 60)
    assert ("--resume_from_checkpoint" in world.train_command(arguments, "tiny", 0)) == saved
    monkeypatch.setattr(world, "train_command", lambda *_: program(status))
    assert world.train(arguments) == [f"training tiny (exit status {status})"] * fails
    assert json.loads((tmp_path / "results" / "train_tiny.json").read_text())["status"] == status
    assert sorted(path.name for path in answers.iterdir()) == ["images-test-8.jsonl", "tiny_naive_pad-test-8.jsonl"]
