"""Make frames and speech for any JSONL in the REAL-Colon-VQA schema: drawings that show the answers, questions spoken.

    python tests/make_media.py --data_path test_set/in_002-001.jsonl test_set/out_002-001.jsonl --output_dir media

    media/frames/002-001/002-001_18743.jpg                        one folder a video
    media/audio/in_002-001/002-001_qa_000357_flush_action.mp3     one folder a JSONL: ids repeat across files

The committed media of the tests (two path forms, four audio formats, three ways of naming) were made by

    python tests/make_media.py --fixtures --overwrite

A clip is drawn from a `Scene`. The question type and short answer of each row on the clip fix what the answer needs (a
lesion in the upper left, a tool that is not a catheter); everything else comes from a seeded generator and does not
depend on the answer. Needs Pillow, numpy, soundfile and the program espeak-ng.
"""

import argparse
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

FIXTURES = Path(__file__).resolve().parent / "fixtures"
ROW_KEYS = ("id", "video_id", "frames", "frame_numbers", "question", "question_type", "short_answer")
AUDIO_NAMES = {
    "question_type": "{video_id}_{id}_{question_type}",
    "video_id": "{video_id}_{id}",
    "id": "{id}",
}
AUDIO_FORMATS = {"mp3": ("MP3", None), "wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS")}
FRAME_SIZE = (310, 270)  # a quarter of REAL-Colon's 1240 x 1080 each way
JPEG_QUALITY = 85


# ---------------------------------------------------------------- what a clip shows


@dataclass(frozen=True)
class Scene:
    """What one clip shows. Everything but `view` is visible only where `view` is "clear"; the light is, but outside.

    brightness: gain on all pixels, about 0.85 to 1.1. detail: seed of what stays fixed over the clip and answers
    nothing (where in its quadrant the lesion sits, from where a tool enters, the shape of the folds).
    """

    view: str = "clear"  # clear, fluid (all turbid), closeup (tissue on the lens), dirty (residue), outside (the room)
    lighting: str = "WL"  # WL (white light, reddish) or NBI (narrow band, blue-green)
    site: str = "descending"  # round folds; ascending: triangular; sigma: slanted ellipses; rectum: half-moons
    scope_motion: str = "none"  # advancing: fold rings grow; withdrawing: they shrink
    lesion: bool = False
    quadrant: str = "upper-left"
    drift: str = "stable"  # left, right, up, down: of the lesion on the screen
    histology: str = "hyperplastic"  # pale with white dots; adenoma: dark with stripes
    lesion_size: str = "<5"  # millimetres: <5, 5-10 or >10
    tool: str = "none"  # catheter: banded tube; forceps: open jaws; snare: wire loop
    endoscope_body: bool = False  # thick black tube, as seen in retroflexion
    blue_dye: bool = False
    flush: bool = False  # water jet
    brightness: float = 1.0
    detail: int = 0


# What an attribute may be, with its weight where no row constrains it. One uniform number is drawn per attribute,
# always and in this order, so that a row's answer changes the attributes it constrains and no other.
CHOICES: dict[str, dict] = {
    "view": {"clear": 1.0, "fluid": 0.0, "closeup": 0.0, "dirty": 0.0, "outside": 0.0},
    "lighting": {"WL": 0.5, "NBI": 0.5},
    "site": {"descending": 0.25, "ascending": 0.25, "sigma": 0.25, "rectum": 0.25},
    "scope_motion": {"none": 0.4, "advancing": 0.3, "withdrawing": 0.3},
    "lesion": {True: 0.6, False: 0.4},
    "quadrant": {"upper-left": 0.25, "upper-right": 0.25, "lower-left": 0.25, "lower-right": 0.25},
    "drift": {"stable": 0.2, "left": 0.2, "right": 0.2, "up": 0.2, "down": 0.2},
    "histology": {"hyperplastic": 0.5, "adenoma": 0.5},
    "lesion_size": {"<5": 0.4, "5-10": 0.3, ">10": 0.3},
    "tool": {"none": 0.4, "catheter": 0.2, "forceps": 0.2, "snare": 0.2},
    "endoscope_body": {False: 0.8, True: 0.2},
    "blue_dye": {False: 0.8, True: 0.2},
    "flush": {False: 0.8, True: 0.2},
}

CLEAR = {"view": ("clear",)}
LESION = {**CLEAR, "lesion": (True,)}

# (question type) -> (short answer) -> attribute -> the values under which the answer is true and visible.
REQUIREMENTS: dict[str, dict[str, dict[str, tuple]]] = {
    "blue_dye_presence": {
        "yes": {**CLEAR, "blue_dye": (True,)},
        "no": {**CLEAR, "blue_dye": (False,)},
    },
    "endoscope_visibility": {
        "yes": {**CLEAR, "endoscope_body": (True,)},
        "no": {**CLEAR, "endoscope_body": (False,)},
    },
    "fluid_occlusion_level": {"absent": CLEAR, "complete": {"view": ("fluid",)}},
    "flush_action": {"yes": {**CLEAR, "flush": (True,)}, "no": {**CLEAR, "flush": (False,)}},
    "lesion_histology_extended": {h: {**LESION, "histology": (h,)} for h in CHOICES["histology"]},
    "lesion_motion_direction": {d: {**LESION, "drift": (d,)} for d in CHOICES["drift"]},
    "lesion_screen_position": {q: {**LESION, "quadrant": (q,)} for q in CHOICES["quadrant"]},
    "lesion_site": {s: {**LESION, "site": (s,)} for s in CHOICES["site"]},
    "lesion_size_range": {s: {**LESION, "lesion_size": (s,)} for s in CHOICES["lesion_size"]},
    "lighting_mode": {light: {**CLEAR, "lighting": (light,)} for light in CHOICES["lighting"]},
    "mucosa_visibility": {"yes": CLEAR, "no": {"view": ("fluid", "closeup", "dirty")}},
    "nbi_status": {"yes": {**CLEAR, "lighting": ("NBI",)}, "no": {**CLEAR, "lighting": ("WL",)}},
    "occlusion_check": {"yes": {"view": ("closeup",)}, "no": CLEAR},
    "scope_backward_motion": {
        "yes": {**CLEAR, "scope_motion": ("withdrawing",)},
        "no": {**CLEAR, "scope_motion": ("advancing",)},
    },
    "scope_forward_motion": {
        "yes": {**CLEAR, "scope_motion": ("advancing",)},
        "no": {**CLEAR, "scope_motion": ("withdrawing",)},
    },
    "scope_motion": {
        "yes": {**CLEAR, "scope_motion": ("advancing", "withdrawing")},
        "no": {**CLEAR, "scope_motion": ("none",)},
    },
    "scope_motion_type": {m: {**CLEAR, "scope_motion": (m,)} for m in ("advancing", "withdrawing")},
    "scope_outside": {"yes": {"view": ("outside",)}, "no": {"view": ("clear", "fluid", "closeup", "dirty")}},
    "tool_catheter_check": {
        "yes": {**CLEAR, "tool": ("catheter",)},
        "no": {**CLEAR, "tool": ("forceps", "snare")},
    },
    "tool_identification": {tool: {**CLEAR, "tool": (tool,)} for tool in ("catheter", "forceps", "snare")},
}


def requirements(question_type: str, short_answer: str) -> dict[str, tuple] | None:
    """The attribute values that make the answer visible, or None where type or answer is not one that can be drawn."""
    return REQUIREMENTS.get(question_type, {}).get(short_answer)


def scene_for_rows(asked: Iterable[tuple[str, str]], rng: np.random.Generator) -> tuple[Scene, list[bool]]:
    """A scene that satisfies (question type, short answer) pairs asked of one clip, in order, as far as they agree.

    Returns the scene and, per pair, whether its answer is visible. A pair that contradicts the ones before it, or that
    cannot be drawn, leaves the scene as it is.
    """
    allowed = {name: tuple(weights) for name, weights in CHOICES.items()}
    visible = []
    constrained = set()
    for question_type, short_answer in asked:
        needs = requirements(question_type, short_answer)
        narrowed = {name: tuple(v for v in allowed[name] if v in values) for name, values in (needs or {}).items()}
        visible.append(needs is not None and all(narrowed.values()))
        if visible[-1]:
            allowed.update(narrowed)
            constrained.update(narrowed)
    drawn = {}
    for name, weights in CHOICES.items():
        values = allowed[name]
        share = [1.0 if name in constrained else weights[value] for value in values]
        point = rng.random() * sum(share)
        drawn[name] = values[min(int(np.searchsorted(np.cumsum(share), point, side="right")), len(values) - 1)]
    return Scene(**drawn, brightness=float(rng.uniform(0.85, 1.1)), detail=int(rng.integers(2**32))), visible


def scene_for(question_type: str, short_answer: str, rng: np.random.Generator) -> Scene:
    """A scene in which the answer to one question is visible; a neutral one if the type or answer is unknown."""
    return scene_for_rows([(question_type, short_answer)], rng)[0]


# ---------------------------------------------------------------- drawing
# Lengths below are fractions of the frame's shorter side unless said otherwise.

MUCOSA_RGB = (225, 125, 105)
# White-light RGB (a row) to narrow-band RGB (a column): red tissue comes out blue-green, blue dye stays blue.
NBI_FROM_WL = np.array([[0.20, 0.35, 0.28], [0.15, 0.45, 0.30], [0.00, 0.05, 0.45]], dtype=np.float32)
RING_SPACING = 0.5  # distance of neighbouring folds, in log radius
# Fold spacings per clip: 0.19 a frame of 8. From half a spacing a frame on, rings would seem to run the other way; this
# leaves room for leaving out every second frame.
RING_TRAVEL = 1.3
# Of the frame's width or height. With the jitter of 0.03 a lesion keeps to its quadrant, whole, wherever it drifts, and
# off the tip of a tool.
DRIFT = 0.14  # over the clip
QUADRANT_CENTRE = (0.25, 0.75)
DRIFT_XY = {"stable": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LESION_RADIUS = {"<5": 0.06, "5-10": 0.095, ">10": 0.13}


def _fold_radius(site: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance from the lumen's centre whose level lines are the folds of `site`; u, v, result: float32 [H, W]."""
    if site == "ascending":
        angles = (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)
        return np.maximum.reduce([u * math.cos(a) + v * math.sin(a) for a in angles]) * 1.4 + 0.02
    if site == "sigma":
        along, across = 0.82 * u + 0.57 * v, -0.57 * u + 0.82 * v
        return np.hypot(along * 0.7, (across + 0.5 * along**2) * 1.9)
    return np.hypot(u, v)


def _draw_bowel(scene: Scene, t: float, w: int, h: int, layout: np.random.Generator) -> np.ndarray:
    """Mucosa with a dark lumen and fold rings at clip time t, white light; float32 [h, w, 3], 0 to 255."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    centre = 0.5 + layout.uniform(-0.06, 0.06, 2)
    wobble, phase = layout.uniform(0, 2 * math.pi), layout.random()
    u, v = (x - centre[0] * w) / min(w, h), (y - centre[1] * h) / min(w, h)
    radius = _fold_radius(scene.site, u, v) * (1 + 0.04 * np.sin(3 * np.arctan2(v, u) + wobble))
    travel = {"none": 0.0, "advancing": RING_TRAVEL, "withdrawing": -RING_TRAVEL}[scene.scope_motion] * t
    ring = np.log(np.maximum(radius, 0) + 0.02) / RING_SPACING - phase - travel
    fold = np.exp(-((((ring % 1.0) - 0.5) / 0.13) ** 2))
    if scene.site == "rectum":
        side = np.where(np.floor(ring) % 2 == 0, 1.0, -1.0)
        fold = fold / (1 + np.exp(-side * u / 0.04))
    light = 0.15 + 0.85 * np.clip(radius / 0.4, 0, 1) ** 0.8 - 0.2 * np.hypot(u, v) ** 2
    return np.float32(MUCOSA_RGB) * (light * (1 - 0.5 * fold))[..., None].astype(np.float32)


def _draw_room(w: int, h: int, layout: np.random.Generator) -> Image.Image:
    """The room outside the patient: grey wall, green drape, a lamp and a dark trolley."""
    image = Image.new("RGB", (w, h), (178, 186, 196))
    draw = ImageDraw.Draw(image)
    left, right = layout.uniform(0.5, 0.7, 2)
    draw.polygon([(0, left * h), (w, right * h), (w, h), (0, h)], fill=(60, 140, 110))
    lamp, trolley = layout.uniform(0.15, 0.4), layout.uniform(0.55, 0.75)
    _disc(draw, lamp * w, 0.22 * h, 0.13 * min(w, h), (250, 250, 240))
    draw.rectangle([trolley * w, 0.25 * h, (trolley + 0.2) * w, 0.75 * h], fill=(70, 74, 82))
    return image


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple, stretch: float = 1.0) -> None:
    """A filled ellipse around (x, y), `radius` high and `radius` * `stretch` wide, all in pixels."""
    draw.ellipse([x - radius * stretch, y - radius, x + radius * stretch, y + radius], fill=fill)


def _tube(draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, width: float, fill: tuple) -> None:
    """A straight tube with a round end, pixels."""
    draw.line([*start, *end], fill=fill, width=max(2, round(width)))
    _disc(draw, end[0], end[1], width / 2, fill)


def _draw_dye(draw: ImageDraw.ImageDraw, w: int, h: int, layout: np.random.Generator) -> None:
    """Pools of blue contrast dye on the mucosa."""
    for x, y, size in zip(layout.random(9), layout.random(9), layout.uniform(0.05, 0.11, 9), strict=True):
        _disc(draw, x * w, y * h, size * min(w, h), (20, 30, 235, 190), stretch=1.5)


def _draw_endoscope(draw: ImageDraw.ImageDraw, w: int, h: int, layout: np.random.Generator) -> None:
    """The scope's own shaft in retroflexion: a thick black tube with white marks, from the upper edge."""
    s = min(w, h)
    start = np.array([layout.uniform(0.2, 0.8) * w, -0.1 * h])
    end = np.array([layout.uniform(0.4, 0.6) * w, layout.uniform(0.32, 0.42) * h])
    _tube(draw, start, end, 0.2 * s, (22, 22, 26))
    along = (end - start) / np.hypot(*(end - start))
    across = np.array([-along[1], along[0]]) * 0.1 * s
    for distance in (0.35, 0.6, 0.85):
        mark = start + (end - start) * distance
        draw.line([*(mark - across), *(mark + across)], fill=(235, 235, 235), width=max(2, round(0.02 * s)))


def _draw_flush(
    draw: ImageDraw.ImageDraw, w: int, h: int, layout: np.random.Generator, rng: np.random.Generator
) -> None:
    """A jet of water from the lower edge that fans out, with droplets that differ from frame to frame."""
    s = min(w, h)
    start = np.array([layout.uniform(0.3, 0.7) * w, 1.02 * h])
    end = np.array([layout.uniform(0.3, 0.7) * w, 0.3 * h])
    draw.polygon(
        [(start[0] - 0.02 * s, start[1]), (start[0] + 0.02 * s, start[1]), (end[0] + 0.14 * s, end[1]),
         (end[0] - 0.14 * s, end[1])],
        fill=(235, 245, 255, 150),
    )  # fmt: skip
    for reach, aside, size in zip(rng.random(24), rng.normal(0, 0.11, 24), rng.uniform(0.008, 0.02, 24), strict=True):
        x, y = start + (end - start) * (0.4 + 0.7 * reach)
        _disc(draw, x + aside * s, y, size * s, (245, 250, 255, 230))


def _draw_tool(kind: str, draw: ImageDraw.ImageDraw, w: int, h: int, layout: np.random.Generator) -> None:
    """A tool from the lower edge to the middle: banded catheter, forceps with open jaws, or a snare's wire loop."""
    s = min(w, h)
    start = np.array([layout.uniform(0.1, 0.9) * w, 1.1 * h])
    tip = np.array([layout.uniform(0.44, 0.56) * w, layout.uniform(0.5, 0.6) * h])
    along = (tip - start) / np.hypot(*(tip - start))
    across = np.array([-along[1], along[0]])
    if kind == "catheter":
        _tube(draw, start, tip, 0.09 * s, (240, 240, 230))
        for distance in (0.05, 0.13, 0.21, 0.29):
            band = tip - along * distance * s
            draw.line(
                [*(band - across * 0.045 * s), *(band + across * 0.045 * s)], fill=(30, 30, 140), width=round(0.03 * s)
            )
        _disc(draw, *tip, 0.018 * s, (20, 20, 20))
    elif kind == "forceps":
        _tube(draw, start, tip, 0.05 * s, (150, 155, 165))
        for side in (-1, 1):
            elbow = tip + along * 0.08 * s + across * side * 0.1 * s
            cup = tip + along * 0.2 * s + across * side * 0.05 * s
            draw.line([*tip, *elbow, *cup], fill=(195, 200, 210), width=round(0.035 * s), joint="curve")
            _disc(draw, *cup, 0.035 * s, (225, 230, 240))
    else:
        _tube(draw, start, tip, 0.035 * s, (90, 150, 235))
        angle = np.linspace(0, 2 * math.pi, 40)
        loop = [tip + along * (0.14 - 0.14 * math.cos(a)) * s + across * 0.11 * math.sin(a) * s for a in angle]
        draw.line([tuple(p) for p in loop], fill=(255, 225, 60), width=max(2, round(0.025 * s)), joint="curve")


def _draw_lesion(
    scene: Scene, t: float, draw: ImageDraw.ImageDraw, w: int, h: int, layout: np.random.Generator
) -> None:
    """The polyp at clip time t."""
    down, right = scene.quadrant.split("-")
    jitter = layout.uniform(-0.03, 0.03, 2)
    x = (QUADRANT_CENTRE[right == "right"] + jitter[0] + DRIFT * DRIFT_XY[scene.drift][0] * (t - 0.5)) * w
    y = (QUADRANT_CENTRE[down == "lower"] + jitter[1] + DRIFT * DRIFT_XY[scene.drift][1] * (t - 0.5)) * h
    draw_polyp(scene.histology, draw, x, y, LESION_RADIUS[scene.lesion_size] * min(w, h))


def draw_polyp(histology: str, draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    """A polyp of radius r around (x, y), pixels: pale with white dots (hyperplastic) or dark with stripes (adenoma)."""
    adenoma = histology == "adenoma"
    _disc(draw, x, y, r, (70, 20, 20) if adenoma else (170, 95, 85))
    _disc(draw, x, y, 0.88 * r, (150, 55, 45) if adenoma else (250, 215, 195))
    if adenoma:
        for offset in (-0.5, 0.0, 0.5):
            half = 0.8 * r * math.sqrt(1 - offset**2)
            draw.line([x - half, y + offset * r, x + half, y + offset * r], fill=(60, 12, 12), width=round(0.2 * r))
    else:
        for turn in range(6):
            angle = turn * math.pi / 3
            _disc(draw, x + 0.5 * r * math.cos(angle), y + 0.5 * r * math.sin(angle), 0.13 * r, (255, 255, 255))


def _draw_closeup(w: int, h: int, layout: np.random.Generator) -> np.ndarray:
    """Tissue pressed against the lens: a bright featureless glow; float32 [h, w, 3]."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    centre = layout.uniform(0.35, 0.65, 2)
    glow = np.exp(-(((x / w - centre[0]) / 0.55) ** 2) - ((y / h - centre[1]) / 0.55) ** 2)[..., None]
    return np.float32((205, 70, 60)) * (1 - glow) + np.float32((255, 190, 170)) * glow


def _draw_fluid(t: float, w: int, h: int, layout: np.random.Generator) -> np.ndarray:
    """Turbid yellow fluid over the whole view, with slow waves; float32 [h, w, 3]."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    phase = layout.uniform(0, 2 * math.pi, 2)
    wave = np.sin(9 * x / w + 3 * y / h + phase[0] + 2 * t) + np.sin(4 * x / w - 8 * y / h + phase[1] + t)
    return np.float32((165, 150, 60)) * (1 + 0.08 * wave)[..., None].astype(np.float32)


def draw_frame(scene: Scene, t: float, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """One RGB frame of (width, height) pixels at clip time t, from 0 (first frame) to 1 (last).

    What stays put over a clip comes from `scene.detail`; `rng` gives only what changes from frame to frame and answers
    nothing: flicker, droplets, bubbles.
    """
    w, h = size
    # One generator per layer: whether a tool is in the picture must not move the lesion.
    layers = [np.random.default_rng((scene.detail, layer)) for layer in range(6)]
    flicker = 1 + 0.01 * rng.standard_normal()
    if scene.view == "outside":
        return _graded(_draw_room(w, h, layers[0]), scene.brightness * flicker, "WL")
    if scene.view == "closeup":
        return _graded(_draw_closeup(w, h, layers[0]), scene.brightness * flicker, scene.lighting)
    if scene.view == "fluid":
        image = Image.fromarray(_draw_fluid(t, w, h, layers[0]).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image, "RGBA")
        for x, y, radius in zip(rng.random(18), rng.random(18), rng.uniform(0.01, 0.04, 18), strict=True):
            _disc(draw, x * w, y * h, radius * min(w, h), (220, 210, 140, 140))
        return _graded(image, scene.brightness * flicker, scene.lighting)

    bowel = _draw_bowel(scene, t, w, h, layers[0])
    image = Image.fromarray(bowel.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    if scene.view == "dirty":
        for x, y, radius in zip(
            layers[1].random(22), layers[1].random(22), layers[1].uniform(0.08, 0.17, 22), strict=True
        ):
            _disc(draw, x * w, y * h, radius * min(w, h), (95, 62, 22), stretch=1.3)
    else:
        # The lesion last: nothing may hide it, since it is the smallest thing that carries answers.
        if scene.blue_dye:
            _draw_dye(draw, w, h, layers[1])
        if scene.endoscope_body:
            _draw_endoscope(draw, w, h, layers[2])
        if scene.flush:
            _draw_flush(draw, w, h, layers[3], rng)
        if scene.tool != "none":
            _draw_tool(scene.tool, draw, w, h, layers[4])
        if scene.lesion:
            _draw_lesion(scene, t, draw, w, h, layers[5])
    return _graded(image, scene.brightness * flicker, scene.lighting)


def _graded(pixels: Image.Image | np.ndarray, gain: float, lighting: str) -> Image.Image:
    """White-light pixels, 0 to 255, [h, w, 3], as the camera shows them under `lighting` with `gain`."""
    rgb = np.asarray(pixels, dtype=np.float32)
    if lighting == "NBI":
        rgb = rgb @ NBI_FROM_WL
    return Image.fromarray((rgb * np.float32(gain)).clip(0, 255).astype(np.uint8))


def draw_clip(scene: Scene, n_frames: int, size: tuple[int, int], rng: np.random.Generator) -> list[Image.Image]:
    """`n_frames` RGB frames of (width, height) pixels, evenly spaced over the clip."""
    return [draw_frame(scene, i / max(n_frames - 1, 1), size, rng) for i in range(n_frames)]


# ---------------------------------------------------------------- speech


def require_espeak() -> None:
    """Stop with one line that says how to install espeak-ng, if it is not on the PATH."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit(
            "espeak-ng is not installed: `apt install espeak-ng` (Debian, Ubuntu) or `brew install espeak-ng` (macOS)"
        )


def speak(text: str, voice: str = "en-us", speed: int = 160) -> tuple[np.ndarray, int]:
    """`text` spoken by espeak-ng at `speed` words a minute: mono float32 [n] in -1 to 1, and the rate in Hz."""
    require_espeak()
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdin", "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise SystemExit(f"espeak-ng could not speak {text!r} as {voice}: {done.stderr.decode().strip()}")
    return soundfile.read(io.BytesIO(done.stdout), dtype="float32")


def encode(samples: np.ndarray, rate: int, audio_format: str) -> bytes:
    """An audio file's bytes, the same for the same input; samples float32 [n] or [n, channels], rate in Hz."""
    container, subtype = AUDIO_FORMATS[audio_format]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return _with_fixed_ogg_serial(buffer.getvalue()) if audio_format == "ogg" else buffer.getvalue()


def _with_fixed_ogg_serial(data: bytes) -> bytes:
    """Ogg `data` with stream serial number 1 in place of the random one, and the page checksums that go with it."""
    table = []
    for byte in range(256):
        remainder = byte << 24
        for _ in range(8):
            remainder = (remainder << 1) ^ (0x04C11DB7 if remainder & 0x80000000 else 0)
        table.append(remainder & 0xFFFFFFFF)
    out, start = b"", 0
    while start < len(data):  # RFC 3533, section 6: serial at byte 14, checksum at 22, segment table from 26
        n_segments = data[start + 26]
        end = start + 27 + n_segments + sum(data[start + 27 : start + 27 + n_segments])
        page = bytearray(data[start:end])
        page[14:18], page[22:26] = b"\1\0\0\0", b"\0\0\0\0"
        checksum = 0
        for byte in page:
            checksum = ((checksum << 8) & 0xFFFFFFFF) ^ table[(checksum >> 24) ^ byte]
        page[22:26] = checksum.to_bytes(4, "little")
        out, start = out + bytes(page), end
    return out


# ---------------------------------------------------------------- rows and files


def read_rows(paths: list[Path]) -> list[dict]:
    """The rows of JSONL files, each with `where` ("file:line") and `file` (its stem) added; a bad line is named."""
    rows = []
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path}: no such file")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise SystemExit(f"{path}:{number}: not a JSON object")
            missing = [key for key in ROW_KEYS if key not in row]
            if missing:
                raise SystemExit(f"{path}:{number}: lacks {', '.join(missing)}")
            for key in ("question", "short_answer"):
                if not isinstance(row[key], str) or not row[key].strip():
                    raise SystemExit(f"{path}:{number}: {key} is not a text")
            for key in ("frames", "frame_numbers"):
                if not isinstance(row[key], list) or len(row[key]) != len(row["frames"]):
                    raise SystemExit(f"{path}:{number}: frames and frame_numbers are not lists of one length")
            names = (row["id"], row["video_id"], row["question_type"], *row["frames"], *map(str, row["frame_numbers"]))
            for name in names:
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
                    raise SystemExit(f"{path}:{number}: {name!r} cannot be part of a file name")
            rows.append({**row, "where": f"{path}:{number}", "file": path.stem})
    return rows


def save(path: Path, data: bytes) -> None:
    """Write `data`, by way of a `.part` file: a run that is killed must not leave half a file for the next to keep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def image_bytes(image: Image.Image, frame_format: str) -> bytes:
    """The image as a JPEG ("jpg") or PNG ("png") file."""
    buffer = io.BytesIO()
    if frame_format == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def clip_seed(seed: int, frames: list[str]) -> list[int]:
    """Seed words for one clip: its drawing depends on `seed` and its frame names, not on where it stands in a file."""
    digest = hashlib.sha256("\n".join([str(seed), *frames]).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def make_frames(
    rows: list[dict],
    frames_dir: Path,
    seed: int = 0,
    size: tuple[int, int] = FRAME_SIZE,
    frame_name: str = "frame",
    frame_format: str = "jpg",
    overwrite: bool = False,
) -> Counter:
    """Draw the clips of `rows` to `frames_dir`/{video_id}/{frame or frame_number}.{frame_format}.

    Rows with the same list of frames share one scene, which shows the answers of all of them where they agree. Where
    two lists overlap in part, the shared frames belong to the clip that comes first. Returns counts: clips, drawn,
    kept (files), conflict, overlap, unknown (rows).
    """
    clips = defaultdict(list)
    for row in rows:
        clips[row["video_id"], *row["frames"]].append(row)
    counts = Counter(clips=len(clips))
    taken: set[Path] = set()
    for (video_id, *frames), sharing in clips.items():
        rng = np.random.default_rng(clip_seed(seed, frames))
        asked = [(row["question_type"], row["short_answer"]) for row in sharing]
        scene, visible = scene_for_rows(asked, rng)
        stems = frames if frame_name == "frame" else sharing[0]["frame_numbers"]
        paths = [frames_dir / video_id / f"{stem}.{frame_format}" for stem in stems]
        overlaps = not taken.isdisjoint(paths)
        for pair, shows in zip(asked, visible, strict=True):
            if requirements(*pair) is None:
                counts["unknown"] += 1
            elif not shows:
                counts["conflict"] += 1
            elif overlaps:
                counts["overlap"] += 1
        own = [path for path in paths if path not in taken]
        taken.update(own)
        missing = {path for path in own if overwrite or not path.exists()}
        counts["kept"] += len(own) - len(missing)
        counts["drawn"] += len(missing)
        if missing:
            drawn: set[bytes] = set()
            for path, image in zip(paths, draw_clip(scene, len(paths), size, rng), strict=True):
                content = image_bytes(image, frame_format)
                if content in drawn:  # the scope stands still, but no camera is without noise
                    noise = np.random.default_rng(len(drawn)).integers(-6, 7, (*image.size[::-1], 3))
                    noisy = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
                    content = image_bytes(Image.fromarray(noisy), frame_format)
                drawn.add(content)
                if path in missing:
                    save(path, content)
    return counts


def speech_files(rows: list[dict], audio_dir: Path, audio_name: str, audio_format: str) -> dict[Path, str]:
    """Speech file -> the question it has to say. Stops where one file would have to serve two different questions."""
    asked: dict[Path, dict] = {}
    for row in rows:
        path = audio_dir / row["file"] / f"{AUDIO_NAMES[audio_name].format(**row)}.{audio_format}"
        first = asked.setdefault(path, row)
        if first["question"] != row["question"]:
            raise SystemExit(
                f"{first['where']} and {row['where']} ask different questions, "
                f"and {path.name} would have to serve both: use a longer --audio_name"
            )
    return {path: row["question"] for path, row in asked.items()}


def make_speech(
    files: dict[Path, str], voice: str = "en-us", speed: int = 160, audio_format: str = "mp3", overwrite: bool = False
) -> Counter:
    """Speak the missing ones of `files` (path -> text); a text is spoken once. Returns counts: spoken, texts, kept."""
    counts: Counter = Counter()
    spoken: dict[str, bytes] = {}
    for path, text in files.items():
        if path.exists() and not overwrite:
            counts["kept"] += 1
            continue
        if text not in spoken:
            spoken[text] = encode(*speak(text, voice, speed), audio_format)
        save(path, spoken[text])
        counts["spoken"] += 1
    counts["texts"] = len(spoken)
    return counts


def report(n_rows: int, frames: Counter | None, speech: Counter | None) -> str:
    """What was made, and how many rows' answers the frames do not show, as lines of text."""
    lines = [f"rows: {n_rows}"]
    if frames is not None:
        hidden = frames["conflict"] + frames["overlap"] + frames["unknown"]
        lines += [
            f"frames: {frames['drawn']} drawn, {frames['kept']} kept, for {frames['clips']} clips",
            f"answers not visible, or not in every frame: {hidden} rows",
            f"  {frames['conflict']} contradict another row on the same frames",
            f"  {frames['overlap']} share some frames with a clip drawn before",
            f"  {frames['unknown']} have a question type or answer that cannot be drawn",
        ]
    if speech is not None:
        lines.append(f"speech: {speech['spoken']} files from {speech['texts']} texts, {speech['kept']} kept")
    return "\n".join(lines)


# ---------------------------------------------------------------- the committed fixtures

FIXTURE_SIZE = (224, 196)
# Row of smoke.jsonl -> naming, format, rate in Hz, gain of each channel. Rows that ask the same question decode to the
# same samples after averaging the channels (rows 0 and 2: lossless; rows 1 and 3: the same mp3), so that a codec's
# traces cannot tell a model which of the two clips it is about to see.
FIXTURE_SPEECH = (
    ("question_type", "wav", 22050, (1.0, 1.0)),
    ("question_type", "mp3", 22050, (1.0,)),
    ("video_id", "flac", 22050, (1.0,)),
    ("question_type", "mp3", 22050, (1.0,)),
    ("id", "ogg", 44100, (1.0, 0.5)),
)


def make_fixtures(folder: Path, overwrite: bool = False) -> str:
    """Make `folder`/frames and `folder`/audio for the committed smoke.jsonl, in mixed forms; returns the report."""
    rows = read_rows([FIXTURES / "smoke.jsonl"])
    videos = list(dict.fromkeys(row["video_id"] for row in rows))
    frames: Counter = Counter()
    for video_id, name, image_format in zip(videos, ("frame", "number"), ("jpg", "png"), strict=True):
        clip = [row for row in rows if row["video_id"] == video_id]
        frames += make_frames(clip, folder / "frames", 0, FIXTURE_SIZE, name, image_format, overwrite)
    speech: Counter = Counter()
    texts = set()
    for row, (audio_name, audio_format, rate, gains) in zip(rows, FIXTURE_SPEECH, strict=True):
        path = folder / "audio" / f"{AUDIO_NAMES[audio_name].format(**row)}.{audio_format}"
        if path.exists() and not overwrite:
            speech["kept"] += 1
            continue
        samples, spoken_rate = speak(row["question"])
        n = round(len(samples) * rate / spoken_rate)
        samples = np.interp(np.arange(n) * spoken_rate / rate, np.arange(len(samples)), samples).astype(np.float32)
        save(path, encode(samples[:, None] * np.float32(gains), rate, audio_format))
        speech["spoken"] += 1
        texts.add(row["question"])
    speech["texts"] = len(texts)
    return report(len(rows), frames, speech)


# ---------------------------------------------------------------- command line


def frame_size(text: str) -> tuple[int, int]:
    """Parse "310x270" into (310, 270), both at least 28: below that a drawing shows nothing."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(int(match[1]), int(match[2])) < 28:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT with both at least 28")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; an abbreviated or unknown one is an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, nargs="+", help="JSONL files; each gets its own audio folder")
    parser.add_argument("--output_dir", type=Path, default=Path("media"), help="gets frames/ and audio/ (media)")
    parser.add_argument("--only", choices=("frames", "audio"), help="make only these (both)")
    parser.add_argument("--overwrite", action="store_true", help="make files anew that are there (they are kept)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings; the same seed gives the same bytes (0)")
    parser.add_argument("--size", type=frame_size, default=FRAME_SIZE, help="of a frame in pixels, like REAL-Colon's "
                        "1240x1080 (310x270)")  # fmt: skip
    parser.add_argument("--frame_name", choices=("frame", "number"), default="frame",
                        help="{frame}.jpg or {frame_number}.jpg (frame)")  # fmt: skip
    parser.add_argument("--frame_format", choices=("jpg", "png"), default="jpg", help="(jpg)")
    parser.add_argument("--voice", default="en-us", help="an espeak-ng voice, see `espeak-ng --voices` (en-us)")
    parser.add_argument("--speed", type=int, default=160, help="words a minute (160)")
    parser.add_argument("--audio_format", choices=tuple(AUDIO_FORMATS), default="mp3", help="(mp3)")
    parser.add_argument("--audio_name", choices=tuple(AUDIO_NAMES), default="question_type",
                        help="{video_id}_{id}_{question_type}, {video_id}_{id} or {id} (question_type)")  # fmt: skip
    parser.add_argument("--fixtures", action="store_true", help="make the committed media of the tests only")
    args = parser.parse_args(argv)
    if args.fixtures == bool(args.data_path):
        parser.error("give either --data_path or --fixtures")
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    args = parse_args(argv)
    if args.fixtures:
        require_espeak()
        print(make_fixtures(FIXTURES, args.overwrite))
        return

    # Everything that can be refused is refused before the first file is made.
    rows = read_rows(args.data_path)
    frames = speech = None
    if args.only != "frames":
        files = speech_files(rows, args.output_dir / "audio", args.audio_name, args.audio_format)
        if args.overwrite or not all(path.exists() for path in files):
            require_espeak()
        speech = make_speech(files, args.voice, args.speed, args.audio_format, args.overwrite)
    if args.only != "audio":
        frames = make_frames(
            rows, args.output_dir / "frames", args.seed, args.size, args.frame_name, args.frame_format, args.overwrite
        )
    print(report(len(rows), frames, speech))


if __name__ == "__main__":
    main()
