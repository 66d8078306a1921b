"""Samples per second and memory of training, full size, random weights: the seed's design beside ours.

    python benchmarks/train_speed.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path in_002-001.jsonl --frames_dir media/frames --audio_dir media/audio/in_002-001 \\
        --designs seed,command,ours,fast --gpu_memory_limit_gib 38.5 --output train_speed.json

Each design runs in its own process over the same rows. `seed` is the plain Trainer and PEFT: batch 1, every layer
recomputed, logits at every position, a mask of ones, LoRA inputs cast to float32. The other designs run `main` of
`train_vqa.py` with the flags in DESIGNS (or from `--design NAME=FLAGS`). All have the same number of loader workers.
The time of a step is from the end of the previous step to its own end, so it includes data, optimizer and Trainer. The
first steps (`--warmup`) do not count.

With `--cache_features` in the flags, the steps run warm: the features are computed before the first step. The table
also has the time for this. If the folder had no usable feature before, the table has the rate of a first epoch
including this time, computed from the counted steps for rows that all differ in clip or speech.

TFLOP/s follow the rule (4 + 2 s) N T: N parameters of the decoder's layers, T tokens, s the share of layers that are
recomputed (6 N T if all are). Attention, the encoders and LoRA are not counted.

The flags of a design may begin with names from `training_changes.py`: `--design "logits=@all_logits --lora_dropout 0"`.
`--one_process` runs all designs in one process, which saves their start: for runs of a few steps each.

`--num_gpus N` starts each design by torchrun. Samples, tokens and TFLOP/s are then those of all GPUs, the ceiling is N
times one GPU's, and times and peaks are the first rank's; `ranks` in the output has those of all. With `--profile` each
rank writes its step. Its NCCL kernels take as long as the exchange and the wait for the slower rank together: the
rank that waits least shows the exchange.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from benchmarks.eval_memory import GatheringModel
from benchmarks.speed_common import (
    add_data_flags,
    decoder_parameters,
    machine,
    matmul_ceiling,
    repeat_rows,
    synchronize,
)
from benchmarks.training_changes import CHANGES

SEED = "seed"
RANK, RANKS = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
FILL = vqa.FeatureStore.fill
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
FAST = "--audio_tokens speech --frame_mode video"
QUICK = "--compile_layers True --checkpoint_every_n 0"
DESIGNS = {
    SEED: "",
    "command": "--per_device_train_batch_size 1 --gradient_accumulation_steps 4",
    "ours": f"--per_device_train_batch_size 2 --gradient_accumulation_steps 2 {QUICK}",
    "fast": f"--per_device_train_batch_size 7 --gradient_accumulation_steps 1 {FAST} {QUICK}",
}


class Clock(TrainerCallback):
    """Times optimizer steps; `trainer` counts tokens, samples and the wait for data of each."""

    def __init__(self, warmup: int, profile: Path | None):
        self.warmup, self.profile, self.steps, self.trainer = warmup, profile, [], None
        self.profiler, self.filling, self.distinct = None, 0.0, 0

    def fill(self, store, sources, *args, **kwargs):
        """`FeatureStore.fill`, timed; `distinct` counts the pairs of clip and speech if none was cached before."""
        start, before = time.perf_counter(), set(store.folder.glob("*"))
        FILL(store, sources, *args, **kwargs)
        synchronize()
        self.filling += time.perf_counter() - start
        media = {source.cacheable_media(index) for source in sources for index in range(len(source.rows))}
        pairs = {tuple(store.files.get(medium) for medium in both) for both in media}
        self.distinct = len(pairs) if before.isdisjoint(path for pair in pairs for path in pair) else 0

    def on_step_begin(self, args, state, control, **kwargs):
        """Called by the Trainer before each optimizer step."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each optimizer step."""
        synchronize()
        now = time.perf_counter()
        own = {
            "cpu": time.process_time(),
            "rss": psutil.Process().memory_info().rss,
        }  # of this process, without workers
        if torch.cuda.is_available():
            own |= {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
        self.steps.append({"end": now, **own, **self.trainer.counted})
        self.trainer.counted = {"tokens": 0, "samples": 0, "waited": 0.0}
        if self.profile and state.global_step == state.max_steps - 2:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities[: 1 + torch.cuda.is_available()])
            self.profiler.start()
        elif self.profiler and state.global_step == state.max_steps - 1:  # exactly one step is profiled
            self.profiler.stop()
            trace = self.profile.with_suffix(".trace.json")
            self.profiler.export_chrome_trace(str(trace))
            self.profile.write_text(kernel_table(self.profiler))
            with self.profile.open("a") as file:
                file.write("\n" + gap_table(json.loads(trace.read_text())["traceEvents"]))

    def figures(self) -> dict:
        """Rates, times and peaks of the counted steps, without the profiled one."""
        last = len(self.steps) - (2 if self.profile else 0)
        counted = self.steps[self.warmup : last]
        seconds = counted[-1]["end"] - self.steps[self.warmup - 1]["end"]
        total = {name: sum(step[name] for step in counted) for name in ("tokens", "samples", "waited")}
        total |= {name: total[name] * RANKS for name in ("tokens", "samples")}  # ranks have batches of one size
        result = {"steps": len(counted), "seconds": seconds, "samples_per_second": total["samples"] / seconds}
        result |= {"tokens_per_second": total["tokens"] / seconds, "waiting_for_data": total["waited"] / seconds}
        result["tokens_per_sample"] = total["tokens"] / total["samples"]
        ends = [step["end"] for step in self.steps[self.warmup - 1 : last]]
        result["step_seconds"] = [end - start for start, end in itertools.pairwise(ends)]
        before, after = self.steps[self.warmup - 1], counted[-1]
        result["ram_mib"] = [step["rss"] / 2**20 for step in (before, after)]
        result["cpu_seconds_per_sample"] = (after["cpu"] - before["cpu"]) / total["samples"]
        if torch.cuda.is_available():
            result["peak_gib"] = max(step["reserved"] for step in counted) / vqa.GIB
            result["peak_allocated_gib"] = max(step["allocated"] for step in counted) / vqa.GIB
        return result


def kernel_table(profiler: torch.profiler.profile) -> str:
    """Milliseconds of one step by kind of kernel, and the 25 kernels that take the most time."""
    kinds = {"matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm"), "attention": ("flash", "fmha")}
    kinds |= {
        "optimizer": ("multi_tensor", "fused_adam"),
        "compiled": ("triton_",),
        "dropout": ("dropout", "masked_scale"),
    }
    kinds |= {"copies and casts": ("memcpy", "copy", "direct_copy"), "exchange between GPUs": ("nccl",)}
    kernels = [event for event in profiler.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    # Spans that NCCL and DDP mark on the GPU; their kernels are listed too.
    kernels = [event for event in kernels if "nccl:" not in event.key and "Parallel.forward" not in event.key]
    rows = [(event.key, event.self_device_time_total / 1e3, event.count) for event in kernels]
    rows.sort(key=lambda row: -row[1])
    sums = {}
    for key, milliseconds, _ in rows:
        kind = next((kind for kind, words in kinds.items() if any(word in key.lower() for word in words)), "other")
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    lines = [f"{kind:20} {ms:9.2f} ms" for kind, ms in sorted(sums.items(), key=lambda item: -item[1])]
    return "\n".join([*lines, "", *(f"{ms:9.2f} ms {count:6} x {key[:110]}" for key, ms, count in rows[:25])]) + "\n"


def gap_table(events: list[dict], long_us: float = 50) -> str:
    """The times without work for the GPU in a trace of torch's profiler (Chrome's format), and what ended each.

    A gap is between the end of all kernels so far and the start of the next. A long gap is listed under the outermost
    and the innermost operator or annotation in which the CPU launched that next kernel; "queued" means that the launch
    came before the gap began. The last part lists the CPU's waits for the GPU, by the operator that contains them.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = sorted((e for e in spans if e.get("cat") in GPU_WORK), key=lambda e: e["ts"])
    if not kernels:
        return "gaps: no kernels in the trace\n"
    calls = [event for event in spans if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = {e["args"]["correlation"]: e for e in calls if "correlation" in e.get("args", {})}
    threads = defaultdict(list)
    for event in spans:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)

    def inside(call: dict | None) -> str:
        """`outermost > innermost` operator that was running on the thread of `call` at that time."""
        if call is None:
            return "unknown"
        around = [e for e in threads[call["tid"]] if e["ts"] <= call["ts"] <= e["ts"] + e["dur"]]
        around = [e["name"] for e in sorted(around, key=lambda e: -e["dur"]) if not e["name"].startswith("Profiler")]
        return " > ".join(name[:60] for name in dict.fromkeys((around or ["no operator"])[:: max(1, len(around) - 1)]))

    def summed(rows: list[tuple[str, float]]) -> list[str]:
        sums = defaultdict(list)
        for name, us in rows:
            sums[name].append(us)
        longest = sorted(sums.items(), key=lambda item: -sum(item[1]))[:20]
        return [f"{sum(us) / 1e3:9.2f} ms {len(us):6} x {name}" for name, us in longest]

    gaps, end = [], kernels[0]["ts"]
    for kernel in kernels:
        if kernel["ts"] > end:
            gaps.append((kernel["ts"] - end, end, kernel))
        end = max(end, kernel["ts"] + kernel["dur"])
    lines = [f"GPU: {(end - kernels[0]['ts']) / 1e3:.2f} ms from its first kernel to its last, {len(kernels)} kernels"]
    for low, high in ((0, 10), (10, long_us), (long_us, math.inf)):
        of_size = [gap for gap, *_ in gaps if low < gap <= high]
        lines.append(f"{sum(of_size) / 1e3:9.2f} ms {len(of_size):6} gaps of {low:g} to {high:g} us")
    lines.append(f"gaps above {long_us:g} us, by what launched the kernel that ended them:")
    long_gaps = []
    for gap, start, kernel in gaps:
        if gap > long_us:
            call = launches.get(kernel.get("args", {}).get("correlation"))
            queued = "queued: " if call and call["ts"] + call["dur"] < start else ""
            long_gaps.append((queued + inside(call), gap))
    lines += summed(long_gaps)
    lines.append("waits of the CPU for the GPU:")
    waits = [e for e in calls if "Synchronize" in e["name"] or (e["name"] == "cudaMemcpyAsync" and e["dur"] > long_us)]
    lines += summed([(f"{wait['name']} in {inside(wait)}", wait["dur"]) for wait in waits])
    return "\n".join(lines) + "\n"


def counting(base: type, clock: Clock) -> type:
    """A subclass of the Trainer `base` that counts, for `clock`, what its loader gives and how long that takes."""

    class Counting(base):
        """See `counting`."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            clock.trainer, self.counted = self, {"tokens": 0, "samples": 0, "waited": 0.0}
            self.callback_handler.callbacks.insert(0, clock)  # before PeakMemory, which resets the peaks

        def get_batch_samples(self, *args, **kwargs):
            """The same batches, counted and timed."""
            start = time.perf_counter()
            batches, items = super().get_batch_samples(*args, **kwargs)
            self.counted["waited"] += time.perf_counter() - start
            for batch in batches:
                self.counted["tokens"] += batch["input_ids"].numel()
                self.counted["samples"] += len(batch["input_ids"])
            return batches, items

        def save_final(self):
            """Does nothing: saving is not measured."""

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
        data_collator=vqa.VQACollator(tokenizer.pad_token_id, "left"),  # this side needs a mask
    )
    trainer.train()
    return decoder_parameters(model), 1


def run_ours(clock: Clock, flags: list[str]) -> tuple[int, int]:
    """Train with `train_vqa.main`; returns N, and n if every n-th layer is recomputed (0: none)."""
    choose, chosen = vqa.choose_recomputation, []
    with (
        patch.object(vqa, "VQATrainer", counting(vqa.VQATrainer, clock)),
        patch.object(vqa.FeatureStore, "fill", lambda store, *args, **named: clock.fill(store, *args, **named)),
        patch.object(vqa, "choose_recomputation", lambda *args: chosen.append(choose(*args)) or chosen[-1]),
    ):
        if vqa.main(flags):
            raise SystemExit("training failed")
    return decoder_parameters(clock.trainer.model.get_base_model()), chosen[-1]


def flops_factor(layers: int, every_n: int) -> float:
    """Operations per parameter and token: 2 forward, 2 backward, 2 more in every `every_n`-th layer (0: in none)."""
    return 4 + 2 * (math.ceil(layers / every_n) / layers if every_n else 0)


def measure(args: argparse.Namespace, name: str, design: str) -> None:
    """Train with the flags of `design`; writes the figures, or the error, to `args.output`."""
    vqa.set_seed(0)
    output = rank_file(args.output, RANK)
    clock = Clock(args.warmup, output.with_suffix(".profile.txt") if args.profile else None)
    words = shlex.split(design)
    flags = shlex.split(args.flags) + [word for word in words if not word.startswith("@")]
    try:
        with contextlib.ExitStack() as stack:
            for word in words:
                if word.startswith("@"):
                    stack.enter_context(CHANGES[word[1:]]())
            parameters, every_n = run_seed(args, flags, clock) if name == SEED else run_ours(clock, flags)
        result = clock.figures()
        factor = flops_factor(clock.trainer.model.config.text_config.num_hidden_layers, every_n)
        result["tflops"] = factor * parameters * result["tokens_per_second"] / 1e12
        result |= {"rule": f"{factor:.3g} N T", "every_n": every_n}
        if clock.filling:
            result["seconds_filling"] = clock.filling
        if clock.distinct:
            first_epoch = clock.filling + clock.distinct / result["samples_per_second"]
            result["first_epoch_samples_per_second"] = clock.distinct / first_epoch
    except (Exception, SystemExit) as error:  # one design that fails must not end the others
        if not isinstance(error, (torch.OutOfMemoryError, vqa.VQAError)):
            traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    output.write_text(json.dumps({"design": name, "flags": design, **result}))
    if RANKS > 1 and "failed" in result:  # the other ranks wait for this one, until torchrun ends them
        os._exit(1)


def rank_file(output: Path, rank: int) -> Path:
    """Where a rank writes its figures: the first to `output`."""
    return output.with_suffix(f".rank{rank}{output.suffix}") if rank else output


def table(results: list[dict], ceiling: float) -> str:
    """The figures of all designs as lines of text."""
    reference = next((r.get("samples_per_second") for r in results if r["design"] == SEED), None)
    head = ("design", "tokens", "samples/s", "ratio", "tokens/s", "TFLOP/s", "ceiling %", "peak GiB", "waiting %")
    head += ("step s", "+- %")  # the mean, and the standard deviation of single steps
    head += ("filling s", "epoch 1 /s")
    lines = ["{:22}{:>8}{:>11}{:>7}{:>10}{:>9}{:>11}{:>10}{:>11}{:>9}{:>7}{:>11}{:>12}".format(*head)]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['design']:22}{r['failed']}")
            continue
        ratio = f"{r['samples_per_second'] / reference:.2f}" if reference else "-"
        peak = f"{r['peak_gib']:.1f}" if "peak_gib" in r else "-"
        filling = f"{r['seconds_filling']:.1f}" if "seconds_filling" in r else "-"
        rate = r.get("first_epoch_samples_per_second")
        first_epoch = f"{rate:.2f}" if rate else "-"
        step, spread = statistics.mean(r["step_seconds"]), statistics.pstdev(r["step_seconds"])
        lines.append(
            f"{r['design']:22}{r['tokens_per_sample']:8.0f}{r['samples_per_second']:11.2f}{ratio:>7}"
            f"{r['tokens_per_second']:10.0f}{r['tflops']:9.0f}{100 * r['tflops'] / ceiling:11.0f}{peak:>10}"
            f"{100 * r['waiting_for_data']:11.1f}{step:9.3f}{100 * spread / step:7.1f}"
            f"{filling:>11}{first_epoch:>12}"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--designs", default="seed,command,ours,fast", help=f"comma-separated, of {', '.join(DESIGNS)}")
    parser.add_argument(
        "--design", action="append", default=[], help="NAME=FLAGS: one more design, run after the others"
    )
    parser.add_argument("--rows", type=int, default=400, help="rows; those of the file are repeated if necessary (400)")
    parser.add_argument("--frames", type=int, help="frames per clip, repeated if it has fewer (all)")
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps (13)")
    parser.add_argument("--warmup", type=int, default=3, help="first steps, which are not counted (3)")
    parser.add_argument("--flags", default="", help="more flags of train_vqa.py for all designs")
    parser.add_argument("--gpu_memory_limit_gib", type=float, help="hard limit for each process (none)")
    parser.add_argument("--profile", action="store_true", help="also profile one step and write its table and trace")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of this host that train a design together (1)")
    parser.add_argument("--one_process", action="store_true", help="all designs in this process, one after the other")
    parser.add_argument(
        "--output", type=Path, default=Path("train_speed.json"), help="file for the figures as JSON (train_speed.json)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    words = [word for design in args.design for word in shlex.split(design.split("=", 1)[-1])]
    unknown = sorted({word for word in words if word.startswith("@")} - {f"@{name}" for name in CHANGES})
    if unknown:
        parser.error(f"--design: {', '.join(unknown)}: not among {', '.join(f'@{name}' for name in CHANGES)}")
    if args.num_gpus > 1 and (args.one_process or SEED in args.designs.split(",")):
        parser.error("--num_gpus: neither --one_process nor the design seed runs on several GPUs")
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.child:
        measure(args, *args.child.split("=", 1))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
        ceiling = matmul_ceiling() * args.num_gpus
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for name, design in designs.items():
            part = args.output.with_suffix(f".{name}.json")
            parts = [rank_file(part, rank) for rank in range(args.num_gpus)]
            for file in parts:
                file.unlink(missing_ok=True)
            start, status = time.perf_counter(), 0
            if args.one_process:
                measure(argparse.Namespace(**{**vars(args), "output": part, "flags": shlex.join(flags)}), name, design)
                torch.compiler.reset()
                # Persistent workers would run on beside the next design.
                vqa.end_workers()
                gc.collect()  # a Trainer and its model refer to each other
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.num_gpus)]
                child = [sys.executable, *(launcher if args.num_gpus > 1 else ()), __file__]
                child += [*argv, "--child", f"{name}={design}", "--output", str(part)]
                child += ["--flags=" + shlex.join(flags)]
                status = subprocess.run(child).returncode
            crashed = {"design": name, "flags": design, "failed": f"exit status {status}"}
            results.append(json.loads(part.read_text()) if part.is_file() else crashed)
            if args.num_gpus > 1:
                results[-1]["ranks"] = [json.loads(file.read_text()) for file in parts if file.is_file()]
            results[-1]["process_seconds"] = time.perf_counter() - start
            report = {"machine": machine(), "ceiling_tflops": ceiling, "argv": argv, "results": results}
            args.output.write_text(json.dumps(report, indent=2) + "\n")
            print(table(results, ceiling), flush=True)
    print(f"ceiling: {ceiling:.1f} TFLOP/s; {json.dumps(machine())}")
    if failed := [result["design"] for result in results if "failed" in result]:
        raise SystemExit(f"not measured, see above: {', '.join(failed)}")


if __name__ == "__main__":
    vqa.run(main)
