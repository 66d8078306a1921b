"""Training and answering in 4 bits beside bf16, full size, within the memory of a 24 GB card.

    python benchmarks/four_bits.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path in_002-001.jsonl --frames_dir media/frames --audio_dir media/audio/in_002-001 \\
        --gpu_memory_limit_gib 22.5 --work_dir /tmp/four_bits --output four_bits.json

A 16-bit folder with random weights (18 GB) is written first. Then, for 4 bits and for bf16: the seed's command (batch
1, 4 batches a step, every layer recomputed) with an evaluation and a save at its last step, answers to `--rows`
questions, and the smallest cap under which two steps of one batch train. In 4 bits also a run that goes on from the
save, and steps with `adamw_bnb_8bit`. All in one process, to save its starts: `left` is what a part before left on the
GPU. Parts that would begin after `--seconds` are left out. Peaks are of what the allocator reserved.
"""

import argparse
import gc
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_checkpoint as ev
import train_vqa as vqa
from benchmarks.speed_common import add_data_flags, machine, synchronize

CUDA = torch.cuda.is_available()
ACCUMULATION, WARMUP = 4, 2
MODES = {"4 bits": ("--load_in_4bit", "True"), "bf16": ()}


def peak_gib() -> float | None:
    """What the allocator reserved at most since the last reset."""
    return torch.cuda.max_memory_reserved() / vqa.GIB if CUDA else None


class Clock(TrainerCallback):
    """Loading, steps and peaks of a run of train_vqa.py or evaluate_checkpoint.py in this process."""

    def __init__(self):
        self.figures, self.ends, self.memory = {}, [], None
        self.load_model, self.make_trainer = vqa.load_model, vqa.make_trainer

    def load(self, *args, **kwargs):
        """`load_model`, timed."""
        start = time.perf_counter()
        model = self.load_model(*args, **kwargs)
        synchronize()
        self.figures |= {"load_seconds": time.perf_counter() - start, "load_peak_gib": peak_gib()}
        if CUDA:
            self.figures["loaded_gib"] = torch.cuda.memory_allocated() / vqa.GIB
        return model

    def trainer(self, trained, datasets, settings, multiple, callbacks, *args):
        """`make_trainer`, with this clock among the callbacks."""
        self.memory = callbacks[0]
        return self.make_trainer(trained, datasets, settings, multiple, [*callbacks, self], *args)

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer."""
        synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer."""
        self.figures |= {name: float(logs[name]) for name in ("loss", "eval_loss") if name in (logs or {})}

    def run(self, entry, flags) -> dict:
        """Call `entry` with `flags`; figures, or why it failed."""
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.figures["left_gib"] = torch.cuda.memory_reserved() / vqa.GIB
        start = time.perf_counter()
        try:
            with patch.object(vqa, "load_model", self.load), patch.object(vqa, "make_trainer", self.trainer):
                status = entry([str(word) for word in flags])
        except (vqa.VQAError, torch.OutOfMemoryError) as error:
            status = vqa.first_line(error)
        self.figures |= {"status": status, "seconds": time.perf_counter() - start}
        if entry is ev.main:
            self.figures["peak_gib"] = peak_gib()
        elif self.memory:
            self.figures["peak_gib"] = self.memory.gib
        if len(self.ends) > WARMUP + 1:
            steps = len(self.ends) - WARMUP
            self.figures["samples_per_second"] = ACCUMULATION * steps / (self.ends[-1] - self.ends[WARMUP - 1])
        self.memory = None
        return self.figures


def write_folder(base: str, folder: Path) -> None:
    """A model folder with random weights in bf16, drawn on the GPU."""
    tokenizer = vqa.load_tokenizer(base)
    device = "cuda" if CUDA else "cpu"
    model = vqa.load_model(base, tokenizer, init="random", dtype=torch.bfloat16, device=device)
    folder.mkdir(parents=True)
    vqa.write_weights(model, folder)
    vqa.write_config_and_tokenizer(model, tokenizer, Path(base), folder)


def smallest_cap(train, highest: float, trials: int) -> dict:
    """Halve the gap between a cap of 6 GiB below `highest` and it, `trials` times; caps in GiB with how each ended."""
    low, high, tried = highest - 6, highest, {}
    for _ in range(trials):
        cap = round((low + high) / 2, 2)
        tried[cap] = train(cap)
        low, high = (low, cap) if tried[cap] == 0 else (cap, high)
    return {"smallest": high, "does not train": low, "tried": tried}


def main() -> None:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the model (18 GB) and what is trained")
    parser.add_argument("--gpu_memory_limit_gib", type=float, default=22.5, help="memory of the card rehearsed (22.5)")
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps, the first {WARMUP} not timed (8)")
    parser.add_argument("--rows", type=int, default=50, help="questions to answer (50)")
    parser.add_argument("--trials", type=int, default=4, help="caps to try for each (4)")
    parser.add_argument("--seconds", type=float, default=480, help="begin no part after so many (480)")
    parser.add_argument("--flags", default="", help="more flags for train_vqa.py")
    parser.add_argument("--output", type=Path, required=True, help="file for the figures as JSON")
    args = parser.parse_args()
    began, results = time.perf_counter(), {"machine": machine()}

    def part(name: str, work) -> dict:
        if (now := time.perf_counter() - began) > args.seconds:
            print(f"== {name}: left out, {now:.0f} s are over", flush=True)
            return {}
        print(f"== {name} ({now:.0f} s)", flush=True)
        results[name] = work() or {}
        print(f"   {name}: {json.dumps(results[name])}", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        return results[name]

    folder = args.work_dir / "model"
    part("write", partial(write_folder, args.model_name_or_path, folder))
    data = ["--frames_dir", args.frames_dir, "--audio_dir", args.audio_dir]

    def train(mode: str, output: str, steps: int, *more, cap: float | None = None, accumulation: int = ACCUMULATION):
        flags = ["--model_name_or_path", folder, "--train_data_path", args.data_path, *data, "--max_steps", steps]
        flags += ["--output_dir", args.work_dir / output, "--per_device_train_batch_size", 1, "--bf16", "True"]
        flags += ["--gradient_accumulation_steps", accumulation, "--learning_rate", 2e-4, "--logging_steps", 1]
        flags += ["--report_to", "none", "--disable_tqdm", "True", *MODES[mode], *args.flags.split(), *more]
        flags += ["--gpu_memory_limit_gib", cap or args.gpu_memory_limit_gib] * CUDA
        return Clock().run(vqa.main, flags)

    def answer(mode: str):
        flags = ["--checkpoint_path", args.work_dir / mode, "--eval_data_path", args.data_path, *data]
        flags += ["--output_file", args.work_dir / f"{mode}.jsonl", "--limit", args.rows, "--max_new_tokens", 12]
        flags += ["--gpu_memory_limit_gib", args.gpu_memory_limit_gib] * CUDA
        return Clock().run(ev.main, flags)

    def two_steps(mode: str, cap: float):
        shutil.rmtree(args.work_dir / "trial", ignore_errors=True)  # what a trial saved that ran out of memory
        figures = train(mode, "trial", 2, "--save_strategy", "no", cap=cap, accumulation=1)
        print(f"   cap {cap}: {figures}", flush=True)
        return figures["status"]

    evaluation = ["--eval_data_path", args.data_path, "--max_eval_samples", 10, "--eval_strategy", "steps"]
    evaluation += ["--per_device_eval_batch_size", 1, "--eval_steps", args.steps]
    peaks = {}
    for mode in MODES:
        saves = ("--save_strategy", "steps", "--save_steps", args.steps)
        figures = part(f"train, {mode}", partial(train, mode, mode, args.steps, *evaluation, *saves))
        peaks[mode] = max((figures.get("peak_gib") or {"": args.gpu_memory_limit_gib}).values())
        part(f"answers, {mode}", partial(answer, mode))
        if MODES[mode]:
            checkpoint = args.work_dir / mode / f"checkpoint-{args.steps}"
            go_on = ("--save_strategy", "no", "--resume_from_checkpoint", checkpoint)
            part(f"go on, {mode}", partial(train, mode, mode, args.steps + 2, *go_on))
    for mode, peak in peaks.items():
        part(f"smallest cap, {mode}", partial(smallest_cap, partial(two_steps, mode), peak, args.trials))
    if CUDA:  # bitsandbytes has no such optimizer for a CPU
        eight = ("--optim", "adamw_bnb_8bit", "--save_strategy", "no")
        part("adamw_bnb_8bit", partial(train, "4 bits", "eight", args.steps, *eight))


if __name__ == "__main__":
    main()
