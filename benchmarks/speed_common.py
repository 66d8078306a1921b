"""Shared by the speed benchmarks: the ceiling of the machine, its versions, common flags, rows repeated to fill a
run."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate")


def matmul_ceiling(size: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of bf16 products [size, size] x [size, size] of random numbers; on a CPU in float32 and smaller."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    size, repeats = (size, repeats) if cuda else (512, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict:
    """Device, Python and package versions of this run."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu ({platform.processor()})"
    return {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and its data."""
    parser.add_argument("--model_name_or_path", required=True, help="folder with config and tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="JSONL of questions")
    parser.add_argument("--frames_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--audio_dir", type=Path, required=True, help="as in train_vqa.py")


def repeat_rows(data_path: Path, audio_dir: Path, count: int, folder: Path, frames: int | None = None) -> list[str]:
    """Write `count` rows to `folder`/rows.jsonl: those of `data_path`, repeated under new ids.

    Their speech is linked under the new ids. The frames are the same files, `frames` of them per clip (repeated in
    order if a clip has fewer). Returns the flags that name the rows and the speech.
    """
    import train_vqa as vqa

    rows = [json.loads(line) for line in Path(data_path).read_text().splitlines() if line.strip()]
    stored = vqa.read_rows(data_path)
    vqa.find_media(stored, folder, audio_dir)
    speech = folder / "speech"
    speech.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            row, path = rows[number % len(rows)], stored[number % len(rows)].audio_path
            row = {**row, "id": f"{row['id']}-{number // len(rows)}"}
            if frames:
                row["frames"] = [row["frames"][i * len(row["frames"]) // frames] for i in range(frames)]
            file.write(json.dumps(row) + "\n")
            link = speech / f"{row['video_id']}_{row['id']}_{row['question_type']}{path.suffix}"
            if not link.exists():
                os.link(path, link)
    return ["--train_data_path", str(folder / "rows.jsonl"), "--audio_dir", str(speech)]


def decoder_parameters(model) -> int:
    """Parameters of the decoder's layers without adapters: N in 4 N T (a training step without recomputation)."""
    layers = model.model.language_model.layers
    return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)
