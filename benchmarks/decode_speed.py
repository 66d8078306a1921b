"""How many samples per second one CPU core prepares: decoded, stage by stage, and read from a feature cache.

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --frames dataset/frames/002-001/*.jpg --speech audio/in_002-001/*.mp3

Without files it draws frames of 1240 x 1080 with tests/make_media.py and uses the speech of the tests. A sample has
`--frames_per_clip` frames and one speech file. The cached files have the size of the 7B model's features in bf16 (8
frames of [168, 3584], speech of [1500, 1280]) and are read from the page cache. `draft` decodes a JPEG at half its
size; the values that differ from full decoding are counted. One thread; CPU time, so that other work on the machine
does not count.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from tests import make_media

FIXTURES = make_media.FIXTURES


def milliseconds(call: Callable, repeats: int) -> float:
    """The median CPU time of `call` in ms, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def draw_frames(folder: Path, count: int) -> list[Path]:
    """Write `count` drawings of 1240 x 1080 as JPEG files."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    images = make_media.draw_clip(make_media.Scene(), count, (1240, 1080), np.random.default_rng(0))
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(make_media.image_bytes(image, "jpg"))
    return paths


def load_draft(path: Path, size: int) -> Image.Image:
    """`vqa.load_frame` with the JPEG decoded at the smallest scale that is not below the target size."""
    with Image.open(path) as image:
        wanted = vqa.fit_size(image.size, size)
        image.draft("RGB", wanted)
        return image.convert("RGB").resize(wanted, Image.Resampling.BICUBIC, reducing_gap=2.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=Path, nargs="*", default=[], help="image files. None: drawings")
    parser.add_argument("--speech", type=Path, nargs="*", default=[], help="speech files. None: those of the tests")
    parser.add_argument("--frames_per_clip", type=int, default=8, help="frames of a sample (8)")
    parser.add_argument("--max_image_size", type=int, default=384, help="longer side of a frame in pixels (384)")
    parser.add_argument("--repeats", type=int, default=10, help="times that each stage is measured (10)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = vqa.load_config(FIXTURES / "full_size_model")
    tokenizer = vqa.load_tokenizer(FIXTURES / "full_size_model")
    processor = vqa.VQAProcessor(tokenizer, config, args.max_image_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = args.frames or draw_frames(folder, args.frames_per_clip)
        clip = list(islice(cycle(paths), args.frames_per_clip))
        speech_path = (args.speech or sorted((FIXTURES / "audio").iterdir()))[0]
        row = vqa.VQARow("benchmark", 1, "q", "v", ("v_1",), "What is seen?", "t", "An answer.", "answer", speech_path)
        decoded = [vqa.decode_frame(path) for path in clip]
        frames = [vqa.load_frame(path, args.max_image_size) for path in clip]
        speech = vqa.load_speech(speech_path)
        target = vqa.fit_size(decoded[0].size, args.max_image_size)
        pixels, _ = processor.patches_of(frames)
        vision = torch.randn(1344, 3584).bfloat16()
        audio = torch.randn(1500, 1280).bfloat16()
        vqa.write_features(folder / "vision", vision, torch.tensor([[1, 24, 28]] * 8))
        vqa.write_features(folder / "speech", audio, torch.tensor([1500]))

        def resize() -> None:
            for image in decoded:
                image.resize(target, Image.Resampling.BICUBIC, reducing_gap=2.0)

        def uncached() -> None:
            media = [vqa.load_frame(path, args.max_image_size) for path in clip], vqa.load_speech(speech_path)
            collate([processor.make_sample(row, *media, True)])

        def cached() -> None:
            images, (voice, _) = vqa.read_features(folder / "vision"), vqa.read_features(folder / "speech")
            collate([processor.make_sample(row, (), None, True, images, voice)])

        collate = vqa.VQACollator(tokenizer.pad_token_id)
        stages = {
            f"decode {len(clip)} frames of {decoded[0].width} x {decoded[0].height}": lambda: [
                vqa.decode_frame(path) for path in clip
            ],
            f"  the same at draft scale, and resize to {target[0]} x {target[1]}": lambda: [
                load_draft(path, args.max_image_size) for path in clip
            ],
            f"resize to {target[0]} x {target[1]}": resize,
            f"cut into {len(pixels)} patches": lambda: processor.patches_of(frames),
            f"decode {len(speech) / vqa.SAMPLE_RATE:.1f} s of speech and resample": lambda: vqa.load_speech(
                speech_path
            ),
            "mel of 30 s": lambda: processor.log_mel(speech, speech_path),
            "tokens": lambda: processor.build(row.question, [168] * len(clip), 1500, row.answer),
            "read features of a clip": lambda: vqa.read_features(folder / "vision"),
            "read features of a speech": lambda: vqa.read_features(folder / "speech"),
        }
        for stage, call in stages.items():
            print(f"{stage:70} {milliseconds(call, args.repeats):8.1f} ms")
        for what, call in (("decoded", uncached), ("from the cache", cached)):
            print(
                f"{'a sample, ' + what + ', collated':70} {1000 / milliseconds(call, args.repeats):8.1f} per s and core"
            )
        difference = np.abs(
            np.stack([np.asarray(frame, dtype=np.int16) for frame in frames])
            - np.stack([np.asarray(load_draft(path, args.max_image_size), dtype=np.int16) for path in clip])
        )
        share, mean, most = 100 * (difference > 0).mean(), difference.mean(), difference.max()
        print(f"draft scale changes {share:.1f} % of the values, by {mean:.2f} of 255 on average and {most} at most")


if __name__ == "__main__":
    main()
