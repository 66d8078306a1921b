"""Estimates of `--dry_run` beside measured peaks, full size, on one GPU; and runs that do not fit.

    python benchmarks/plan_check.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path in_002-001.jsonl --frames_dir media/frames --audio_dir media/audio/in_002-001 \\
        --work_dir /tmp/plan --output plan.json

A 16-bit folder with random weights (18 GB) is written first. Each configuration is planned, then trained for `--steps`
steps and evaluated on 10 questions, in processes of their own. A peak is the largest of the phases that the run prints.
Those that do not fit are planned and trained under a cap: the plan must have status 1, and the run must end out of
memory. Parts that would begin after `--seconds` are left out.
"""

import argparse
import gc
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.four_bits import write_folder
from benchmarks.speed_common import add_data_flags, machine

SCRIPT = Path(__file__).resolve().parent.parent / "train_vqa.py"
FAST = "--audio_tokens speech --frame_mode video"
EVALUATION = "--eval_strategy steps --eval_steps 2"
FITTING = {  # name: flags
    "command": "",
    "command, evaluated at batch 1": "--per_device_eval_batch_size 1",
    "8-bit Adam": "--optim adamw_bnb_8bit",
    "4 bits": "--load_in_4bit True",
    "4 bits, 8-bit Adam": "--load_in_4bit True --optim adamw_bnb_8bit --per_device_eval_batch_size 1",
    "batch 4, fewer tokens": f"{FAST} --per_device_train_batch_size 4 --checkpoint_every_n 2",
}
CAPPED = {
    "command in 16 GiB": "--gpu_memory_limit_gib 16 --per_device_eval_batch_size 1",
    "4 bits in 9 GiB": "--gpu_memory_limit_gib 9 --load_in_4bit True --per_device_eval_batch_size 1",
    "nothing recomputed in 24 GiB": "--gpu_memory_limit_gib 24 --checkpoint_every_n 0 --per_device_eval_batch_size 1",
}


def run(flags: list[str]) -> tuple[int, str]:
    """Status and all output of train_vqa.py."""
    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def largest(pattern: str, printed: str) -> float | None:
    """The largest number that `pattern` finds, None where there is none."""
    return max(map(float, re.findall(pattern, printed, re.M)), default=None)


def compare(flags: list[str], folder: Path) -> dict:
    """One configuration planned and trained: status of both, estimate and peak in GiB."""
    planned, plan = run([*flags, "--dry_run"])
    status, printed = run([*flags, "--output_dir", str(folder)])
    peaks = next((line for line in printed.splitlines() if line.startswith("Peak GPU memory:")), "")
    result = {"plan status": planned, "run status": status, "estimate": largest(r"^memory: about (\S+) GiB", plan)}
    result |= {
        "peak": largest(r" ([\d.]+) GiB", peaks),
        "peaks": peaks,
        "out of memory": bool(re.search("out of memory|into memory", printed)),
    }
    result["verdict"] = next((line for line in plan.splitlines() if line.startswith("error: ")), "")
    if status and not result["out of memory"]:
        print(printed[-2000:], flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the model (18 GB)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (4)")
    parser.add_argument("--seconds", type=float, default=440, help="begin no configuration after so many (440)")
    parser.add_argument("--only", default="", help="only configurations whose names match this pattern")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=FLAGS", help="one more to compare")
    parser.add_argument("--flags", default="", help="more flags for train_vqa.py")
    parser.add_argument("--output", type=Path, required=True, help="file for the figures as JSON")
    args = parser.parse_args(argv)
    began, results, model = time.perf_counter(), {"machine": machine()}, args.work_dir / "model"
    if not model.is_dir():
        write_folder(args.model_name_or_path, model)
        gc.collect()
        torch.cuda.empty_cache()
    common = ["--model_name_or_path", str(model), "--bf16", "True"]
    common += ["--frames_dir", args.frames_dir, "--audio_dir", str(args.audio_dir), "--max_steps", str(args.steps)]
    common += ["--train_data_path", str(args.data_path), "--eval_data_path", str(args.data_path)]
    common += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_strategy", "no"]
    common += ["--max_eval_samples", "10", "--report_to", "none", "--disable_tqdm", "True", *EVALUATION.split()]
    more = dict(config.split("=", 1) for config in args.config)
    print(f"{'configuration':32} {'plan':>5} {'run':>5} {'estimate':>9} {'peak':>6} {'difference':>11}")
    for name, flags in (FITTING | more | CAPPED).items():
        if not re.search(args.only, name):
            continue
        if time.perf_counter() - began > args.seconds:
            print(f"{name:32} left out: time is over")
            continue
        with tempfile.TemporaryDirectory() as folder:
            given = [*common, *args.flags.split(), *shlex.split(flags)]
            results[name] = found = compare(given, Path(folder) / "out")
        peak, estimate = found["peak"], found["estimate"]
        ratio = f"{100 * (estimate / peak - 1):+.1f} %" if peak and estimate else "-"
        ended = "OOM" if found["out of memory"] else found["run status"]
        print(f"{name:32} {found['plan status']:5} {ended!s:>5} {estimate!s:>9} {peak!s:>6} {ratio:>11}")
        print(f"   {found['peaks'] or found['verdict']}", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
