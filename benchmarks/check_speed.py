"""How long --check_data takes for a large file, the first time and again, and how much memory a row takes.

    taskset -c 0,1 python benchmarks/check_speed.py --rows 5200 --json check_speed.json

Each row has eight JPEGs of 1240 x 1080 and one MP3 of 4 s. No file name occurs in two rows. The files are hard links to
16 frames and 16 MP3s, so that they are made in seconds and reading them costs no disk access; each name is decoded all
the same. For comparison, a plain loop decodes every tenth file in two threads. The output has CPU seconds beside clock
seconds, because CPU seconds hardly depend on other work of the machine. Cold is the first check, warm the second, which
remembers the files that passed. The memory of a row is (peak for all rows - peak for the first tenth) / number of other
rows, warm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FRAMES, DISTINCT, SIZE = 8, 16, (1240, 1080)
ROWS_A_VIDEO = 100

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
    """Write `count` rows to folder/rows.jsonl, and their media."""
    row = json.loads((ROOT / "tests/fixtures/smoke.jsonl").read_text().splitlines()[1])
    draw = np.random.default_rng(0)
    for part in ("frames", "audio"):
        (folder / part).mkdir()
    for number in range(DISTINCT):
        coarse = Image.fromarray(draw.integers(0, 255, (72, 96, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        tone = 0.3 * np.sin(2 * np.pi * (200 + 10 * number) * np.arange(4 * 24000) / 24000)
        soundfile.write(folder / f"{number}.mp3", tone, 24000)
    with (folder / "rows.jsonl").open("w") as out:
        for number in range(count):
            video, name = f"v-{number // ROWS_A_VIDEO}", f"qa_{number:06}"
            (folder / "frames" / video).mkdir(exist_ok=True)
            frames = [f"{video}_{number % ROWS_A_VIDEO * FRAMES + place}" for place in range(FRAMES)]
            for place, frame in enumerate(frames):
                os.link(folder / f"{(number + place) % DISTINCT}.jpg", folder / f"frames/{video}/{frame}.jpg")
            os.link(folder / f"{number % DISTINCT}.mp3", folder / f"audio/{video}_{name}.mp3")
            out.write(json.dumps({**row, "id": name, "video_id": video, "frames": frames}) + "\n")


def timed(command: list, environment: dict, text: str = "") -> tuple[float, float, int]:
    """Run a command with `text` as its input; returns seconds, CPU seconds and peak bytes."""
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process.stdin.write(text)
    process.stdin.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[1]} ended with {process.returncode}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def check(folder: Path, rows: int | None = None) -> tuple[float, float, int]:
    """`timed` for a process that checks the first `rows` rows. None: all."""
    command = [sys.executable, ROOT / "train_vqa.py", "--check_data", "--train_data_path", folder / "rows.jsonl"]
    command += ["--frames_dir", folder / "frames", "--audio_dir", folder / "audio"]
    command += ["--allow_empty_frames", "True"]  # the links have equal bytes
    command += ["--max_train_samples", rows] if rows else []
    return timed(command, {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5200, help="rows of the file (5200)")
    parser.add_argument("--json", type=Path, help="file for the figures. None: only print them")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="check_speed_"))
    try:
        make_data(folder, args.rows)
        files = [str(path) for part in ("frames", "audio") for path in sorted((folder / part).rglob("*.*"))]
        load = os.getloadavg()[0]
        plain, plain_cpu, _ = timed([sys.executable, "-c", PLAIN_LOOP], dict(os.environ), "\n".join(files[::10]))
        cold, cold_cpu, _ = check(folder)
        warm, warm_cpu, peak = check(folder)
        tenth, _, few = check(folder, args.rows // 10)
    finally:
        shutil.rmtree(folder)
    figures = {
        "rows": args.rows,
        "files": len(files),
        "plain_seconds_a_file": plain / len(files[::10]),
        "plain_cpu_seconds_a_file": plain_cpu / len(files[::10]),
        "cold_seconds": cold,
        "cold_cpu_seconds": cold_cpu,
        "cold_cpu_over_plain_cpu": cold_cpu / plain_cpu * len(files[::10]) / len(files),
        "warm_seconds": warm,
        "warm_cpu_seconds": warm_cpu,
        "warm_tenth_seconds": tenth,
        "peak_mib": peak / 2**20,
        "bytes_a_row": (peak - few) / (args.rows - args.rows // 10),
        "load_before": load,
        "cores": len(os.sched_getaffinity(0)),
    }
    print("\n".join(f"{name}: {value:,.2f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
