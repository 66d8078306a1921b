"""Training speed at full size with random weights: the seed's design beside ours, in one process tree on the same data.

    python benchmarks/train_speed.py --model_name_or_path tests/fixtures/full_size_model --data_path in_002-001.jsonl \\
        --frames_dir media/frames --audio_dir media/audio/in_002-001 --design seed ours ours_nocheckpoint fast

Each design runs `train_vqa.main` in a process of its own: data loading, optimizer and Trainer included. `seed` is the
reference: batch 1, every layer recomputed, logits of every position, an attention mask, plain PEFT. The first steps,
`--warmup`, are not counted. TFLOP/s follow the rule of 4 N T floating-point operations a step (frozen weights need no
weight gradient) and 6 N T where every layer is recomputed, for the N parameters of the decoder's layers; the encoders'
work is left out. The ceiling is a bf16 product of two 8192 x 8192 matrices, measured in the same process.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa

# Flags of train_vqa.py; `samples` is what one optimizer step takes.
DESIGNS = {
    "seed": ("--per_device_train_batch_size 1 --checkpoint_every_n 1", 1),
    "ours": ("--per_device_train_batch_size 1 --checkpoint_every_n 1", 1),
    "ours_nocheckpoint": ("--per_device_train_batch_size 1 --checkpoint_every_n 0", 1),
    "fast": ("--per_device_train_batch_size 4 --checkpoint_every_n 0 --audio_tokens speech --frame_mode video", 4),
    "fast_nodropout": (
        "--per_device_train_batch_size 4 --checkpoint_every_n 0 --audio_tokens speech --frame_mode video "
        "--lora_dropout 0",
        4,
    ),
}


class StockLossModel(vqa.SurgicalVQAModel):
    """The seed's way to the loss: logits [B, T, vocabulary] of every position, in float32 for the cross entropy."""

    def forward(self, labels=None, num_items_in_batch=None, **inputs):
        """As `SurgicalVQAModel.forward`, with the loss of transformers' causal models."""
        output = super().forward(**inputs, use_cache=False)
        vocabulary = self.config.text_config.vocab_size
        output.loss = self.loss_function(
            logits=output.logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
        )
        return output


class MaskingCollator(vqa.VQACollator):
    """Right-padded batches with the attention mask that a stock collator makes."""

    def __call__(self, samples):
        """The batch, with `attention_mask` int64 [B, T]."""
        batch = super().__call__(samples)
        batch["attention_mask"] = (batch["input_ids"] != self.pad_token_id).long()
        return batch


class Clock(TrainerCallback):
    """When each optimizer step ended, in seconds."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def run_design(design: str, argv: list[str], steps: int, warmup: int) -> dict:
    """Train `steps` steps with the flags of `design` in this process; figures of those after `warmup`."""
    flags, samples = DESIGNS[design]
    clock, waits, seen = Clock(), [], {}

    class TimedTrainer(vqa.VQATrainer):
        """Keeps the time of each step, how long it waited for data, and the Trainer itself."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(clock)
            seen["dataset"], seen["model"] = self.train_dataset, self.model

        def get_batch_samples(self, *args, **kwargs):
            start = time.perf_counter()
            batches = super().get_batch_samples(*args, **kwargs)
            waits.append(time.perf_counter() - start)
            return batches

    vqa.VQATrainer = TimedTrainer
    if design == "seed":
        vqa.SurgicalVQAModel, vqa.VQACollator = StockLossModel, MaskingCollator
        vqa.skip_input_casts = lambda model: None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(sys.stderr):
        vqa.main([*argv, *flags.split(), "--max_steps", str(steps)])
    spent = (clock.ends[-1] - clock.ends[warmup - 1]) / (steps - warmup)
    tokens = sum(seen["dataset"].token_counts()) / len(seen["dataset"])
    layers = seen["model"].base_model.model.model.language_model.layers
    parameters = sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)
    factor = 6 if "--checkpoint_every_n 1" in flags else 4
    return {
        "design": design,
        "flags": flags,
        "samples_per_s": samples / spent,
        "tokens_per_s": samples * tokens / spent,
        "tokens_per_sample": tokens,
        "tflops": factor * parameters * tokens * samples / spent / 1e12,
        "waiting_share": sum(waits[warmup:steps]) / (clock.ends[-1] - clock.ends[warmup - 1]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "ceiling_tflops": matmul_ceiling(),
    }


def matmul_ceiling(size: int = 8192, repeats: int = 20) -> float | None:
    """TFLOP/s of a bf16 product of random matrices [size, size]; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1e3) / 1e12


def main() -> None:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", nargs="+", choices=list(DESIGNS), default=["seed", "ours", "fast"])
    parser.add_argument("--model_name_or_path", required=True, help="folder with config and tokenizer")
    parser.add_argument("--data_path", required=True, help="JSONL of questions")
    parser.add_argument("--frames_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--audio_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each design")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--gpu_memory_limit_gib", type=float, help="cap of each process. None: no cap")
    parser.add_argument("--output", type=Path, help="append one JSON line a design there")
    args = parser.parse_args()

    if len(args.design) > 1:  # each in a process of its own, so that none inherits memory or patches
        own = [a for a in sys.argv[1:] if a not in args.design]
        print("design             samples/s tokens tokens/s TFLOP/s ceiling  wait  GiB", flush=True)
        for design in args.design:
            at = own.index("--design") + 1
            command = [sys.executable, __file__, *own[:at], design, *own[at:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            print(done.stdout.strip() or f"{design:18} failed with status {done.returncode}", flush=True)
        return

    argv = [
        *("--init", "random", "--model_name_or_path", args.model_name_or_path, "--train_data_path", args.data_path),
        *("--frames_dir", args.frames_dir, "--audio_dir", args.audio_dir, "--output_dir", "checkpoints/train_speed"),
        *("--bf16", str(torch.cuda.is_available()), "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "True", "--num_train_epochs", "1000", "--logging_steps", "1000"),
    ]
    if args.gpu_memory_limit_gib:
        argv += ["--gpu_memory_limit_gib", str(args.gpu_memory_limit_gib)]
    result = run_design(args.design[0], argv, args.steps, args.warmup)
    ceiling, peak = result["ceiling_tflops"], result["peak_gib"]
    print(
        f"{result['design']:18} {result['samples_per_s']:9.2f} {result['tokens_per_sample']:6.0f} "
        f"{result['tokens_per_s']:8.0f} {result['tflops']:7.1f} "
        f"{'-' if ceiling is None else format(result['tflops'] / ceiling, '.0%'):>7} "
        f"{result['waiting_share']:5.0%}  {'-' if peak is None else format(peak, '.1f')}"
    )
    if args.output:
        with args.output.open("a") as lines:
            lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
