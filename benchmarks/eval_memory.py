"""The memory of an evaluation during training: the plain Trainer, which gathers logits, beside ours, only the loss.

    python benchmarks/eval_memory.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path test_set/out_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/out_002-001

The plain Trainer asks the model for its logits, [B, T, vocabulary], converts them to float32 for the loss, and keeps
those of every batch until the evaluation ends (with `--eval_accumulation_steps N` they move to RAM after N batches).
Ours computes logits only at the positions of the answer and keeps none. Weights are random, because memory does not
depend on their values. A run whose peak is below `--card_gib` would fit on such a card.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from benchmarks.speed_common import add_data_flags


class GatheringModel(vqa.SurgicalVQAModel):
    """The same model with transformers' loss: logits at every position, returned together with the loss."""

    def forward(self, labels=None, num_items_in_batch=None, **inputs):
        """Logits [B, T, vocabulary] and, with `labels` [B, T], transformers' causal loss over them."""
        output = super().forward(**inputs)
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=vocabulary)
            output.past_key_values = None  # the Trainer would gather the cache as well
        return output


def measure(build: Callable, dataset, collator, gather: bool, accumulation: int | None) -> dict:
    """Evaluate `dataset` once; returns peak GPU memory in GiB, gathered logits in GiB, or why it failed.

    `build` makes a new model each time, because a Trainer leaves its autocast and its cast of the outputs on the model.
    """
    cuda = torch.cuda.is_available()
    model = build()
    model.__class__ = GatheringModel if gather else vqa.SurgicalVQAModel
    args = vqa.VQATrainingArguments(
        output_dir="unused",
        bf16=cuda,
        use_cpu=not cuda,
        per_device_eval_batch_size=1,
        eval_accumulation_steps=accumulation,
        report_to="none",
        disable_tqdm=True,
    )
    args.prediction_loss_only = not gather
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result = {"gather": gather, "accumulation": accumulation, "frames": dataset.max_eval_frames, "rows": len(dataset)}
    try:
        output = Trainer(model=model, args=args, data_collator=collator).predict(dataset)
        result["loss"] = output.metrics["test_loss"]
        result["gathered_gib"] = 0.0 if output.predictions is None else output.predictions.nbytes / 2**30
    except torch.OutOfMemoryError as error:
        result["out_of_memory"] = str(error).split(". ")[0]
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--rows", type=int, default=10, help="questions to evaluate (10)")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[6, 8],
        help="frames per clip; each number gets its own table rows (6 8)",
    )
    parser.add_argument(
        "--card_gib", type=float, default=38.5, help="memory that a 40 GB card has for a process (38.5)"
    )
    parser.add_argument("--output", type=Path, help="file for the measurements as JSON")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    rows = vqa.load_rows(args.data_path, args.frames_dir, args.audio_dir, args.rows)
    tokenizer = vqa.load_tokenizer(args.model_name_or_path)
    build = partial(vqa.load_model, args.model_name_or_path, tokenizer, init="random", dtype=dtype, device=device)
    processor = vqa.VQAProcessor(tokenizer, vqa.load_config(args.model_name_or_path))
    collator = vqa.VQACollator(tokenizer.pad_token_id)
    measurements = []
    print(f"{'evaluation':42} {'frames':>6} {'peak GiB':>9} {'logits GiB':>10}  fits {args.card_gib} GiB")
    for frames in args.frames:
        dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=frames, is_eval=True)
        for name, gather, accumulation in (
            ("plain Trainer, logits gathered on the GPU", True, None),
            ("plain Trainer, --eval_accumulation_steps 4", True, 4),
            ("ours, loss at answer positions only", False, None),
        ):
            result = {"name": name, **measure(build, dataset, collator, gather, accumulation)}
            gc.collect()  # the Trainer and its model refer to each other
            if cuda:
                torch.cuda.empty_cache()
            measurements.append(result)
            peak = result.get("peak_gib")
            gathered = "out of memory" if "out_of_memory" in result else f"{result['gathered_gib']:.3f}"
            fits = "-" if peak is None else "yes" if "out_of_memory" not in result and peak < args.card_gib else "no"
            print(f"{name:42} {frames:6} {'-' if peak is None else f'{peak:.1f}':>9} {gathered:>10}  {fits}")
    if args.output:
        args.output.write_text(json.dumps(measurements, indent=2) + "\n")


if __name__ == "__main__":
    main()
