"""Does it learn? Train a small model from random weights, on the real annotations and on drawn frames.

    python benchmarks/learnability.py --stage speech --data_dir realcolon_vqa --speech_dir speech     # needs espeak-ng
    python benchmarks/learnability.py --stage render,train,evaluate,report --data_dir realcolon_vqa \\
        --speech_dir speech --work_dir /tmp/learnability

Each row of the annotations gets its own drawn clip. The clip shows the row's answer; everything else in it is drawn
independently of the answer. Many voices speak the questions. `train_vqa.py` trains and `evaluate_checkpoint.py` scores,
with the same commands that a user types. Each stage keeps the results that exist and continues from them. If a training
or an evaluation fails, the others still run; the failure is named at the end, and the exit status is 1.

speech     speaks every question in every voice: a few hundred files, which can be copied to other machines
render     draws the clips and writes the question files
train      trains the variants (--variants), all at the same time
evaluate   lets every variant answer the test rows, in all arms
hearing    prints what the variants that were evaluated score by the arms on hearing, and their speed
report     writes docs/LEARNABILITY.md and its curves from the figures in --work_dir/results

On a CPU, a tiny model learns three types in minutes (tests/test_learning.py does this in one, without annotations):

    python benchmarks/learnability.py --stage render,train,evaluate --data_dir realcolon_vqa --speech_dir speech \\
        --work_dir /tmp/tiny --types mucosa_visibility,occlusion_check,fluid_occlusion_level --size 64x64 --scale 0.4 \\
        --variants tiny,tiny_naive_pad --max_steps 300 --only test-8,test-8-arms0,test-8-arms1
"""

import argparse
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import ChainMap, Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import make_media as media  # noqa: E402
import make_tiny_models as tiny  # noqa: E402

STAGES = ("speech", "render", "train", "evaluate", "hearing", "report")

# ---------------------------------------------------------------- drawing
# Lengths are fractions of the frame's width or height unless said otherwise.

SIZE = (128, 96)  # pixels, multiples of the 32 that a token covers
N_FRAMES = 8

# Motion runs on a circle: what leaves at one end enters at the other. The position in any one frame is uniform on the
# circle for every direction, so no single frame shows the direction. Below are the shares of their circles that the
# folds and a lesion travel in a clip (from one half on, the two directions could not be told apart):
FOLD_TRAVEL, LESION_TRAVEL = 0.25, 0.33
# Practice clips, only in training, do not pass the circle's ends. In them, what moves right tends to begin on the left,
# so a single frame shows something of the direction, and a model with random weights gets a first gradient to follow.
# From the other clips it must learn to compare frames, and the test has only such clips.
PRACTICE = 0.5  # share of the training clips
# A lesion's circle along one axis is the span it stays in. If the question asks for its quadrant, it stays in that.
ROAM = (0.1, 0.9)
QUADRANT_SPAN = {"left": (0.1, 0.4), "upper": (0.1, 0.4), "right": (0.6, 0.9), "lower": (0.6, 0.9)}
LESION_SCALE = 1.6  # how much larger lesions are than make_media's: these frames are small
FOLD_PERIOD = 2.4  # in log radius, with one dark and one pale fold; a clip zooms by exp(0.25 * 2.4) = 1.8
FOLD_SPAN = (-0.95, -0.25)  # where a dark fold is clearly visible, in periods of log radius
PAD = 4  # pixels around the frame, for the camera's shake


def swaying(n: int, rng: np.random.Generator) -> np.ndarray:
    """An order of 0 .. n - 1, int [n], forth and back in double steps, as a lesion sways with the breath: it ends next
    to its start. The four such orders (from either end, in either direction) are equally likely."""
    order = np.array([*range(0, n, 2), *range(n - 1 - n % 2, 0, -2)])
    order = order if rng.random() < 0.5 else n - 1 - order
    return order if rng.random() < 0.5 else order[::-1]


def way(direction: int, travel: float, n: int, practice: bool, room: float, rng: np.random.Generator) -> np.ndarray:
    """Positions on a circle of circumference 1 in n frames, float [n], in equal steps.

    Args:
        direction: 1 or -1, or 0 for swaying forth and back over the same positions.
        travel: share of the circle that the n frames cover.
        practice: stay within 0 to `room`, with a uniform start there; otherwise the start is anywhere.
    """
    start = rng.random() * (room - travel if practice else 1)
    order = np.arange(n)[::direction] if direction else swaying(n, rng)
    return start + travel / max(n - 1, 1) * order


def lesion_path(
    drift: str, spans: Sequence[tuple[float, float]], n: int, practice: bool, rng: np.random.Generator
) -> np.ndarray:
    """Positions (x, y) of a lesion in n frames, float [n, 2].

    Along each axis they are n equal steps on the circle of that axis, LESION_TRAVEL of it in total, from a random
    start. Along the axis of the drift they are in the order of time, along the other (both, if stable) they sway forth
    and back. So every drift has the same distribution of positions, in each frame and as a set; only the order shows
    the drift.
    """
    path = np.empty((n, 2))
    for axis, (low, high) in enumerate(spans):
        place = way(media.DRIFT_XY[drift][axis], LESION_TRAVEL, n, practice, 1.0, rng)
        path[:, axis] = low + (high - low) * (place % 1.0)
    return path


def lesion_spans(scene: media.Scene, roams: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """The spans in x and y that the lesion stays in."""
    down, right = scene.quadrant.split("-")
    return (ROAM, ROAM) if roams else (QUADRANT_SPAN[right], QUADRANT_SPAN[down])


class Bowel:
    """Mucosa, folds and texture of one clip in white light, drawn by numpy on a canvas of w x h pixels.

    The folds and the texture move along log radius with the scope, on a circle of two periods (half-moon folds change
    sides from one period to the next).
    """

    def __init__(self, scene: media.Scene, w: int, h: int, n: int, practice: bool, rng: np.random.Generator):
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        centre = 0.5 + rng.uniform(-0.08, 0.08, 2)
        self.u, self.v = (x - centre[0] * w) / min(w, h), (y - centre[1] * h) / min(w, h)
        angle = np.arctan2(self.v, self.u)
        self.radius = media._fold_radius(scene.site, self.u, self.v) * (
            1 + 0.04 * np.sin(3 * angle + rng.uniform(0, 6))
        )
        self.log_radius = np.log(np.maximum(self.radius, 0) + 0.02) / FOLD_PERIOD
        self.column = ((angle / (2 * math.pi) % 1.0) * 48).astype(int) % 48
        coarse = rng.standard_normal((12, 24)).repeat(4, axis=0).repeat(2, axis=1)
        self.texture = (0.09 * coarse + 0.06 * rng.standard_normal((48, 48))).astype(np.float32)
        self.site = scene.site
        self.colour = np.float32(media.MUCOSA_RGB) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
        self.light = rng.uniform(-0.25, 0.25, 2)
        low, high = FOLD_SPAN
        self.fold = low + rng.integers(2) + self.flow(scene.scope_motion, n, practice, high - low, rng)

    @staticmethod
    def flow(motion: str, n: int, practice: bool, room: float, rng: np.random.Generator) -> np.ndarray:
        """Positions of a dark fold on its circle in n frames, in periods of log radius; float [n]."""
        direction = {"none": 0, "advancing": 1, "withdrawing": -1}[motion]
        places = way(direction, FOLD_TRAVEL, n, practice, room, rng)
        return places[:1].repeat(n) if motion == "none" else places

    def draw(self, frame: int) -> np.ndarray:
        """The bowel in a frame; float32 [h, w, 3], 0 to 255."""
        ring = self.log_radius - self.fold[frame] + 0.5
        turn = ring % 1.0
        dark = np.exp(-(((turn - 0.5) / 0.09) ** 2))
        pale = np.exp(-((np.minimum(turn, 1 - turn) / 0.06) ** 2))
        if self.site == "rectum":
            side = np.where(np.floor(ring) % 2 == 0, 1.0, -1.0)
            dark = dark / (1 + np.exp(-side * self.u / 0.04))
        grain = self.texture[((ring % 2.0) * 24).astype(int) % 48, self.column]
        light = 0.25 + 0.75 * np.clip(self.radius / 0.3, 0, 1) ** 0.8
        light = light * (1 + self.light[0] * self.u + self.light[1] * self.v)
        shade = light * (1 - 0.65 * dark) * (1 + 0.45 * pale) * (1 + grain)
        return self.colour * shade[..., None].astype(np.float32)


def draw_clip(
    scene: media.Scene, roams: bool, practice: bool, n: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """n frames of a clip, uint8 [n, h, w, 3]; `rng` decides everything that the scene leaves open."""
    w, h = size[0] + 2 * PAD, size[1] + 2 * PAD
    # Each purpose has its own generator, so that the draws for one do not change another.
    detail = [int(seed) for seed in rng.integers(2**32, size=6)]  # a layer draws the same in every frame
    folds, drift, camera, drops = rng.spawn(4)
    bowel = Bowel(scene, w, h, n, practice, folds)
    path = lesion_path(scene.drift, lesion_spans(scene, roams), n, practice, drift)
    cast, gain, gamma = camera.uniform(0.9, 1.1, 3), camera.uniform(0.75, 1.2), camera.uniform(0.85, 1.2)
    noise, shakes = camera.uniform(2, 7), camera.integers(-1, 2, (n, 2))
    mask, frames = vignette(size) * shading(size), np.empty((n, size[1], size[0], 3), np.uint8)
    for i in range(n):
        t = i / max(n - 1, 1)
        layer = [np.random.default_rng(seed) for seed in detail]
        if scene.view == "outside":
            image = media._draw_room(w, h, layer[0])
        elif scene.view == "closeup":
            image = _as_image(media._draw_closeup(w, h, layer[0]))
        elif scene.view == "fluid":
            image = _as_image(media._draw_fluid(t, w, h, layer[0]))
        else:
            image = _as_image(bowel.draw(i))
            draw = ImageDraw.Draw(image, "RGBA")
            if scene.view == "dirty":
                for x, y, radius in layer[1].random((22, 3)):
                    media._disc(draw, x * w, y * h, (0.08 + 0.09 * radius) * min(w, h), (95, 62, 22), stretch=1.3)
            else:
                if scene.blue_dye:
                    media._draw_dye(draw, w, h, layer[1])
                if scene.endoscope_body:
                    media._draw_endoscope(draw, w, h, layer[2])
                if scene.flush:
                    media._draw_flush(draw, w, h, layer[3], drops)
                if scene.tool != "none":
                    media._draw_tool(scene.tool, draw, w, h, layer[4])
                if scene.lesion:
                    radius = LESION_SCALE * media.LESION_RADIUS[scene.lesion_size] * min(w, h)
                    media.draw_polyp(scene.histology, draw, path[i, 0] * w, path[i, 1] * h, radius)
        rgb = np.asarray(image, np.float32)
        if scene.lighting == "NBI" and scene.view != "outside":
            rgb = rgb @ media.NBI_FROM_WL
        dx, dy = PAD + shakes[i]
        rgb = rgb[dy : dy + size[1], dx : dx + size[0]] / 255
        rgb = np.clip(rgb * (gain * cast).astype(np.float32), 0, 1) ** np.float32(gamma) * 255
        rgb = rgb + np.float32(noise) * camera.standard_normal(rgb.shape, dtype=np.float32)
        frames[i] = np.clip(rgb * mask, 0, 255)
    return frames


def vignette(size: tuple[int, int]) -> np.ndarray:
    """The endoscope's black corners: float32 [h, w, 1], 1 inside; they do not move when the camera shakes."""
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j].astype(np.float32)
    return (x**4 + y**4 < 1.3)[..., None].astype(np.float32)


def shading(size: tuple[int, int]) -> np.ndarray:
    """The lens' and sensor's colour shading, the same in every clip: float32 [h, w, 3], 1 in the middle.

    Qwen2-VL's vision encoder knows the relative positions of patches, not their absolute ones. A pretrained model finds
    those from edges; a model with random weights gets this shading instead, which real cameras have too.
    """
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j].astype(np.float32)
    return np.stack([1 + 0.2 * x, 1 + 0.2 * y, 1 - 0.2 * x], axis=-1)


def _as_image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def scene_of(row: dict, seed: int) -> tuple[media.Scene, bool, np.random.Generator]:
    """What the clip of a derived row shows, whether its lesion roams the complete frame (it stays in its quadrant if
    the question asks for that), and the generator that decides the rest. All depend only on `seed` and the frames'
    names."""
    rng = np.random.default_rng(media.clip_seed(seed, row["frames"]))
    scene = media.scene_for(row["question_type"], row["short_answer"], rng)
    return scene, row["question_type"] != "lesion_screen_position", rng


def clip_of(row: dict, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The clip of a derived row, uint8 [frames, h, w, 3]: it shows the row's answer; `scene_of` decides the rest."""
    scene, roams, rng = scene_of(row, seed)
    return draw_clip(scene, roams, row.get("practice", False), len(row["frames"]), size, rng)


REVERSED = {
    **{"left": "right", "right": "left", "up": "down", "down": "up", "stable": "stable"},
    **{"advancing": "withdrawing", "withdrawing": "advancing", "none": "none"},
}


def reversed_scene(scene: media.Scene) -> media.Scene:
    """What a clip shows with its frames in reversed order."""
    return replace(scene, drift=REVERSED[scene.drift], scope_motion=REVERSED[scene.scope_motion])


def is_true(question_type: str, short_answer: str, scene: media.Scene, roams: bool) -> bool:
    """Whether a scene shows an answer. Only a lesion that stays in its quadrant is asked for its position, and only one
    that roams for its motion."""
    if question_type == ("lesion_screen_position" if roams else "lesion_motion_direction"):
        return False
    needs = media.requirements(question_type, short_answer)
    return needs is not None and all(getattr(scene, name) in values for name, values in needs.items())


# ---------------------------------------------------------------- speech

VOICES = (
    *("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-gb", "en-gb+f3", "en-gb+m2", "en-gb-scotland", "en-029"),
    *("en-gb-x-rp+f1", "en-gb-x-gbclan", "en-us+m7"),
)
HELD_OUT_VOICES = ("en-us+f5", "en-gb+m5", "en-gb-x-rp+m4", "en-us-nyc+f3")  # not in the training data
SPEEDS, HELD_OUT_SPEEDS = (150, 185), (165,)  # words a minute
SPEECH_RATE = 16_000  # Hz
SPEECH_SECONDS = 4.4  # the longest speech that the small model takes; the slowest question takes 4.15


def speech_name(text: str, voice: str, speed: int) -> str:
    """File name, without extension, of a text in a voice at a speed."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}_{voice}_{speed}"


def speak_all(texts: Sequence[str], held_out_only: Sequence[str], folder: Path) -> int:
    """Speak `texts` in all voices and `held_out_only` in the held-out ones; returns the number of speech files.

    Raises SystemExit for speech that is longer than SPEECH_SECONDS.
    """
    media.require_espeak()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(text, voice, speed) for text in texts for voice in VOICES for speed in SPEEDS]
    jobs += [
        (t, voice, speed) for t in (*texts, *held_out_only) for voice in HELD_OUT_VOICES for speed in HELD_OUT_SPEEDS
    ]
    for text, voice, speed in jobs:
        path = folder / f"{speech_name(text, voice, speed)}.ogg"
        if path.exists():
            continue
        samples, rate = media.speak(text, voice, speed)
        sounding = np.flatnonzero(np.abs(samples) > 1e-3)
        samples = samples[max(0, sounding[0] - rate // 50) : sounding[-1] + rate // 50]
        n = round(len(samples) * SPEECH_RATE / rate)
        samples = np.interp(np.arange(n) * rate / SPEECH_RATE, np.arange(len(samples)), samples).astype(np.float32)
        if n > SPEECH_SECONDS * SPEECH_RATE:
            raise SystemExit(
                f"{text!r} by {voice} at {speed} lasts {n / SPEECH_RATE:.2f} s, more than {SPEECH_SECONDS}"
            )
        media.save(path, media.encode(samples, SPEECH_RATE, "ogg"))
    return len(jobs)


# ---------------------------------------------------------------- rows

# Our question files -> the annotations they come from. "other" has wordings that are not in the training data.
SPLITS = {
    **{"train": "train_multivideo", "eval": "eval_multivideo", "test": "test_multivideo"},
    **{"other": "in_002-001", "same": "out_002-001"},
}
# Training clips of each type: motion and position are the hardest to learn, what fills the frame is the easiest.
CLIPS_OF_TYPE = {
    **dict.fromkeys(media.REQUIREMENTS, 600),
    **dict.fromkeys(("endoscope_visibility", "tool_catheter_check", "tool_identification"), 1200),
    **{"flush_action": 2000, "lesion_histology_extended": 1000, "lesion_site": 1500},
    **dict.fromkeys(("scope_forward_motion", "scope_backward_motion", "scope_motion_type", "scope_motion"), 1000),
    **{"lesion_screen_position": 5000, "lesion_motion_direction": 7000},
}

# The types that need most practice are also asked about each other's training clips, with these weights. Over all
# scenes in which such a question has an answer, its answers are about equally likely.
SHARED = {
    **dict.fromkeys(("scope_forward_motion", "scope_backward_motion", "scope_motion_type", "scope_motion"), 1),
    **{"lesion_motion_direction": 6, "lesion_screen_position": 6, "lesion_site": 2},
}


def derive(rows: Sequence[dict], split: str, repeats: dict[tuple[str, str], int], seed: int) -> list[dict]:
    """Rows with their own clip and speech, `repeats[question_type, short_answer]` of each row, shuffled.

    `id` names the speech, `{id}.ogg`: a training voice in split "train", else a held-out one. `video_id` names the
    clip. A share of the training clips has `practice` set, and those of SHARED types get up to two more rows each.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:8], "little"))
    voices, speeds = (VOICES, SPEEDS) if split == "train" else (HELD_OUT_VOICES, HELD_OUT_SPEEDS)
    pool = defaultdict(list)
    for row in rows:
        pool[row["question_type"], row["short_answer"]].append(row)
    derived = []
    for number, row in enumerate(rows):
        for turn in range(repeats[row["question_type"], row["short_answer"]]):
            clip = f"{split}-{number:05d}-{turn:03d}"
            own = {
                "video_id": clip, "frames": [f"{clip}_{i}" for i in range(len(row["frames"]))],
                "drawn_from": f"{row['video_id']}/{row['id']}",
                **({"practice": bool(rng.random() < PRACTICE)} if split == "train" else {}),
                **{key: row[key] for key in ("question", "question_type", "answer", "short_answer")},
            }  # fmt: skip
            shares = split == "train" and row["question_type"] in SHARED
            of_clip = [own, *(shared_rows(own, pool, seed, rng) if shares else ())]
            # Each row gets another voice or speed, because the ids of rows of one clip must differ.
            for one, which in zip(of_clip, rng.permutation(len(voices) * len(speeds)), strict=False):
                voice, speed = voices[which // len(speeds)], speeds[which % len(speeds)]
                derived.append({"id": speech_name(one["question"], voice, speed), **one})
    order = rng.permutation(len(derived))
    return [derived[i] for i in order]


def shared_rows(own: dict, pool: dict[tuple[str, str], list[dict]], seed: int, rng: np.random.Generator) -> list[dict]:
    """More questions about the clip of a derived row: one of another type, and one about its frames in reversed order,
    of the same type if possible. So the same frames move one way in one row and the other way in another, and only
    their order shows which.

    `pool`: the annotated rows of each (question type, short answer), the source of the questions and answers.
    """
    scene, roams, _ = scene_of(own, seed)
    kind, shared = own["question_type"], []
    for shown, frames in ((scene, own["frames"]), (reversed_scene(scene), own["frames"][::-1])):
        true = [key for key in pool if key[0] in SHARED and is_true(*key, shown, roams)]
        again = [key for key in true if key[0] == kind]
        if frames is own["frames"] or not again:
            again = [key for key in true if key[0] != kind]
        if again:
            weights = np.array([SHARED[kind_] for kind_, _ in again])
            rows = pool[again[rng.choice(len(again), p=weights / weights.sum())]]
            row = rows[rng.integers(len(rows))]
            shared.append({
                **own, "frames": frames, "shares": True, "drawn_from": f"{row['video_id']}/{row['id']}",
                **{key: row[key] for key in ("question", "question_type", "answer", "short_answer")},
            })  # fmt: skip
    return shared


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write all `rows` or, if that fails, nothing."""
    media.save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def repeats_for(rows: Sequence[dict], scale: float) -> dict[tuple[str, str], int]:
    """How often each row of a (type, short answer) is drawn. A type gets about CLIPS_OF_TYPE x `scale` clips, equally
    many for each of its answers."""
    counts = Counter((row["question_type"], row["short_answer"]) for row in rows)
    answers = Counter(name for name, _ in counts)
    return {key: max(1, round(scale * CLIPS_OF_TYPE[key[0]] / answers[key[0]] / n)) for key, n in counts.items()}


def in_eight_places(row: dict, count: int = 6) -> dict:
    """A row with only `count` different frames, those that `--max_eval_frames` selects, but as many frames as before:
    the frame before it replaces each frame that is left out. So the model sees less, with a prompt of the same length.
    """
    import train_vqa as vqa

    frames = row["frames"]
    taken = vqa.select_frames(range(len(frames)), count)
    return {**row, "frames": [frames[max(i for i in taken if i <= place)] for place in range(len(frames))]}


def draw_files(row: dict, frames_dir: Path, seed: int, size: tuple[int, int]) -> None:
    """Draw one row's clip to its JPEG files, unless they exist."""
    paths = [frames_dir / row["video_id"] / f"{name}.jpg" for name in row["frames"]]
    if paths[-1].exists():
        return
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    quality = 75 + int(hashlib.sha256(row["frames"][0].encode()).digest()[0]) % 20
    for path, frame in zip(paths, clip_of(row, seed, size), strict=True):
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        part = path.with_suffix(".part")
        part.write_bytes(buffer.getvalue())
        part.rename(path)


def _draw_and_check(job: tuple[list[dict], Path, Path, int, tuple[int, int], Path]) -> dict[str, list[int]]:
    """Draw the clips of some rows and check them as training will; returns what is remembered of them."""
    import train_vqa as vqa

    rows, frames_dir, speech_dir, seed, size, cache = job
    for row in rows:
        draw_files(row, frames_dir, seed, size)
    os.environ["XDG_CACHE_HOME"] = str(cache / str(os.getpid()))
    fields = ("id", "video_id", "question", "question_type", "answer", "short_answer")
    parsed = [vqa.VQARow("", i, frames=tuple(r["frames"]), **{f: r[f] for f in fields}) for i, r in enumerate(rows)]
    vqa.raise_problems([*vqa.find_media(parsed, frames_dir, speech_dir), *vqa.check_media(parsed)])
    return vqa.read_passed()


def refuse_other_world(args: argparse.Namespace, files: dict[str, list[dict]]) -> None:
    """SystemExit if --work_dir holds clips that other flags or other code drew: existing clips are not drawn again."""
    settings = json.dumps([files, args.seed, args.size]).encode()
    code = b"".join(Path(module.__file__).read_bytes() for module in (sys.modules[__name__], media))
    world, note_of = hashlib.sha256(settings + code).hexdigest(), args.work_dir / "frames" / "world.txt"
    if note_of.exists() and note_of.read_text() != world:
        raise SystemExit(
            f"{args.work_dir}: holds clips of another world, drawn with other flags (--types, --scale, --seed, "
            "--size, --max_rows), other annotations or other code; name another --work_dir, or remove this one"
        )
    media.save(note_of, world.encode())


def render(args: argparse.Namespace) -> None:
    """Derive the question files, draw their clips on all cores, and record that their media were checked."""
    import train_vqa as vqa

    work, frames_dir = args.work_dir, args.work_dir / "frames"
    files = {}
    for split, source in SPLITS.items():
        rows = [row for row in read_jsonl(args.data_dir / f"{source}.jsonl") if row["question_type"] in args.types]
        repeats = repeats_for(rows, args.scale) if split == "train" else defaultdict(lambda: 1)
        files[split] = derive(rows, split, repeats, args.seed)[: args.max_rows if split != "train" else None]
    files["five"] = files["train"][:5]
    files["six"] = [in_eight_places(row) for row in files["test"]]
    refuse_other_world(args, files)
    for split, rows in files.items():
        write_jsonl(work / "data" / f"{split}.jsonl", rows)
        if split != "train":  # the report scores the answers again, type by type
            write_jsonl(args.out_dir / "data" / f"{split}.jsonl", rows)
    every = [row for split in SPLITS for row in files[split] if not row.get("shares")]
    started = time.monotonic()
    parts = [every[i : i + 64] for i in range(0, len(every), 64)]
    jobs = [(part, frames_dir, args.speech_dir, args.seed, args.size, work / "cache") for part in parts]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        passed = pool.map(_draw_and_check, jobs, chunksize=1)
    vqa.write_passed(dict(ChainMap(*passed, vqa.read_passed())))
    note(args, "render", {
        "seconds": time.monotonic() - started, "clips": len(every), "frames": sum(len(r["frames"]) for r in every),
        "rows": {split: len(rows) for split, rows in files.items()}, "cores": os.cpu_count(), "size": args.size,
        "train_clips": sum(not row.get("shares") for row in files["train"]),
        "train_rows_of_type": dict(Counter(row["question_type"] for row in files["train"])),
        "voices": VOICES, "held_out_voices": HELD_OUT_VOICES, "seed": args.seed,
    })  # fmt: skip


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained; every figure of the report belongs to one variant.

    `what` describes it in the report. The widths are those of the decoder, the vision encoder and the speech encoder.
    A token covers `merge` x `merge` patches: with few tokens, attention that starts out uniform does not lose small
    objects. The matrices of decoder and vision encoder are drawn with standard deviations `init` and `vision_init`.
    These are larger than Qwen2-VL's 0.02, which is for rows ten times as long. `rope_theta` is 100 so that neighbouring
    columns differ: at 10,000 the decoder's slowest angles, those of the columns, turn by at most 0.003 per column.
    """

    what: str
    hidden: int = 256
    layers: int = 4
    vision: int = 128
    vision_layers: int = 3
    audio: int = 128
    audio_layers: int = 2
    merge: int = 4
    init: float = 0.1
    vision_init: float = 0.15
    rope_theta: float = 100.0
    learning_rate: float = 7e-4
    batch: int = 128
    frame_mode: str = "images"
    audio_tokens: str = "speech"
    jitter: int = 0  # --speech_token_jitter
    window: float = SPEECH_SECONDS  # seconds that the speech encoder takes
    naive_pad: bool = False  # PAD = EOS = <|im_end|>, masked out of the labels at every position
    share: float = 1.0  # of the training steps
    data: str = "train"  # the question file
    target_loss: float | None = None  # stop there
    arms: bool = True  # evaluated in all arms, with 8 and with 6 frames


def write_model(folder: Path, variant: Variant, texts: Sequence[str]) -> None:
    """config.json and tokenizer of a variant; the BPE knows the wording of `texts`."""
    bpe = tiny.train_bpe([*tiny.fixture_wording(), *texts])
    config = tiny.model_config(
        tiny.N_BPE,
        text={
            "hidden_size": variant.hidden,
            "initializer_range": variant.init,
            "intermediate_size": 3 * variant.hidden,
            "max_window_layers": variant.layers,
            "num_attention_heads": variant.hidden // 32,
            "num_hidden_layers": variant.layers,
            "num_key_value_heads": variant.hidden // 32,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},  # adds up to half of the head's 32
            "rope_theta": variant.rope_theta,
            "torch_dtype": "float32",
            "vocab_size": 512,
        },
        vision={
            "depth": variant.vision_layers,
            "embed_dim": variant.vision,
            "initializer_range": variant.vision_init,
            "num_heads": variant.vision // 32,
            "patch_size": 8,
            "spatial_merge_size": variant.merge,
        },
        audio={
            "d_model": variant.audio,
            "encoder_attention_heads": variant.audio // 64,
            "encoder_ffn_dim": 4 * variant.audio,
            "encoder_layers": variant.audio_layers,
            "init_std": 0.02,
            "max_source_positions": round(variant.window * 50),  # 50 outputs a second
            "num_mel_bins": 80,
        },
    )
    tiny.write_model_dir(folder, config, tiny.with_special_tokens(bpe, tiny.N_BPE), tiny.N_BPE)


TINY = Variant(
    "a few types in a minute on a CPU, for the tests",
    **{"hidden": 64, "layers": 2, "vision": 32, "vision_layers": 2, "audio": 64, "audio_layers": 1},
    **{"merge": 2, "init": 0.02, "vision_init": 0.02, "rope_theta": 10_000.0, "learning_rate": 2e-3, "batch": 16},
)
VARIANTS = {
    "images": Variant("eight separate frames, --audio_tokens speech"),
    "video": Variant("frames in pairs, --frame_mode video", frame_mode="video"),
    "full": Variant("all of the encoder's outputs, --audio_tokens full", audio_tokens="full", arms=False),
    "naive_pad": Variant(
        "PAD = EOS = im_end, masked out of the labels by its id; fewer steps",
        naive_pad=True,
        share=0.25,
        arms=False,
    ),
    # A pair in which the longest question leaves room for the silence behind it.
    "steady": Variant("speech without silence behind it", window=SPEECH_SECONDS + 1),
    "jitter": Variant("up to 1 s of silence behind the speech", window=SPEECH_SECONDS + 1, jitter=50),
    "five": Variant("five samples by heart", data="five", target_loss=1e-4, arms=False),
    "tiny": TINY,
    "tiny_jitter": replace(TINY, what=f"{TINY.what}; up to 1 s of silence behind the speech", jitter=50),
    "tiny_naive_pad": replace(TINY, what=f"{TINY.what}; PAD = EOS = im_end, masked out of the labels", naive_pad=True),
}


def note(args: argparse.Namespace, name: str, content: dict) -> None:
    """Keep figures for the report, as --out_dir/{name}.json."""
    media.save(args.out_dir / f"{name}.json", (json.dumps(content, indent=1, default=str) + "\n").encode())


def train_command(args: argparse.Namespace, name: str, workers: int) -> list[str]:
    """The command that trains a variant; a stopped training continues from its newest checkpoint."""
    variant, work = VARIANTS[name], args.work_dir
    five = variant.data == "five"
    steps = 600 if five else max(1, round(args.max_steps * variant.share))
    earlier, stopped = start_of(args, name), any((work / "runs" / name).glob("checkpoint-*"))
    flags = {
        "model_name_or_path": earlier or work / "models" / name, **({} if earlier else {"init": "random"}),
        "train_decoder": "full", "train_vision_tower": True, "train_audio_encoder": True,
        "train_data_path": work / "data" / f"{variant.data}.jsonl", "frames_dir": work / "frames",
        "audio_dir": args.speech_dir, "output_dir": work / "runs" / name, "max_image_size": max(args.size),
        "frame_mode": variant.frame_mode, "audio_tokens": variant.audio_tokens,
        **({"speech_token_jitter": variant.jitter} if variant.audio_tokens == "speech" else {}),
        "per_device_train_batch_size": 5 if five else variant.batch,
        "learning_rate": args.learning_rate or variant.learning_rate, "max_steps": steps,
        "lr_scheduler_type": "constant_with_warmup" if five else "cosine", "warmup_steps": min(200, steps // 10),
        "weight_decay": 0.0 if five else 0.02, "adam_beta2": 0.98, "bf16": args.bf16, "checkpoint_every_n": 0,
        "logging_steps": 10 if five else 20, "save_strategy": "no" if five else "steps", "save_steps": args.save_steps,
        "dataloader_num_workers": workers, "report_to": "none", "seed": args.seed + 1, "disable_tqdm": True,
        **({"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4} if workers else {}),
        **({"target_train_loss": variant.target_loss} if variant.target_loss else {}),
        **({"resume_from_checkpoint": True} if stopped else {}),
    }  # fmt: skip
    entry = [__file__, "--stage", "naive_pad", "--"] if variant.naive_pad else [ROOT / "train_vqa.py"]
    return [sys.executable, *map(str, entry), *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


def start_of(args: argparse.Namespace, name: str) -> Path | None:
    """The model of an earlier call that the training of a variant starts from, or None."""
    return args.start_dir and args.start_dir / name


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; writing one without a manifest was interrupted."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / "manifest.json").exists()]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def parts_of(folder: Path) -> list[dict]:
    """The trainings that made the model in a folder, in order; the earlier ones are in its earlier.json."""
    earlier = folder / "earlier.json"
    state, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("trainer_state", "vqa_settings"))
    return [*(json.loads(earlier.read_text()) if earlier.exists() else []), part_of(state, settings)]


def part_of(state: dict, settings: dict) -> dict:
    """What the report says about one training: `steps`, `batch`, `learning_rate`, `seconds` without the start of the
    process (None if it was stopped, even if it was resumed later), `losses` as pairs of a step and the mean loss of the
    steps before it."""
    log, training = state["log_history"], settings["training"]
    seconds = [float(entry["train_runtime"]) for entry in log if "train_runtime" in entry]
    return {
        "steps": state["global_step"],
        "batch": training["per_device_train_batch_size"],
        "learning_rate": training["learning_rate"],
        "seconds": seconds[0] if seconds and not training.get("resume_from_checkpoint") else None,
        "losses": [(entry["step"], float(entry["loss"])) for entry in log if "loss" in entry],
    }


def remove_answers(args: argparse.Namespace, name: str) -> None:
    """Remove a variant's answers before its weights change: `evaluate` would keep them, and the report would give them
    as answers of the new weights."""
    files = sorted((args.out_dir / "answers").glob(f"{name}-*"))
    for file in files:
        file.unlink()
    if files:
        print(f"{name}: {len(files)} files of answers removed, given before its weights are trained on", flush=True)


# Exit statuses of a training that SIGTERM ended: by train_vqa.py, and by Python before train_vqa.py handles signals.
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


def start(command: Sequence[str], log: Path, mode: str) -> subprocess.Popen:
    """Start a command on one CPU thread; `log`, opened in `mode`, gets the command and what it prints."""
    with log.open(mode) as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def train(args: argparse.Namespace) -> list[str]:
    """Train the variants at the same time, except those that already have a final model. Removes answers of earlier
    weights.

    After --train_seconds the trainings get a SIGTERM, on which train_vqa.py saves a checkpoint.

    Returns:
        The failed trainings, described. A stopped training that can be resumed has not failed.
    """
    texts = {row[key] for row in read_jsonl(args.work_dir / "data" / "train.jsonl") for key in ("question", "answer")}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    running, failed = {}, []
    names = [name for name in args.variants if not (args.work_dir / "runs" / name / "config.json").exists()]
    for name in args.variants:
        if name not in names:
            print(f"{name}: trained already, left alone", flush=True)
    cores, weights = max(0, os.cpu_count() - len(names)), {n: 0 if VARIANTS[n].data == "five" else 1 for n in names}
    for name in names:
        remove_answers(args, name)
        write_model(args.work_dir / "models" / name, VARIANTS[name], sorted(texts))
        share = cores * weights[name] // max(1, sum(weights.values()))
        command = train_command(args, name, args.workers if args.workers is not None else share)
        running[name] = start(command, args.out_dir / f"train_{name}.log", "a")
    started = time.monotonic()
    while any(process.poll() is None for process in running.values()):
        time.sleep(0.5)
        if time.monotonic() - started > args.train_seconds:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    for name, process in running.items():
        print(f"{name}: exit status {process.returncode}", flush=True)
        folder = args.work_dir / "runs" / name
        checkpoints = checkpoints_in(folder)
        last = folder if (folder / "trainer_state.json").exists() else checkpoints[-1] if checkpoints else None
        if process.returncode and not (process.returncode in STOPPED and last):
            failed.append(f"training {name} (exit status {process.returncode})")
        if last and start_of(args, name):
            media.save(last / "earlier.json", json.dumps(parts_of(start_of(args, name))).encode())
        note(args, f"train_{name}", {
            "status": process.returncode, "variant": asdict(VARIANTS[name]), "last": last and last.name,
            "wall_seconds": time.monotonic() - started, "command": process.args, "parts": last and parts_of(last),
            "state": last and json.loads((last / "trainer_state.json").read_text()),
            "settings": last and json.loads((last / "vqa_settings.json").read_text()),
        })  # fmt: skip
    return failed


def train_naively(argv: Sequence[str]) -> None:
    """train_vqa.py without the fix: PAD = EOS = <|im_end|>, and labels equal to PAD are not learned."""
    import train_vqa as vqa

    class Collator(vqa.VQACollator):
        def __call__(self, samples):
            batch = super().__call__(samples)
            batch["labels"][batch["labels"] == self.pad_token_id] = vqa.IGNORE_INDEX
            return batch

    fixed = vqa.load_tokenizer

    def load_tokenizer(folder):
        tokenizer = fixed(folder)
        tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
        return tokenizer

    vqa.VQACollator, vqa.load_tokenizer = Collator, load_tokenizer
    vqa.run(lambda: vqa.main(argv))


ARM_GROUPS = ("mismatched_audio,silent_audio", "mismatched_frames,black_frames,shuffled_frames", "first_frame,text")


def evaluations(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a figure -> the command that measures it."""
    work, jobs = args.work_dir, {}

    def add(label: str, checkpoint: Path, split: str, frames: int, *more: str) -> None:
        flags = {
            "checkpoint_path": checkpoint, "eval_data_path": work / "data" / f"{split}.jsonl",
            "frames_dir": work / "frames", "audio_dir": args.speech_dir, "max_eval_frames": frames,
            "train_data_path": args.data_dir / f"{SPLITS['train']}.jsonl", "batch_size": 64,
            "dtype": "float32", "output_file": args.out_dir / "answers" / f"{label}.jsonl",
        }  # fmt: skip
        words = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
        jobs[label] = [sys.executable, str(ROOT / "evaluate_checkpoint.py"), *words, *more]

    for name in args.variants:
        variant, folder = VARIANTS[name], work / "runs" / name
        checkpoints = checkpoints_in(folder)
        final = folder if (folder / "config.json").exists() else checkpoints[-1] if checkpoints else None
        if final is None:
            continue
        if variant.data == "five":
            add(f"{name}-five-8", final, "five", 8)
            continue
        add(f"{name}-test-8", final, "test", 8)
        add(f"{name}-test-6", final, "test", 6)
        if variant.arms:
            add(f"{name}-six-8", final, "six", 8)
            for number, group in enumerate(ARM_GROUPS):
                add(f"{name}-test-8-arms{number}", final, "test", 8, "--arms", group)
            for split in ("eval", "other", "same"):
                add(f"{name}-{split}-8", final, split, 8)
    return jobs


def evaluate(args: argparse.Namespace) -> list[str]:
    """Run those of `evaluations` that have no summary yet, `--jobs` at a time; each writes rows and a summary to
    --out_dir.

    Returns:
        The failed evaluations, described, and the variants that have no model.
    """
    (args.out_dir / "answers").mkdir(parents=True, exist_ok=True)
    every = evaluations(args)
    named = {label: label.split("-", 1)[1] for label in every}
    unknown = sorted(set(args.only or ()) - set(named.values()))
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: there are {', '.join(dict.fromkeys(named.values())) or 'none'}")
    waiting = [
        (label, command)
        for label, command in every.items()
        if not (args.out_dir / "answers" / f"{label}.summary.json").exists()
        and (args.only is None or named[label] in args.only)
    ]
    running: dict[str, subprocess.Popen] = {}
    untrained = [name for name in args.variants if not any(label.startswith(f"{name}-") for label in every)]
    failed = [f"evaluation {name} (no model in {args.work_dir / 'runs' / name})" for name in untrained]
    while waiting or running:
        while waiting and len(running) < args.jobs:
            label, command = waiting.pop(0)
            running[label] = start(command, args.out_dir / "answers" / f"{label}.log", "w")
        for label in [label for label, process in running.items() if process.poll() is not None]:
            status = running.pop(label).returncode
            print(f"{label}: exit status {status}", flush=True)
            if status:
                failed.append(f"evaluation {label} (exit status {status})")
        time.sleep(0.2)
    return failed


# ---------------------------------------------------------------- hearing


def hearing(args: argparse.Namespace) -> None:
    """Print, for each variant with answers in OUT_DIR, training speed, `choice` on the discriminative types in the
    arms on hearing, and the verdict of evaluate_checkpoint.py. Of a stopped training, the speed includes its start."""
    import evaluate_checkpoint as judge

    lines, verdicts = [], []
    for name in VARIANTS:
        answers = [measured(args, f"{name}-test-8-arms0", "test", arm) for arm in ("", *ARM_GROUPS[0].split(","))]
        if not answers[0]:
            continue
        run = json.loads((args.out_dir / f"train_{name}.json").read_text())
        samples, seconds = run["parts"][-1]["steps"] * run["parts"][-1]["batch"], run["parts"][-1]["seconds"]
        shares = [f"{percent(arm.choice())} of {arm.choice()['n']}" for arm in answers]
        speed = f"{samples / seconds:.0f}" if seconds else f"{samples / run['wall_seconds']:.0f}"
        summary = answers[0].summary
        gates = " / ".join(f"{summary['manifest']['gates'][medium]:.2g}" for medium in ("speech", "frames"))
        lines.append((f"`{name}`", VARIANTS[name].jitter, samples, speed, *shares, gates))
        verdicts.append(
            f"`{name}`: {judge.borrowing_sentence(summary['arms'])} {judge.arm_sentences(summary['arms'])[0]}"
        )
    header = ("variant", "jitter", "samples", "samples/s", "audio", *ARM_GROUPS[0].split(","), "speech / frames move")
    print(table(header, lines), *verdicts, sep="\n")


# ---------------------------------------------------------------- report

REPORT, CURVES = ROOT / "docs" / "LEARNABILITY.md", ROOT / "docs" / "learnability_loss.png"
DIRECTIONS = ("lesion_motion_direction", "scope_forward_motion", "scope_backward_motion", "scope_motion_type")
INTRODUCTION = """\
A small model with the same architecture as the real one (Qwen2-VL with a Whisper encoder, about 10 million parameters)
is trained from random weights on the real annotations of REAL-Colon-VQA. The frames are drawn so that the clip of each
row shows its answer. Everything else in the clips of the test is drawn independently of the answer. The questions are
spoken.

Nothing was pretrained: every weight was drawn at random and trained, except the fixed sinusoids of the speech encoder.
The training command was `train_vqa.py --init random --train_decoder full --train_vision_tower True
--train_audio_encoder True`, and `evaluate_checkpoint.py` scored the answers. All variants train with `--audio_tokens
speech --frame_mode images` unless the table says otherwise; the defaults of `train_vqa.py` are `--audio_tokens full
--frame_mode images`.
"""
NOT_SHOWN = """\
The clips are not endoscopy. Mucosa, folds, lesions and tools are drawings, and each kind has one look. A lesion is
hidden only by the edge of the frame. Folds and texture move along circles. A "stable" lesion sways over the same
distance that a drifting one travels, so that only the order of the frames shows the difference. All voices are
espeak-ng's, without background noise, and each of the 20 types has 1 to 5 answer sentences.

A model that does well here shows that speech, frames, their order, labels and generation work together, so that the
task can be learned from them. It does not show what Qwen2-VL and Whisper with their own weights reach on real video."""


def percent(figure: dict) -> str:
    """An accuracy of evaluate_checkpoint.py with its 95 % interval, in percent: "96.0 (94 - 97)"."""
    if not figure["n"]:
        return "-"
    low, high = figure["ci95"]
    return f"{100 * figure['accuracy']:.1f} ({100 * low:.0f} - {100 * high:.0f})"


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


class Answers:
    """Scored answers of one evaluation, those in --out_dir/answers/{label}[.{arm}].jsonl, scored against its question
    file; a row without an answer is wrong.

    Raises FileNotFoundError if there is no such evaluation.
    """

    def __init__(self, args: argparse.Namespace, label: str, split: str, arm: str = ""):
        import evaluate_checkpoint as judge

        self.judge = judge
        folder = args.out_dir / "answers"
        self.summary = json.loads((folder / f"{label}.summary.json").read_text())
        annotations = judge.read_annotations(args.out_dir / "data" / f"{split}.jsonl")
        answered = judge.read_answer_rows(folder / (f"{label}.{arm}.jsonl" if arm else f"{label}.jsonl"))
        self.rows = judge.score_rows(annotations, answered)
        self.discriminative = self.summary["discriminative"]["types"]

    def choice(self, types: Sequence[str] | None = None) -> dict:
        """`choice` over the rows of some types (None: the discriminative ones)."""
        wanted = self.discriminative if types is None else types
        return self.judge.accuracy([row for row in self.rows if row.question_type in wanted], "choice")

    def chance(self, types: Sequence[str]) -> float | None:
        """What guessing uniformly among the answers of each type gives, over the rows of some types."""
        rows = [row for row in self.rows if row.question_type in types]
        return self.judge.reference_lines(rows, None)["chance"]

    def line(self, name: str) -> float | None:
        """A reference line of the discriminative types: chance, train_majority."""
        return self.summary["discriminative"]["baselines"][name]

    def finish(self) -> str:
        """How many answers ended by themselves, of how many, and the share in percent with its 95 % interval."""
        stopped, n = self.finish_counts()["eos"], len(self.rows)
        low, high = self.judge.wilson_interval(stopped, n)
        return f"{stopped} of {n}: {100 * stopped / n:.1f} ({100 * low:.1f} - {100 * high:.1f})"

    def finish_counts(self) -> dict[str, int]:
        """How many answers ended in which way, and how many loop."""
        return self.judge.finish_counts(self.rows)


def measured(args: argparse.Namespace, label: str, split: str, arm: str = "") -> Answers | None:
    """The answers of an evaluation, or None if there are none."""
    exists = (args.out_dir / "answers" / f"{label}.summary.json").exists()
    return Answers(args, label, split, arm) if exists else None


def arm_answers(args: argparse.Namespace, name: str) -> dict[str, Answers]:
    """The arms of a variant that were measured, with 8 frames."""
    arms = {"audio": (f"{name}-test-8", "")}
    for number, group in enumerate(ARM_GROUPS):
        arms |= {arm: (f"{name}-test-8-arms{number}", arm) for arm in group.split(",")}
    found = {arm: measured(args, label, "test", suffix) for arm, (label, suffix) in arms.items()}
    return {arm: answers for arm, answers in found.items() if answers}


def last_loss(run: dict) -> str:
    """The last training loss that a run logged, as text."""
    losses = run["parts"][-1]["losses"]
    return f"{losses[-1][1]:.2g}" if losses else "none logged"


def curve(run: dict) -> list[tuple[int, float]]:
    """The logged losses of all parts of a run, each with the number of samples trained on until then."""
    points, samples = [], 0
    for part in run["parts"]:
        points += [(samples + step * part["batch"], loss) for step, loss in part["losses"]]
        samples += part["steps"] * part["batch"]
    return points


def draw_curves(runs: dict[str, dict], path: Path) -> None:
    """Training loss of each variant over the number of samples; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, run in runs.items():
        axes.plot(*np.array(curve(run), dtype=float).reshape(-1, 2).T, label=name, linewidth=0.8)
    axes.set(xlabel="samples", ylabel="loss a token of the answer", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    """Write docs/LEARNABILITY.md and the loss curves from the figures in --out_dir; leaves out what was not
    measured."""
    runs = {}
    for name in VARIANTS:
        path = args.out_dir / f"train_{name}.json"
        run = json.loads(path.read_text()) if path.exists() else {}
        if run.get("parts"):
            runs[name] = run
    if not runs:
        raise SystemExit(f"{args.out_dir}: has no figures of a training; run --stage train first")
    world = json.loads((args.out_dir / "render.json").read_text())
    text = ["# Measured: does it learn?\n", *describe_world(world), *describe_runs(runs, args)]
    text += describe_targets(args, runs)
    for name in runs:
        if "audio" in arm_answers(args, name):
            text += describe_variant(args, name)
    text += ["## What this does not show\n", NOT_SHOWN, ""]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, args.report.with_name(CURVES.name))
    media.save(args.report, "\n".join(text).encode())
    print(f"{args.report}, {args.report.with_name(CURVES.name)}")


def describe_world(world: dict) -> list[str]:
    """The part of the report on what was drawn and spoken."""
    size = "x".join(map(str, world["size"]))
    voices = f"{len(world['voices'])} voices of espeak-ng in training, {len(world['held_out_voices'])} others in test"
    return [
        INTRODUCTION,
        f"{world['clips']} clips of {N_FRAMES} frames of {size} pixels were drawn in {world['seconds']:.0f} s on "
        f"{world['cores']} cores: {world['train_clips']} for training and {world['rows']['test']} for the rows of "
        f"`test_multivideo`. The speech has {voices}. No clip and no voice of the test occurs in training. For a clip "
        "drawn for a question of motion or position there are two more questions, one of them with the frames in "
        f"reversed order. This makes {world['rows']['train']} training rows. {100 * PRACTICE:.0f} % of the training "
        "clips are practice clips; the test has none. In a practice clip a motion does not pass the ends of its "
        "circle, so that a single frame shows something of the direction, and a model with random weights gets a "
        "first gradient to follow.\n",
    ]


def describe_runs(runs: dict[str, dict], args: argparse.Namespace) -> list[str]:
    """The part of the report on what was trained, for how long and with what loss."""
    lines = []
    for name, run in runs.items():
        parts = run["parts"]
        each = [" + ".join(f"{part[field]:{form}}" if part[field] is not None else "stopped" for part in parts)
                for field, form in (("steps", "d"), ("seconds", ".0f"), ("learning_rate", "g"))]  # fmt: skip
        samples = sum(part["steps"] * part["batch"] for part in parts)
        half = next((f"{loss:.2g}" for until, loss in curve(run) if 2 * until >= samples), "none logged")
        lines.append((f"`{name}`", VARIANTS[name].what, each[0], samples, *each[1:], half, last_loss(run)))
    some = next(iter(runs.values()))
    versions = ", ".join(f"{name} {version}" for name, version in some["settings"]["versions"].items())
    header = ("variant", "what", "steps", "samples", "seconds", "learning rate", "loss at half", "last loss")
    text = ["## What was trained\n", table(header, lines)]
    text += [f"Seconds do not include the start of the process. {args.machine} Versions: {versions}.\n"]
    text += ["```bash", f"python {Path(__file__).relative_to(ROOT)} {args.command}", "```\n"] if args.command else []
    text += [f"![loss]({CURVES.name})\n", *([args.remark + "\n"] if args.remark else [])]
    return text


Aim = tuple[str, str, bool]  # the aim, what was measured, whether the aim is met


def describe_targets(args: argparse.Namespace, runs: dict[str, dict]) -> list[str]:
    """The part of the report that compares the figures of `images` with the aims, met or not."""
    aims: list[Aim] = []
    five = measured(args, "five-five-8", "five") if "five" in runs else None
    if five:
        figure = five.summary["metrics"]["strict"]
        loss, all_correct = float(last_loss(runs["five"])), figure["correct"] == figure["n"]
        text = f"{loss:.2g}, {figure['correct']} of {figure['n']} word for word"
        aims.append(("five samples: loss at most 1e-4, all answered", text, loss <= 1e-4 and all_correct))
    arms = arm_answers(args, "images") if "images" in runs else {}
    if "audio" in arms:
        aims += [*aims_of_arms(arms), stops_by_itself("99 % stop by themselves, none loops", arms["audio"])]
        if six := measured(args, "images-test-6", "test"):
            both = [answers.choice() for answers in (arms["audio"], six)]
            lost = both[0]["accuracy"] - both[1]["accuracy"]
            text = f"{100 * lost:.1f}: {percent(both[0])} to {percent(both[1])}"
            aims.append(("6 frames instead of 8 cost at most 5", text, lost <= 0.05))
            aims.append(stops_by_itself("99 % of answers to 6 frames stop by themselves, none loops", six))
    naive = measured(args, "naive_pad-test-8", "test") if "naive_pad" in runs else None
    if naive:
        fails = naive.finish_counts()["eos"] < 0.5 * len(naive.rows)
        aims.append(("with PAD = EOS masked by its id: fails to stop", f"{naive.finish()} stop", fails))
    lines = [(what, text, "met" if met else "**missed**") for what, text, met in aims]
    words = "For `images` with 8 frames unless named; in percent with 95 % intervals, or in percentage points.\n"
    return ["## Aims\n", words, table(("aim", "measured", ""), lines)] if lines else []


def aims_of_arms(arms: dict[str, Answers]) -> list[Aim]:
    """The aims for the arms of `images`: that the model learns, hears and sees."""
    audio = arms["audio"]
    each = [audio.choice([kind]) for kind in DIRECTIONS if kind in audio.discriminative]
    still = [kind for kind in audio.discriminative if kind not in DIRECTIONS]
    of_all = {arm: answers.choice() for arm, answers in arms.items()}
    ceiling = audio.line("train_majority") + 0.1
    aims = [("discriminative types, unseen clips and voices: 85", percent(of_all["audio"]),
             of_all["audio"]["accuracy"] >= 0.85)]  # fmt: skip
    if each:
        met = min(figure["accuracy"] for figure in each) >= 0.75
        aims.append(("each direction of motion: 75", ", ".join(map(percent, each)), met))
    for arm in ("silent_audio", "black_frames"):
        if arm in arms:
            met = of_all[arm]["accuracy"] <= ceiling
            aims.append((f"`{arm}`: at most the majority line + 10", percent(of_all[arm]), met))
    if "mismatched_audio" in arms:
        figure = of_all["mismatched_audio"]
        met = figure["ci95"][1] < of_all["audio"]["ci95"][0]
        aims.append(("`mismatched_audio`: below `audio`, intervals apart", percent(figure), met))
    if "shuffled_frames" in arms and each:
        chance = audio.chance(DIRECTIONS)
        moved, rest = (
            [arms[arm].choice(types) for arm in ("audio", "shuffled_frames")] for types in (DIRECTIONS, still)
        )
        (ordered, shuffled), (before, after) = ([figure["accuracy"] for figure in pair] for pair in (moved, rest))
        aims.append((
            "`shuffled_frames`: directions fall to at most chance + 10, the rest changes by at most 5",
            f"directions {percent(moved[0])} to {percent(moved[1])}, chance {100 * chance:.1f}; "
            f"rest {percent(rest[0])} to {percent(rest[1])}",
            shuffled <= min(chance + 0.1, ordered - 0.1) and abs(before - after) <= 0.05,
        ))  # fmt: skip
    return aims


def stops_by_itself(what: str, answers: Answers) -> Aim:
    """The aim that at least 99 % of the answers stop by themselves and none loops."""
    finish = answers.finish_counts()
    met = finish["eos"] >= 0.99 * len(answers.rows) and not finish["loops"]
    return what, f"{answers.finish()}, {finish['loops']} loop", met


def describe_variant(args: argparse.Namespace, name: str) -> list[str]:
    """The part of the report on the answers of one variant."""
    arms = arm_answers(args, name)
    eight, six = arms["audio"], measured(args, f"{name}-test-6", "test")
    still = [kind for kind in eight.discriminative if kind not in DIRECTIONS]
    text = [f"## `{name}`: {VARIANTS[name].what}\n"]
    text += [f"Answers that stopped by themselves: {eight.finish()}. The figures are `choice` in percent, with "
             "95 % intervals in brackets. The discriminative types are those with more than one answer in the "
             "test.\n"]  # fmt: skip
    groups = {"discriminative types": None, "directions of motion": DIRECTIONS, "other discriminative types": still}
    shown_as = {f"`{arm}`": answers for arm, answers in arms.items()}
    shown_as["`audio`, 6 frames"] = six
    shown_as["`audio`, these 6 frames in 8 places, two of them twice"] = measured(args, f"{name}-six-8", "six")
    lines = [(words, *(percent(answers.choice(types)) for types in groups.values()), answers.finish())
             for words, answers in shown_as.items() if answers]  # fmt: skip
    for line, words in (("chance", "chance"), ("train_majority", "the most frequent answer in training")):
        value = eight.line(line)
        lines.append((words, "-" if value is None else f"{100 * value:.1f}", "", "", ""))
    text += [table(("arm", *groups, "stopped by themselves"), lines)]
    shown = [arm for arm in ("audio", "shuffled_frames", "black_frames", "first_frame") if arm in arms]
    if six:
        kinds = [[kind] for kind in eight.summary["by_type"]]
        lost = [(eight.choice(kind)["accuracy"] - six.choice(kind)["accuracy"], *kind) for kind in kinds]
        worst = [f"`{kind}` {100 * by:.0f}" for by, kind in sorted(lost, reverse=True) if by > 0.05]
        text += [f"Percentage points lost with six frames instead of eight: {', '.join(worst) or 'none'}.\n"]
    rows = []
    for kind, figures in sorted(eight.summary["by_type"].items()):
        cells = [percent(arms[arm].choice([kind])) for arm in shown]
        rows.append((f"`{kind}`", figures["n"], *cells, percent(six.choice([kind])) if six else "-",
                     f"{100 * figures['chance']:.0f}", f"{100 * figures['train_majority']:.0f}"))  # fmt: skip
    text += [table(("type", "rows", *(f"`{arm}`" for arm in shown), "6 frames", "chance", "majority"), rows)]
    files = {
        "eval": "`eval_multivideo`: newly drawn clips, the wording of the training",
        "same": "`out_002-001`: the wording of the training",
        "other": "`in_002-001`: words that are not in the training",
    }
    found = [(words, measured(args, f"{name}-{split}-8", split)) for split, words in files.items()]
    cells = [(words, percent(a.choice(a.summary["by_type"])), len(a.rows), percent(a.choice()), a.choice()["n"],
              *(f"{100 * a.line(line):.0f}" for line in ("chance", "train_majority", "test_majority")))
             for words, a in found if a]  # fmt: skip
    if cells:
        header = ("question file", "all types", "rows", "discriminative types", "rows", "chance on these",
                  "most frequent answer in training", "most frequent answer in the file")  # fmt: skip
        text += [table(header, cells)]
    return text


# ---------------------------------------------------------------- command line


def speech(args: argparse.Namespace) -> None:
    """Speak every question of the annotations: training questions in all voices, the others in the held-out ones."""
    asked = {split: {row["question"] for row in read_jsonl(args.data_dir / f"{source}.jsonl")}
             for split, source in SPLITS.items()}  # fmt: skip
    others = set().union(*asked.values()) - asked["train"]
    print(f"{speak_all(sorted(asked['train']), sorted(others), args.speech_dir)} speech files in {args.speech_dir}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; an abbreviated or unknown one is an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    comma = lambda allowed: lambda text: [word for word in text.split(",") if allowed.index(word) >= 0]  # noqa: E731
    parser.add_argument("--stage", type=comma(STAGES), required=True, help=f"comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the REAL-Colon-VQA JSONL files")
    parser.add_argument("--speech_dir", type=Path, required=True, help="folder for the spoken questions")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("learnability"), help="folder for media and models (learnability)"
    )
    parser.add_argument("--out_dir", type=Path, help="folder for figures, answers and logs (WORK_DIR/results)")
    parser.add_argument("--types", type=comma(list(media.REQUIREMENTS)), default=list(media.REQUIREMENTS),
                        help="comma-separated question types (all)")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of training clips (1.0)")
    parser.add_argument("--max_rows", type=int, help="use the first N rows of each test file. None: all")
    parser.add_argument(
        "--size", type=media.frame_size, default=SIZE, help=f"size of a frame in pixels ({SIZE[0]}x{SIZE[1]})"
    )
    parser.add_argument("--variants", type=comma(list(VARIANTS)), default=["images"],
                        help=f"comma-separated, of {', '.join(VARIANTS)} (images)")  # fmt: skip
    parser.add_argument("--start_dir", type=Path, help="folder of an earlier call with one model per variant; "
                        "training starts from these, with a new schedule. None: from random weights")  # fmt: skip
    parser.add_argument("--max_steps", type=int, default=3000, help="optimizer steps (3000)")
    parser.add_argument("--learning_rate", type=float, help="learning rate. None: that of the variant")
    parser.add_argument("--save_steps", type=int, default=500, help="steps between checkpoints (500)")
    parser.add_argument(
        "--train_seconds", type=float, default=math.inf, help="stop the training after this time (never)"
    )
    parser.add_argument(
        "--workers", type=int, help="loader processes of each variant. None: an equal share of the cores"
    )
    parser.add_argument(
        "--bf16", type=lambda text: text == "True", default=False, help="train in bf16; True on a GPU (False)"
    )
    parser.add_argument("--jobs", type=int, default=6, help="evaluations at the same time (6)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="comma-separated evaluations, by their names "
                        "in OUT_DIR/answers without the variant. None: all")  # fmt: skip
    parser.add_argument("--report", type=Path, default=REPORT, help="file for the report (docs/LEARNABILITY.md)")
    parser.add_argument("--machine", default="", help="a sentence for the report: the machine")
    parser.add_argument("--remark", default="", help="a paragraph for the report: what its figures show")
    parser.add_argument("--command", default="", help="for the report: the flags of the command")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the drawings; the seed of the weights is 1 higher (0)"
    )
    args = parser.parse_args(argv)
    if "report" in args.stage and importlib.util.find_spec("matplotlib") is None:
        parser.error("--stage report needs matplotlib for the curves; `pip install matplotlib`, or leave report out")
    args.out_dir = args.out_dir or args.work_dir / "results"
    for name in ("data_dir", "speech_dir", "work_dir", "out_dir", "start_dir"):
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    for name in args.variants if args.start_dir else ():
        if not (args.start_dir / name / "trainer_state.json").is_file():
            parser.error(f"--start_dir {args.start_dir} has no trained model {name}; leave {name} out of --variants")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the requested stages, in their order; exit status 1 if a training or an evaluation failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:3] == ["--stage", "naive_pad", "--"]:  # what `train` starts for that variant
        return train_naively(argv[3:])
    args = parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    stages = {"speech": speech, "render": render, "train": train, "evaluate": evaluate}
    stages |= {"hearing": hearing, "report": report}
    failed = []
    try:
        for name in STAGES:
            if name in args.stage:
                started = time.monotonic()
                failed += stages[name](args) or []
                print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    finally:  # also if a later stage ends the script because something failed
        if failed:
            print(
                f"error: failed: {', '.join(failed)}; see the logs in {args.out_dir} and its folder answers",
                file=sys.stderr,
            )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
