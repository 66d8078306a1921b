"""Answers per second: evaluation's own batches beside one row at a time with the adapter unmerged.

    python benchmarks/generate_speed.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path test_set/in_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/in_002-001 \\
        --gpu_memory_limit_gib 38.5 --output speed.json

seed      batches of one, adapter unmerged, transformers' `generate`
ours      `answer_arm` of evaluate_checkpoint.py with its defaults, adapter merged, on the same tokens
fast      ours with `audio_tokens speech` and `frame_mode video`
apart     ours with the adapter unmerged
merged    seed with the adapter merged
library   ours with `generate` in place of `answer_batch`, on the same batches
grouped   ours with `grouped_attention` of decoding_changes.py
graphs    grouped with `GraphDecoder` of decoding_changes.py

All designs use one model in one process, with random weights. There are no stop tokens, so every answer has
`--max_new_tokens` tokens. If the data have fewer than `--rows` rows, they are repeated under other ids. In all designs
threads decode the media ahead of time.

With `--cache_features`, ours and fast are measured three times: without cached features; `cold`, with an empty folder,
where the time to fill it counts; and `warm`, with all features cached. Warm counts only the time to answer; `filling`
then is the time to find out that no feature is missing, which is needed once per run, for any number of rows.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_checkpoint as ev
import train_vqa as vqa
from benchmarks.decoding_changes import GraphDecoder, answer_by_library, grouped_attention
from benchmarks.speed_common import add_data_flags, machine, matmul_ceiling, synchronize

SAME, FEWER = ("full", "images"), ("speech", "video")
# Tokens, whether batches are ours, and whether the adapter is merged: after merging it cannot be separated again.
DESIGNS = {
    "seed": (SAME, False, False),
    "apart": (SAME, True, False),
    "merged": (SAME, False, True),
    "ours": (SAME, True, True),
    "fast": (FEWER, True, True),
    "library": (SAME, True, True),
    "grouped": (SAME, True, True),
    "graphs": (SAME, True, True),
}
WARM_UP = 2  # rows answered before the measurement: kernels are loaded and chosen at their first use


def repeated(rows: list, count: int) -> list:
    """`count` VQARows, gone through again under other ids where there are fewer."""
    turns = [divmod(n, len(rows)) for n in range(count)]
    return [dataclasses.replace(rows[n], id=rows[n].id + (f"_{turn}" if turn else "")) for turn, n in turns]


class Clocked:
    """`ahead` of train_vqa.py, and the sum of the seconds that its caller waits for a result."""

    def __init__(self):
        self.waited, self._ahead = 0.0, vqa.ahead

    def __call__(self, *args):
        results = self._ahead(*args)
        with contextlib.closing(results):
            while True:
                start = time.perf_counter()
                try:
                    result = next(results)
                except StopIteration:
                    return
                finally:
                    self.waited += time.perf_counter() - start
                yield result


class Timed:
    """A function, and the sum of the seconds that its calls take, including the GPU's work."""

    def __init__(self, function):
        self.seconds, self._function = 0.0, function

    def __call__(self, *args):
        synchronize()
        start = time.perf_counter()
        result = self._function(*args)
        synchronize()
        self.seconds += time.perf_counter() - start
        return result


def answer_plainly(model, inputs: ev.ArmInputs, max_new_tokens: int) -> int:
    """Answer the rows of `inputs` one at a time with `generate`; returns the number of new tokens."""
    pad = inputs.processor.tokenizer.pad_token_id
    decoding = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None, pad_token_id=pad)
    model.generation_config.eos_token_id = None
    collate, tokens = vqa.VQACollator(pad, "left"), 0
    for sample in vqa.ahead(inputs.sample, range(len(inputs.rows)), 8):
        if isinstance(sample, str):
            raise SystemExit(f"generate_speed.py: error: {sample}")
        batch = vqa.on_device(collate([sample]), model.device)
        with torch.inference_mode():
            output = model.generate(**batch, generation_config=decoding)
        tokens += output.shape[1] - batch["input_ids"].shape[1]
    return tokens


def answer_ours(model, inputs: ev.ArmInputs, args: argparse.Namespace) -> int:
    """Answer the rows of `inputs` with `answer_arm`, into a file as in a run; returns the number of new tokens."""
    with tempfile.TemporaryDirectory() as folder, ev.RowFile(Path(folder) / "rows.jsonl", {}) as file:
        ev.answer_arm(model, inputs, file, args)
        failed = [row for row in file.done.values() if "error" in row]
        if failed:
            raise SystemExit(f"generate_speed.py: error: {failed[0]['error']}")
        return sum(row["n_tokens"] for row in file.done.values())


def measure(
    design: str,
    model,
    tokenizer,
    rows: list,
    args: argparse.Namespace,
    cache: str = "",
    folder: str | None = None,
) -> dict:
    """Answer all `rows` in one design; figures of the run. `cache`: `cold` or `warm`, kept in `folder`."""
    tokens, batched, _ = DESIGNS[design]
    processor = vqa.VQAProcessor(tokenizer, model.config, args.max_image_size, "audio", *tokens)

    def present(rows: list) -> ev.ArmInputs:
        limit = args.frames
        return ev.ArmInputs(
            "audio", vqa.SurgicalVQADataset(rows, processor, max_eval_frames=limit, is_eval=True, with_answer=False)
        )

    def answer(inputs: ev.ArmInputs) -> int:
        if not batched:
            return answer_plainly(model, inputs, args.max_new_tokens)
        with grouped_attention() if design == "grouped" else contextlib.nullcontext():
            return answer_ours(model, inputs, args)

    answer_batch = {"graphs": GraphDecoder(), "library": answer_by_library}.get(design, vqa.answer_batch)
    with patch.object(vqa, "answer_batch", answer_batch):
        answer(present(rows[:WARM_UP]))
    inputs = present(rows)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    clock, start = Clocked(), time.perf_counter()
    if cache:
        inputs.feature_store = vqa.FeatureStore(folder, model, processor)
        inputs.feature_store.fill([inputs])
    filling = time.perf_counter() - start
    if cache == "warm":
        start += filling
    reading, batches = Timed(vqa.prefill), Timed(answer_batch)
    with (
        patch.object(vqa, "ahead", clock),
        patch.object(vqa, "prefill", reading),
        patch.object(vqa, "answer_batch", batches),
    ):
        tokens = answer(inputs)
    synchronize()
    seconds = time.perf_counter() - start
    if tokens != len(rows) * args.max_new_tokens:
        raise SystemExit(f"generate_speed.py: error: {design} made {tokens} tokens for {len(rows)} rows")
    prompt = sum(inputs.length(index) for index in range(len(rows)))
    decoder = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "language_model" in n)
    result = {
        "design": f"{design} {cache}".rstrip(),
        "rows": len(rows),
        "prompt_tokens": prompt / len(rows),
        "new_tokens": tokens,
        "seconds": seconds,
        "seconds_filling": filling,
        "seconds_reading": reading.seconds,  # prefill, including the wait for data; only in designs with batches
        "seconds_decoding": batches.seconds - reading.seconds,
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": (prompt + tokens) / seconds,
        "waiting_for_data": clock.waited / seconds,
        "tflops": 2 * decoder * (prompt + tokens) / seconds / 1e12,  # only the decoder's matrices
    }
    if torch.cuda.is_available():
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if args.profile:
        print(f"\n{design}: where {args.profile} rows spend their time")
        with patch.object(vqa, "answer_batch", answer_batch):
            print(profiled(partial(answer, present(rows[: args.profile]))))
    return result


def profiled(answer) -> str:
    """A table of the time that `answer` takes: the parts of a batch, then the operations by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def named(name, function):
        def call(*args, **kwargs):
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    def timed(*args):  # reading ends when the GPU has done it, so that the rest is decoding
        output = prefill(*args)
        synchronize()
        return output

    prefill = vqa.prefill
    with (
        patch.object(vqa, "prefill", named("## prefill", timed)),
        patch.object(vqa, "answer_batch", named("## a batch", vqa.answer_batch)),
        torch.profiler.profile(activities=activities) as profile,
    ):
        answer()
        synchronize()
    averages = profile.key_averages()
    parts = "\n".join(f"{e.key}: {e.cpu_time_total / 1000:.0f} ms in {e.count}" for e in averages if "##" in e.key)
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return f"{parts}\n{averages.table(sort_by=order, row_limit=25, max_name_column_width=60)}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags; an unknown or abbreviated one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--designs", default="seed,ours,fast", help=f"comma-separated, of {', '.join(DESIGNS)}")
    parser.add_argument(
        "--rows", type=int, default=200, help="questions to answer; the data are repeated if necessary (200)"
    )
    parser.add_argument("--seed_rows", type=int, default=24, help="questions that seed and merged answer (24)")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip (8)")
    parser.add_argument("--max_image_size", type=int, default=384, help="longer side of a frame in pixels (384)")
    parser.add_argument("--max_new_tokens", type=int, default=12, help="tokens of every answer (12)")
    parser.add_argument(
        "--batch_size", type=ev._batch_size, default="auto", help="rows per batch, in the designs with batches (auto)"
    )
    parser.add_argument("--gpu_memory_limit_gib", type=float, default=0.0, help="hard limit for this process. 0: none")
    parser.add_argument(
        "--cache_features",
        type=Path,
        help="measure ours and fast with cached features too, cold and warm, in a temporary folder below this one",
    )
    parser.add_argument(
        "--profile", type=int, default=0, help="rows that each design answers again under the profiler. 0: none"
    )
    parser.add_argument("--output", type=Path, help="file for the figures as JSON. None: only print them")
    args = parser.parse_args(argv)
    args.designs = args.designs.split(",")
    unknown = [name for name in args.designs if name not in DESIGNS]
    if unknown:
        parser.error(f"--designs: {', '.join(map(repr, unknown))} is none of {', '.join(DESIGNS)}")
    if min(args.rows, args.seed_rows, args.frames, args.max_new_tokens) < 1:
        parser.error("--rows, --seed_rows, --frames and --max_new_tokens must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    args = parse_arguments(argv)
    vqa.limit_gpu_memory(args.gpu_memory_limit_gib or None)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    ev.load_libraries()
    rows = vqa.load_rows(args.data_path, args.frames_dir, args.audio_dir)
    ceiling = matmul_ceiling()
    tokenizer = vqa.load_tokenizer(args.model_name_or_path)
    base = vqa.load_model(args.model_name_or_path, tokenizer, init="random", seed=1, dtype=dtype, device=device)
    adapted = vqa.add_lora(base).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # zero until now, so that merging would change nothing
                weight.normal_(std=0.01)
    model, results, failed = adapted.get_base_model(), [], {}
    with patch.object(vqa, "stop_token_ids", lambda tokenizer: []):
        for design in sorted(args.designs, key=lambda name: DESIGNS[name][2]):
            _, batched, merged = DESIGNS[design]
            if merged and adapted is not None:
                model, adapted = vqa.merge_adapter(adapted), None
            asked = repeated(rows, args.rows if batched else args.seed_rows)
            try:
                results.append(measure(design, model, tokenizer, asked, args))
                print(json.dumps(results[-1]), flush=True)
                if args.cache_features and design in ("ours", "fast"):
                    args.cache_features.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryDirectory(dir=args.cache_features) as folder:
                        for state in ("cold", "warm"):
                            results.append(measure(design, model, tokenizer, asked, args, state, folder))
                            print(json.dumps(results[-1]), flush=True)
            except RuntimeError as error:  # memory, or a CUDA graph; the other designs still run
                failed[design] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{design}: {failed[design]}")
    report = {
        **machine(),
        "matmul_ceiling_tflops": ceiling,
        "gpu_memory_limit_gib": args.gpu_memory_limit_gib,
        "batch_size": args.batch_size,
        "distinct_rows": len(rows),
        "designs": results,
        "failed": failed,
    }
    reference = next((r["samples_per_second"] for r in results if r["design"] == "seed"), None)
    print(f"\n{report['device']}: matrix products reach {ceiling:.3g} TFLOP/s; {len(rows)} distinct rows")
    heads = (
        "design",
        "rows",
        "prompt",
        "samples/s",
        "x seed",
        "tokens/s",
        "of ceiling",
        "waiting",
        "filling s",
        "prefill s",
        "decoding s",
        "GiB",
        "reserved",
    )
    print("".join(f"{head:>11}" for head in heads))
    for r in results:
        cells = [r["design"], r["rows"], f"{r['prompt_tokens']:.0f}", f"{r['samples_per_second']:.3g}"]
        cells += ["-" if reference is None else f"{r['samples_per_second'] / reference:.2f}"]
        cells += [f"{r['tokens_per_second']:.0f}", f"{r['tflops'] / ceiling:.0%}", f"{r['waiting_for_data']:.0%}"]
        cells += [f"{r[f'seconds_{part}']:.1f}" for part in ("filling", "reading", "decoding")]
        cells += [f"{r[name]:.1f}" if cuda else "-" for name in ("peak_allocated_gib", "peak_reserved_gib")]
        print("".join(f"{cell:>11}" for cell in cells))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"not measured, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
