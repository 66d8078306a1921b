"""How long --check_data takes over a large file, with nothing remembered and again, and how much memory a row takes.

    python benchmarks/check_speed.py --rows 5200 --json check_speed.json

Makes rows of eight 720 x 540 JPEGs and one 2 s MP3 each: a clip carries seven questions, as in the dataset, so the
frames of one clip are shared by seven rows and each row has speech of its own. Beside it, a plain loop decodes the same
files in two threads. Memory is the peak of a process over all rows less that over the first tenth, a row, warm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FRAMES, QUESTIONS, SIZE = 8, 7, (720, 540)

PLAIN_LOOP = """
import sys
from concurrent.futures import ThreadPoolExecutor
import soundfile
from PIL import Image
def decode(path):
    if path.endswith("mp3"): soundfile.read(path, dtype="float32")
    else: Image.open(path).convert("RGB")
with ThreadPoolExecutor(2) as pool:
    for _ in pool.map(decode, sys.stdin.read().split()): pass
"""


def make_data(folder: Path, count: int) -> None:
    """Write `count` rows to folder/rows.jsonl and their media, every file with content of its own."""
    row = json.loads((ROOT / "tests/fixtures/smoke.jsonl").read_text().splitlines()[1])
    draw = np.random.default_rng(0)
    (folder / "audio").mkdir()
    noise = Image.fromarray(draw.integers(0, 255, (36, 48, 3), dtype=np.uint8)).resize((900, 700), Image.BICUBIC)

    def frame(clip: int, place: int) -> None:
        left, top = (clip * 37 + place * 11) % 180, (clip * 53 + place * 7) % 160
        image = noise.crop((left, top, left + SIZE[0], top + SIZE[1]))
        image.putpixel((0, 0), (clip % 256, clip // 256, place))
        image.save(folder / f"frames/v-{clip}/v-{clip}_{place}.jpg", quality=90, comment=f"{clip} {place}".encode())

    def speech(number: int) -> None:
        tone = 0.3 * np.sin(2 * np.pi * (200 + number / 10) * np.arange(32000) / 16000)
        soundfile.write(folder / f"audio/v-{number // QUESTIONS}_qa_{number:06}.mp3", tone, 16000)

    clips = -(-count // QUESTIONS)
    for clip in range(clips):
        (folder / f"frames/v-{clip}").mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: frame(*divmod(n, FRAMES)), range(clips * FRAMES)))
        list(pool.map(speech, range(count)))
    with (folder / "rows.jsonl").open("w") as out:
        for number in range(count):
            video = f"v-{number // QUESTIONS}"
            frames = [f"{video}_{place}" for place in range(FRAMES)]
            out.write(json.dumps({**row, "id": f"qa_{number:06}", "video_id": video, "frames": frames}) + "\n")


def check(folder: Path, rows: int | None = None) -> tuple[float, int]:
    """Seconds and peak bytes of a process that checks the first `rows` rows (None: all)."""
    command = [sys.executable, ROOT / "train_vqa.py", "--check_data", "--train_data_path", folder / "rows.jsonl"]
    command += ["--frames_dir", folder / "frames", "--audio_dir", folder / "audio"]
    command += ["--max_train_samples", rows] if rows else []
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    start = time.monotonic()
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"--check_data ended with {process.returncode}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5200, help="rows of the file")
    parser.add_argument("--json", type=Path, help="write the figures there; without it they are only printed")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="check_speed_"))
    try:
        make_data(folder, args.rows)
        files = [str(path) for part in ("frames", "audio") for path in sorted((folder / part).rglob("*.*"))]
        load = os.getloadavg()[0]
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", PLAIN_LOOP], input="\n".join(files), text=True, check=True)
        plain = time.monotonic() - start
        cold, _ = check(folder)
        warm, peak = check(folder)
        tenth, few = check(folder, args.rows // 10)
    finally:
        shutil.rmtree(folder)
    figures = {
        "rows": args.rows,
        "files": len(files),
        "plain_loop_seconds": plain,
        "cold_seconds": cold,
        "cold_over_plain": cold / plain,
        "warm_seconds": warm,
        "warm_tenth_seconds": tenth,
        "peak_mib": peak / 2**20,
        "bytes_a_row": (peak - few) / (args.rows - args.rows // 10),
        "load_before": load,
        "cores": os.cpu_count(),
    }
    print("\n".join(f"{name}: {value:,.2f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
