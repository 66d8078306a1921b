"""Samples a second and memory of training: the seed's design beside ours, full size, random weights, real code paths.

    python benchmarks/train_speed.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path in_002-001.jsonl --frames_dir media/frames --audio_dir media/audio/in_002-001 \\
        --designs seed,command,ours,fast --gpu_memory_limit_gib 38.5 --output train_speed.json

Each design is a process of its own over the same rows. `seed` is plain Trainer and PEFT: batch 1, every layer
recomputed, logits of every position, a mask of ones, LoRA inputs cast to float32. The others run `train_vqa.py`'s own
`main` with the flags that DESIGNS names (or `--design NAME=FLAGS`). All of them get the same loader workers. A step is
timed from the end of the one before it, data, optimizer and Trainer included; the first ones do not count.

TFLOP/s follow the rule (4 + 2 s) N T: N parameters of the decoder's layers, T tokens, s the share of layers that are
recomputed (6 N T where all are). What attention, the encoders and LoRA cost is not in it.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from benchmarks.eval_memory import GatheringModel
from benchmarks.speed_common import decoder_parameters, machine, matmul_ceiling, repeat_rows, synchronize

SEED = "seed"
FAST = "--audio_tokens speech --frame_mode video"
QUICK = "--compile_layers True --checkpoint_every_n 0"
DESIGNS = {
    SEED: "",
    "command": "--per_device_train_batch_size 1 --gradient_accumulation_steps 4",
    "ours": f"--per_device_train_batch_size 2 --gradient_accumulation_steps 2 {QUICK}",
    "fast": f"--per_device_train_batch_size 7 --gradient_accumulation_steps 1 {FAST} {QUICK}",
}


class Clock(TrainerCallback):
    """Times optimizer steps; `trainer` tells tokens, samples and the wait for data of each."""

    def __init__(self, warmup: int, profile: Path | None):
        self.warmup, self.profile, self.steps, self.trainer = warmup, profile, [], None
        self.profiler = None

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each optimizer step."""
        synchronize()
        now = time.perf_counter()
        own = {"cpu": time.process_time(), "rss": psutil.Process().memory_info().rss}  # of this process, workers apart
        self.steps.append({"end": now, **own, **self.trainer.counted})
        self.trainer.counted = {"tokens": 0, "samples": 0, "waited": 0.0}
        if state.global_step == self.warmup and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.profile and state.global_step == state.max_steps - 2:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities[: 1 + torch.cuda.is_available()])
            self.profiler.start()
        elif self.profiler and state.global_step == state.max_steps - 1:  # one step lies between the two
            self.profiler.stop()
            self.profile.write_text(kernel_table(self.profiler))

    def figures(self) -> dict:
        """Medians and sums of the steps that count; a profiled step is not one of them."""
        last = len(self.steps) - (2 if self.profile else 0)
        counted = self.steps[self.warmup : last]
        seconds = counted[-1]["end"] - self.steps[self.warmup - 1]["end"]
        total = {name: sum(step[name] for step in counted) for name in ("tokens", "samples", "waited")}
        result = {"steps": len(counted), "seconds": seconds, "samples_per_second": total["samples"] / seconds}
        result |= {"tokens_per_second": total["tokens"] / seconds, "waiting_for_data": total["waited"] / seconds}
        result["tokens_per_sample"] = total["tokens"] / total["samples"]
        before, after = self.steps[self.warmup - 1], counted[-1]
        result["ram_mib"] = [step["rss"] / 2**20 for step in (before, after)]
        result["cpu_seconds_per_sample"] = (after["cpu"] - before["cpu"]) / total["samples"]
        if torch.cuda.is_available():
            result["peak_gib"] = torch.cuda.max_memory_reserved() / vqa.GIB
        return result


def kernel_table(profiler: torch.profiler.profile) -> str:
    """Milliseconds of one step by kind of kernel, and the 25 kernels that take longest."""
    kinds = {"matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm"), "attention": ("flash", "fmha")}
    kinds |= {
        "optimizer": ("multi_tensor", "fused_adam"),
        "compiled": ("triton_",),
        "dropout": ("dropout", "masked_scale"),
    }
    kinds |= {"copies and casts": ("memcpy", "copy", "direct_copy")}
    kernels = [event for event in profiler.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    rows = [(event.key, event.self_device_time_total / 1e3, event.count) for event in kernels]
    rows.sort(key=lambda row: -row[1])
    sums = {}
    for key, milliseconds, _ in rows:
        kind = next((kind for kind, words in kinds.items() if any(word in key.lower() for word in words)), "other")
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    lines = [f"{kind:20} {ms:9.2f} ms" for kind, ms in sorted(sums.items(), key=lambda item: -item[1])]
    return "\n".join([*lines, "", *(f"{ms:9.2f} ms {count:6} x {key[:110]}" for key, ms, count in rows[:25])]) + "\n"


def counting(base: type, clock: Clock) -> type:
    """`base`, a Trainer class, which counts what it gets from its loader and how long it waits, for `clock`."""

    class Counting(base):
        """See `counting`."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            clock.trainer, self.counted = self, {"tokens": 0, "samples": 0, "waited": 0.0}
            self.add_callback(clock)

        def get_batch_samples(self, *args, **kwargs):
            """As usual, counted and timed."""
            start = time.perf_counter()
            batches, items = super().get_batch_samples(*args, **kwargs)
            self.counted["waited"] += time.perf_counter() - start
            for batch in batches:
                self.counted["tokens"] += batch["input_ids"].numel()
                self.counted["samples"] += len(batch["input_ids"])
            return batches, items

        def save_model(self, output_dir=None, _internal_call=False):
            """Nothing at the end: a save is not what is measured. A checkpoint after a failure is written as usual."""
            if _internal_call:
                super().save_model(output_dir, _internal_call)

    return Counting


def run_seed(args: argparse.Namespace, flags: list[str], clock: Clock) -> tuple[int, int]:
    """Train as the seed's design does; returns N, and 1: every layer is recomputed."""
    parsed, data, training = vqa.parse_arguments(flags)
    vqa.limit_gpu_memory(parsed.gpu_memory_limit_gib)
    cuda = torch.cuda.is_available()
    tokenizer = vqa.load_tokenizer(parsed.model_name_or_path)
    model = vqa.load_model(
        parsed.model_name_or_path,
        tokenizer,
        init="random",
        dtype=torch.bfloat16 if cuda else torch.float32,
        device="cuda" if cuda else "cpu",
    )
    model.__class__ = GatheringModel
    peft_model = vqa.add_lora(model, parsed.lora_r, parsed.lora_alpha, parsed.lora_dropout)
    processor = vqa.VQAProcessor(tokenizer, model.config, data.max_image_size)
    rows = vqa.load_rows(data.train_data_path, data.frames_dir, data.audio_dir)
    plain = TrainingArguments(
        output_dir=training.output_dir,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=2e-4,
        max_steps=args.steps,
        bf16=cuda,
        use_cpu=not cuda,
        dataloader_num_workers=training.dataloader_num_workers,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = counting(Trainer, clock)(
        model=peft_model,
        args=plain,
        train_dataset=vqa.SurgicalVQADataset(rows, processor),
        data_collator=vqa.VQACollator(tokenizer.pad_token_id, "left"),  # the side that brings a mask
    )
    trainer.train()
    return decoder_parameters(model), 1


def run_ours(clock: Clock, flags: list[str]) -> tuple[int, int]:
    """Train by `train_vqa.main`; returns N, and which layers it recomputes: every n-th, 0 none."""
    vqa.VQATrainer = counting(vqa.VQATrainer, clock)
    choose, chosen = vqa.choose_checkpointing, []
    vqa.choose_checkpointing = lambda *args: chosen.append(choose(*args)) or chosen[-1]
    if vqa.main(flags):
        raise SystemExit("training failed")
    return decoder_parameters(clock.trainer.model.get_base_model()), chosen[-1]


def flops_factor(layers: int, every_n: int) -> float:
    """Operations a parameter and token: 2 forward, 2 backward, 2 more in every `every_n`-th layer (0: in none)."""
    return 4 + 2 * (math.ceil(layers / every_n) / layers if every_n else 0)


def measure(args: argparse.Namespace, name: str, design: str) -> None:
    """Child process: train as `design` says and write the figures to `args.output`."""
    vqa.set_seed(0)
    clock = Clock(args.warmup, args.output.with_suffix(".profile.txt") if args.profile else None)
    flags = shlex.split(args.flags) + shlex.split(design)
    try:
        parameters, every_n = run_seed(args, flags, clock) if name == SEED else run_ours(clock, flags)
        result = clock.figures()
        factor = flops_factor(clock.trainer.model.config.text_config.num_hidden_layers, every_n)
        result["tflops"] = factor * parameters * result["tokens_per_second"] / 1e12
        result |= {"rule": f"{factor:.3g} N T", "every_n": every_n}
    except (torch.OutOfMemoryError, vqa.VQAError) as error:
        result = {"failed": str(error).splitlines()[0][:300]}
    args.output.write_text(json.dumps({"design": name, "flags": design, **result}))


def table(results: list[dict], ceiling: float) -> str:
    """The figures of all designs as lines of text."""
    reference = next((r.get("samples_per_second") for r in results if r["design"] == SEED), None)
    head = ("design", "tokens", "samples/s", "ratio", "tokens/s", "TFLOP/s", "ceiling %", "peak GiB", "waiting %")
    lines = ["{:22}{:>8}{:>11}{:>7}{:>10}{:>9}{:>11}{:>10}{:>11}".format(*head)]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['design']:22}{r['failed']}")
            continue
        ratio = f"{r['samples_per_second'] / reference:.2f}" if reference else "-"
        peak = f"{r['peak_gib']:.1f}" if "peak_gib" in r else "-"
        lines.append(
            f"{r['design']:22}{r['tokens_per_sample']:8.0f}{r['samples_per_second']:11.2f}{ratio:>7}"
            f"{r['tokens_per_second']:10.0f}{r['tflops']:9.0f}{100 * r['tflops'] / ceiling:11.0f}{peak:>10}"
            f"{100 * r['waiting_for_data']:11.1f}"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder with config and tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="JSONL of questions")
    parser.add_argument("--frames_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--audio_dir", type=Path, required=True, help="as in train_vqa.py")
    parser.add_argument("--designs", default="seed,command,ours,fast", help="which of DESIGNS, comma-separated")
    parser.add_argument("--design", action="append", default=[], help="NAME=FLAGS: one more design, after the others")
    parser.add_argument("--rows", type=int, default=400, help="rows, repeated under other ids where there are fewer")
    parser.add_argument("--frames", type=int, help="frames a clip, repeated where it has fewer (all)")
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=3, help="of them not counted")
    parser.add_argument("--flags", default="", help="further flags of train_vqa.py for all designs")
    parser.add_argument("--gpu_memory_limit_gib", type=float, help="cap each process (none)")
    parser.add_argument("--profile", action="store_true", help="also write where one step's milliseconds go")
    parser.add_argument("--output", type=Path, default=Path("train_speed.json"), help="figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.child:
        measure(args, *args.child.split("=", 1))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    designs = {name: DESIGNS[name] for name in args.designs.split(",") if name}
    designs |= dict(design.split("=", 1) for design in args.design)
    results = []
    with tempfile.TemporaryDirectory() as work:
        flags = [
            *repeat_rows(args.data_path, args.audio_dir, args.rows, Path(work), args.frames),
            *("--frames_dir", args.frames_dir, "--model_name_or_path", args.model_name_or_path, "--init", "random"),
            *("--output_dir", f"{work}/out", "--max_steps", str(args.steps), "--learning_rate", "2e-4"),
            *("--save_strategy", "no", "--logging_steps", "5", "--report_to", "none", "--disable_tqdm", "True"),
            *(("--bf16", "True") if torch.cuda.is_available() else ()),
        ]
        if args.gpu_memory_limit_gib:
            flags += ["--gpu_memory_limit_gib", str(args.gpu_memory_limit_gib)]
        flags += shlex.split(args.flags)
        ceiling = matmul_ceiling()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for name, design in designs.items():
            part = args.output.with_suffix(f".{name}.json")
            part.unlink(missing_ok=True)
            child = [sys.executable, __file__, *argv, "--child", f"{name}={design}", "--output", str(part)]
            child += ["--flags=" + shlex.join(flags)]
            start = time.perf_counter()
            status = subprocess.run(child, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}).returncode
            crashed = {"design": name, "flags": design, "failed": f"exit status {status}"}
            results.append(json.loads(part.read_text()) if part.is_file() else crashed)
            results[-1]["process_seconds"] = time.perf_counter() - start
            report = {"machine": machine(), "ceiling_tflops": ceiling, "argv": argv, "results": results}
            args.output.write_text(json.dumps(report, indent=2) + "\n")
            print(table(results, ceiling), flush=True)
    print(f"ceiling: {ceiling:.1f} TFLOP/s; {json.dumps(machine())}")


if __name__ == "__main__":
    main()
