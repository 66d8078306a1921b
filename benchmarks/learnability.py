"""Does it learn? A small model from random weights, the real annotations, and a drawn world where the truth is known.

    python benchmarks/learnability.py --stage speech --data_dir realcolon_vqa --speech_dir speech     # needs espeak-ng
    python benchmarks/learnability.py --stage render,train,evaluate,report --data_dir realcolon_vqa \\
        --speech_dir speech --work_dir /tmp/learnability

Every row of the annotations is drawn under frame names of its own, so that its clip shows its answer; all else in the
clip is drawn independently of the answer. The questions are spoken by many voices. `train_vqa.py` trains and
`evaluate_checkpoint.py` judges, both as any user runs them. Each stage keeps what is there and goes on where it stopped.

speech     speaks every question in every voice: a few hundred clips, made once, carried along
render     draws the clips, links the speech and writes the question files
train      trains the variants (--variants), side by side
evaluate   lets every variant answer the test rows, in all arms
report     writes docs/LEARNABILITY.md and its curves from the figures in --work_dir/results
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import make_media as media
import make_tiny_models as tiny

STAGES = ("speech", "render", "train", "evaluate", "report")

# ---------------------------------------------------------------- the world: what is drawn
# Lengths are fractions of the frame's width or height unless said otherwise.

SIZE = (112, 96)  # pixels, multiples of the 16 that a token covers, and near REAL-Colon's 1240 : 1080
N_FRAMES = 8

# Motion runs on a circle, so that no single frame tells its direction: what leaves at one end enters at the other, and
# where on the circle a frame stands is uniform whatever the direction. The share of the circle that a clip travels:
TRAVEL = 0.33
# A lesion's circle along one axis is the span that it keeps to; where its quadrant is asked for, it keeps to that.
ROAM = (0.15, 0.85)
QUADRANT_SPAN = {"left": (0.1, 0.4), "upper": (0.1, 0.4), "right": (0.6, 0.9), "lower": (0.6, 0.9)}
MAX_TREND = 0.4  # |correlation with time| of a lesion's places along an axis in which it does not drift
FOLD_PERIOD = 2.4  # in log radius: one dark and one pale fold each; a clip zooms by exp(0.33 * 2.4) = 2.2
PAD = 4  # pixels around the frame, for the camera's shake


def trembling(n: int, rng: np.random.Generator) -> np.ndarray:
    """An order of 0 .. n - 1, int [n], without a trend: |correlation with time| below MAX_TREND."""
    time_ = np.arange(n)
    while True:
        order = rng.permutation(n)
        if n < 4 or abs(np.corrcoef(time_, order)[0, 1]) < MAX_TREND:
            return order


def lesion_path(drift: str, spans: Sequence[tuple[float, float]], n: int, rng: np.random.Generator) -> np.ndarray:
    """Places (x, y) of a lesion in n frames, float [n, 2].

    Along each axis the places are n equal steps on that axis' circle, TRAVEL of it in all, from a random start: in the
    order of time along the axis of the drift, in an order without trend along the other (both, if stable). So the set of
    places is distributed alike for every drift, and so is the place in any one frame: only their order tells.
    """
    path = np.empty((n, 2))
    for axis, (low, high) in enumerate(spans):
        direction = media.DRIFT_XY[drift][axis]
        order = np.arange(n) * direction if direction else trembling(n, rng)
        place = rng.random() + TRAVEL / max(n - 1, 1) * order
        path[:, axis] = low + (high - low) * (place % 1.0)
    return path


def lesion_spans(scene: media.Scene, roams: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """The spans in x and y that the lesion keeps to."""
    down, right = scene.quadrant.split("-")
    return (ROAM, ROAM) if roams else (QUADRANT_SPAN[right], QUADRANT_SPAN[down])


@dataclass
class Bowel:
    """Mucosa, folds and texture of one clip, drawn by numpy for a canvas of w x h pixels; white light.

    The folds and the texture flow along log radius with the scope, on a circle of two periods (half-moon folds change
    sides from one to the next).
    """

    def __init__(self, scene: media.Scene, w: int, h: int, rng: np.random.Generator):
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
        self.site, self.phase = scene.site, rng.uniform(0, 2)
        direction = {"none": 0, "advancing": 1, "withdrawing": -1}[scene.scope_motion]
        self.speed = direction * TRAVEL
        self.colour = np.float32(media.MUCOSA_RGB) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
        self.light = rng.uniform(-0.25, 0.25, 2)

    def draw(self, t: float) -> np.ndarray:
        """The bowel at clip time t, 0 to 1; float32 [h, w, 3], 0 to 255."""
        ring = self.log_radius - self.phase - self.speed * t
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


def draw_lesion(scene: media.Scene, place: np.ndarray, draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    """`make_media`'s lesion, its middle at `place` (x, y)."""
    at = replace(scene, quadrant="upper-left", drift="stable")
    # make_media jitters by uniform(-0.03, 0.03): a generator that answers what is left to add puts it in its place.
    media._draw_lesion(at, 0.5, draw, w, h, _Fixed(place - media.QUADRANT_CENTRE[0]))


class _Fixed:
    """Stands in for a generator whose next `uniform` is known."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def uniform(self, *_) -> np.ndarray:
        return self.values


def draw_clip(scene: media.Scene, roams: bool, n: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """n frames of a clip, uint8 [n, h, w, 3]; `rng` decides all that the scene leaves open."""
    w, h = size[0] + 2 * PAD, size[1] + 2 * PAD
    detail = [int(seed) for seed in rng.integers(2**32, size=6)]  # a layer draws the same in every frame
    bowel, path = Bowel(scene, w, h, rng), lesion_path(scene.drift, lesion_spans(scene, roams), n, rng)
    cast, gain, gamma = rng.uniform(0.9, 1.1, 3), rng.uniform(0.75, 1.2), rng.uniform(0.85, 1.2)
    noise, shakes = rng.uniform(2, 7), rng.integers(-2, 3, (n, 2))
    mask, frames = vignette(size), np.empty((n, size[1], size[0], 3), np.uint8)
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
            image = _as_image(bowel.draw(t))
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
                    media._draw_flush(draw, w, h, layer[3], rng)
                if scene.tool != "none":
                    media._draw_tool(scene.tool, draw, w, h, layer[4])
                if scene.lesion:
                    draw_lesion(scene, path[i], draw, w, h)
        rgb = np.asarray(image, np.float32)
        if scene.lighting == "NBI" and scene.view != "outside":
            rgb = rgb @ media.NBI_FROM_WL
        dx, dy = PAD + shakes[i]
        rgb = rgb[dy : dy + size[1], dx : dx + size[0]] / 255
        rgb = np.clip(rgb * (gain * cast).astype(np.float32), 0, 1) ** np.float32(gamma) * 255
        rgb = rgb + np.float32(noise) * rng.standard_normal(rgb.shape, dtype=np.float32)
        frames[i] = np.clip(rgb * mask, 0, 255)
    return frames


def vignette(size: tuple[int, int]) -> np.ndarray:
    """The endoscope's black corners: float32 [h, w, 1], 1 inside; they stay while the camera shakes."""
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j].astype(np.float32)
    return (x**4 + y**4 < 1.3)[..., None].astype(np.float32)


def _as_image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def clip_of(row: dict, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The clip of a derived row, uint8 [frames, h, w, 3]: its answer is true in it; `seed` and its frame names decide
    all else."""
    rng = np.random.default_rng(media.clip_seed(seed, row["frames"]))
    scene = media.scene_for(row["question_type"], row["short_answer"], rng)
    return draw_clip(scene, row["question_type"] != "lesion_screen_position", len(row["frames"]), size, rng)


# ---------------------------------------------------------------- speech

VOICES = (
    *("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-gb", "en-gb+f3", "en-gb+m2", "en-gb-scotland", "en-029"),
    *("en-gb-x-rp+f1", "en-gb-x-gbclan", "en-us+m7"),
)
HELD_OUT_VOICES = ("en-us+f5", "en-gb+m5", "en-gb-x-rp+m4", "en-us-nyc+f3")  # never heard in training
SPEEDS, HELD_OUT_SPEEDS = (150, 185), (165,)  # words a minute
SPEECH_RATE = 16_000  # Hz
SPEECH_SECONDS = 4.4  # what the small model hears; the slowest question takes 4.15


def speech_file(folder: Path, text: str, voice: str, speed: int) -> Path:
    """Where the clip of a text in a voice at a speed lies."""
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}_{voice}_{speed}.ogg"


def speak_all(texts: Sequence[str], held_out_only: Sequence[str], folder: Path) -> int:
    """Speak `texts` in all voices and `held_out_only` in the held-out ones; returns how many clips are there.

    Raises SystemExit for a clip that the small model cannot hear to its end.
    """
    media.require_espeak()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(text, voice, speed) for text in texts for voice in VOICES for speed in SPEEDS]
    jobs += [
        (t, voice, speed) for t in (*texts, *held_out_only) for voice in HELD_OUT_VOICES for speed in HELD_OUT_SPEEDS
    ]
    for text, voice, speed in jobs:
        path = speech_file(folder, text, voice, speed)
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

# Renderings of the training rows of each type: motion is the hardest to learn, a constant answer needs no practice.
CLIPS_OF_TYPE = {
    **dict.fromkeys(media.REQUIREMENTS, 800),
    **dict.fromkeys(("blue_dye_presence", "lighting_mode", "lesion_size_range"), 150),
    **dict.fromkeys(("scope_forward_motion", "scope_backward_motion", "scope_motion_type", "scope_motion"), 1600),
    **{"lesion_motion_direction": 4000, "lesion_screen_position": 1600, "lesion_site": 1600},
}


def derive(rows: Sequence[dict], split: str, repeats: dict[str, int], seed: int, speech_dir: Path) -> list[dict]:
    """Rows with frame names, an id and speech of their own, each rendered `repeats[question_type]` times, shuffled.

    `speech` is the clip that is played: a voice of the training for split "train", else a held-out one.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:8], "little"))
    voices, speeds = (VOICES, SPEEDS) if split == "train" else (HELD_OUT_VOICES, HELD_OUT_SPEEDS)
    derived = []
    for number, row in enumerate(rows):
        for turn in range(repeats[row["question_type"]]):
            video = f"{split}-{turn:03d}"
            numbers = [number * len(row["frames"]) + i for i in range(len(row["frames"]))]
            voice, speed = voices[rng.integers(len(voices))], int(speeds[rng.integers(len(speeds))])
            derived.append({
                "id": f"r{number:05d}", "video_id": video, "frames": [f"{video}_{i}" for i in numbers],
                "frame_numbers": numbers, "drawn_from": f"{row['video_id']}/{row['id']}",
                **{key: row[key] for key in ("question", "question_type", "answer", "short_answer")},
                "speech": speech_file(speech_dir, row["question"], voice, speed).name,
            })  # fmt: skip
    order = rng.permutation(len(derived))
    return [derived[i] for i in order]


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write `rows`, whole or not at all."""
    media.save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _render(job: tuple[dict, Path, int, tuple[int, int]]) -> int:
    """Draw one row's clip to its files; returns how many were drawn."""
    row, frames_dir, seed, size = job
    paths = [frames_dir / row["video_id"] / f"{name}.jpg" for name in row["frames"]]
    if paths[-1].exists():
        return 0
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    quality = 75 + int(hashlib.sha256(row["frames"][0].encode()).digest()[0]) % 20
    for path, frame in zip(paths, clip_of(row, seed, size), strict=True):
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        part = path.with_suffix(".part")
        part.write_bytes(buffer.getvalue())
        part.rename(path)
    return len(paths)


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained; every figure of the report belongs to one.

    what: in words, for the report. The widths are of the decoder, the vision tower and the speech encoder.
    """

    what: str
    hidden: int = 256
    layers: int = 6
    vision: int = 128
    vision_layers: int = 3
    audio: int = 128
    audio_layers: int = 2
    learning_rate: float = 1e-3
    batch: int = 64
    frame_mode: str = "images"
    audio_tokens: str = "speech"
    naive_pad: bool = False  # PAD = EOS = <|im_end|>, masked out of the labels wherever it stands
    share: float = 1.0  # of the training steps
    data: str = "train"


def write_model(folder: Path, variant: Variant, texts: Sequence[str]) -> None:
    """config.json and tokenizer of a variant; the BPE knows the wording of `texts`."""
    bpe = tiny.train_bpe([tiny.INSTRUCTION, *tiny.WORDING, *texts])
    config = tiny.model_config(
        tiny.N_BPE,
        text={
            "hidden_size": variant.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 3 * variant.hidden,
            "max_window_layers": variant.layers,
            "num_attention_heads": variant.hidden // 32,
            "num_hidden_layers": variant.layers,
            "num_key_value_heads": variant.hidden // 32,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},  # adds up to half of the head's 32
            "rope_theta": 10_000.0,
            "torch_dtype": "float32",
            "vocab_size": 512,
        },
        vision={
            "depth": variant.vision_layers,
            "embed_dim": variant.vision,
            "initializer_range": 0.02,
            "num_heads": variant.vision // 32,
            "patch_size": 8,
        },
        audio={
            "d_model": variant.audio,
            "encoder_attention_heads": variant.audio // 64,
            "encoder_ffn_dim": 4 * variant.audio,
            "encoder_layers": variant.audio_layers,
            "init_std": 0.02,
            "max_source_positions": round(SPEECH_SECONDS * 50),  # 50 outputs a second
            "num_mel_bins": 80,
        },
    )
    tiny.write_model_dir(folder, config, tiny.with_special_tokens(bpe, tiny.N_BPE), tiny.N_BPE)
