"""Does a tiny model learn to answer what it hears about what it sees? benchmarks/learnability.py in a minute on a CPU.

Three types of question are asked of the same views, each with two answers, equally often: without eyes half of the
answers are right at best. Of 18 clips 9 are clear (3 for each type), 4 are close-ups and 4 in fluid (3 for the type
that asks of it, 1 for mucosa_visibility), and 1 is dirty: without ears 3 + 3 + 3 + 1 are right at best, word for word.
"""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import learnability as world

# One wording a type, as in the real annotations; theirs are longer.
QUESTIONS = {
    "mucosa_visibility": "Can you clearly observe clean mucosa in these frames?",
    "occlusion_check": "Does a close-up obstruction block the field of view?",
    "fluid_occlusion_level": "How severe is the fluid-based occlusion?",
}
ANSWERS = {
    ("mucosa_visibility", "yes"): "Yes, clean mucosa is visible.",
    ("mucosa_visibility", "no"): "No, clean mucosa is not visible.",
    ("occlusion_check", "yes"): "Yes, a close-up obstruction blocks the view.",
    ("occlusion_check", "no"): "No obstruction blocks the view.",
    ("fluid_occlusion_level", "absent"): "Fluid occlusion is absent.",
    ("fluid_occlusion_level", "complete"): "Fluid occlusion is complete.",
}
pytestmark = pytest.mark.slow
FRAMES, ROWS_OF_ANSWER, STEPS = 2, 16, 300
ROWS = len(ANSWERS) * ROWS_OF_ANSWER
CHANCE = 3 * (0.25 / ROWS) ** 0.5  # three standard deviations of a share of ROWS guesses: 0.15
ARMS = "test-8,test-8-arms0,test-8-arms1"  # mismatched and silent speech, black and shuffled frames


def write_annotations(folder: Path) -> None:
    """The four annotation files that the benchmark reads, alike but for the names of their clips."""
    for split, name in world.SPLITS.items():
        rows = [
            {
                "id": "qa", "video_id": f"{split}-{kind}-{short}-{i}",
                "frames": [f"{split}-{kind}-{short}-{i}_{frame}" for frame in range(FRAMES)],
                "question": QUESTIONS[kind], "question_type": kind, "answer": answer, "short_answer": short,
            }
            for (kind, short), answer in ANSWERS.items()
            for i in range(ROWS_OF_ANSWER)
        ]  # fmt: skip
        world.write_jsonl(folder / f"{name}.jsonl", rows)


def generator(text: str) -> np.random.Generator:
    """A generator that the text alone decides."""
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))


def babble(question: str, voice: str, speed: int) -> np.ndarray:
    """A sound in place of a spoken question, float32 at world.SPEECH_RATE: eight tones and hisses, which the question
    decides, in the pitch and with the breath of the voice. A clean machine has no espeak-ng, and this runs on each."""
    words, mouth = generator(question), generator(voice)
    pitch, breath = mouth.uniform(0.85, 1.2), mouth.uniform(0.001, 0.004)
    n = round(0.08 * 150 / speed * world.SPEECH_RATE)
    time = np.arange(n) / world.SPEECH_RATE
    bursts = [
        loudness * np.hanning(n) * (mouth.normal(0, 0.5, n) if hisses else np.sin(2 * np.pi * pitch * tone * time))
        for tone, loudness, hisses in zip(
            words.uniform(200, 2000, 8), words.uniform(0.2, 0.5, 8), words.random(8) < 0.3, strict=True
        )
    ]
    return (np.concatenate(bursts) + mouth.normal(0, breath, 8 * n)).astype(np.float32)


def write_speech(folder: Path) -> None:
    """Every question in every voice at every speed that the benchmark names."""
    for voices, speeds in ((world.VOICES, world.SPEEDS), (world.HELD_OUT_VOICES, world.HELD_OUT_SPEEDS)):
        for name, sound in (
            (world.speech_name(question, voice, speed), babble(question, voice, speed))
            for question in QUESTIONS.values()
            for voice in voices
            for speed in speeds
        ):
            world.media.save(folder / f"{name}.ogg", world.media.encode(sound, world.SPEECH_RATE, "ogg"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of the benchmark for the tiny model, its annotations and its speech being there."""
    folder = tmp_path_factory.mktemp("learning")
    write_annotations(folder / "data")
    write_speech(folder / "speech")
    flags = {
        "data_dir": folder / "data", "speech_dir": folder / "speech", "work_dir": folder / "work",
        "report": folder / "docs" / "LEARNABILITY.md", "variants": "tiny", "types": ",".join(QUESTIONS),
        "size": "64x64", "scale": 0.4, "max_steps": STEPS, "only": ARMS, "jobs": 2,
    }  # fmt: skip
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def results(warm, flags):
    """The folder with the figures, after rendering, training and evaluating by one command: a minute on two cores."""
    command = [warm, world.__file__, "--stage", "render,train,evaluate", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    folder = world.parse_args(["--stage", "evaluate", *flags]).out_dir
    logs = "".join(path.read_text()[-2000:] for path in folder.rglob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    for label in ARMS.split(","):
        assert f"tiny-{label}: exit status 0" in done.stdout, done.stdout + logs
    return folder


def strict(results: Path, label: str) -> dict[str, float]:
    """Arm -> share of the answers that are right word for word; an answer to another question never is."""
    arms = json.loads((results / "answers" / f"tiny-{label}.summary.json").read_text())["arms"]
    assert all(arm["metrics"]["strict"]["n"] == ROWS and arm["n_errors"] == 0 for arm in arms.values())
    return {name: arm["metrics"]["strict"]["accuracy"] for name, arm in arms.items()}


def test_a_tiny_model_learns_to_answer_by_ear_and_eye(results):
    """New clips, new voices. Always the commonest answer is right half of the time."""
    summary = json.loads((results / "answers" / "tiny-test-8.summary.json").read_text())
    assert summary["discriminative"]["baselines"]["train_majority"] == 0.5
    assert summary["n_total"] == summary["discriminative"]["n"] == ROWS
    assert summary["metrics"]["choice"]["accuracy"] >= summary["metrics"]["strict"]["accuracy"] >= 0.75
    heard, seen = strict(results, "test-8-arms0"), strict(results, "test-8-arms1")
    assert heard["audio"] == seen["audio"] == summary["metrics"]["strict"]["accuracy"]
    assert heard["mismatched_audio"] <= 0.05
    assert heard["silent_audio"] <= 10 / 18 + CHANCE
    assert seen["black_frames"] <= 1 / 2 + CHANCE


def test_every_answer_stops_by_itself(results):
    finish = json.loads((results / "answers" / "tiny-test-8.summary.json").read_text())["finish"]
    assert (finish["eos"], finish["loops"]) == (ROWS, 0)


def test_what_hearing_costs_is_printed(results, flags, capsys):
    """Speed, the arms on hearing, the verdict."""
    world.hearing(world.parse_args(["--stage", "hearing", *flags]))
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(f"| `tiny` | 0 | {STEPS * 16} | ") and line.count(f" of {ROWS} |") == 3 for line in lines
    )
    assert any(line.startswith("`tiny`: Of ") and "Does it hear? Yes: " in line for line in lines)


def test_the_report_tells_it(results, flags, monkeypatch):
    """All but the picture, which needs matplotlib."""
    drawn = []
    monkeypatch.setattr(world, "draw_curves", lambda runs, path: drawn.append((list(runs), path)))
    args = world.parse_args(["--stage", "evaluate", *flags])
    world.report(args)
    assert drawn == [(["tiny"], args.report.with_name(world.CURVES.name))]
    lines = args.report.read_text().splitlines()
    assert any(line.startswith("| `tiny` | ") and f" | {STEPS} | {STEPS * 16} | " in line for line in lines)
    assert f"Answers that stopped by themselves: {ROWS} of {ROWS}: 100.0 (96.2 - 100.0)." in "\n".join(lines)
    for arm in ("audio", "mismatched_audio", "silent_audio", "black_frames", "shuffled_frames"):
        assert any(line.startswith(f"| `{arm}` | ") for line in lines)
