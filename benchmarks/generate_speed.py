"""How many answers a second: evaluation's own batches, beside one row at a time with the adapter apart.

    python benchmarks/generate_speed.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path test_set/in_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/in_002-001 \\
        --gpu_memory_limit_gib 38.5 --output speed.json

seed: batches of one, the adapter unmerged, transformers' `generate`. ours: `answer_arm` of evaluate_checkpoint.py with
its defaults, the adapter merged, on the same tokens. fast: the same with `audio_tokens speech` and `frame_mode video`.
Between seed and ours, each with one thing changed: apart (batches, the adapter unmerged), merged (batches of one, the
adapter merged). Ours with other ways to decode, from `decoding_changes.py`: library (`generate` on the same batches),
grouped (`grouped_attention`) and graphs (with `GraphDecoder` too). All on one model in one process, with random
weights, so that no answer ends by itself: the stop tokens are taken away, and every answer has `--max_new_tokens`
tokens. Rows are repeated under other keys where the data have fewer than `--rows`. Media are decoded ahead in threads
in all of them.

With `--cache_features` ours and fast are measured three times: encoding as rows come; `cold`, the folder empty and the
time to fill it counted; and `warm`, everything kept and only the time to answer counted (`filling` says how long it
took to find out that nothing was lacking, which is once a run, however many rows).
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
from benchmarks.speed_common import machine, matmul_ceiling, synchronize

SAME, FEWER = ("full", "images"), ("speech", "video")
# Tokens, whether batches are ours, and whether the adapter is folded in: once it is, it cannot be taken out again.
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
WARM_UP = 2  # rows answered before the clock starts: kernels are loaded and chosen at their first use


def repeated(rows: list, count: int) -> list:
    """`count` VQARows, gone through again under other ids where there are fewer."""
    turns = [divmod(n, len(rows)) for n in range(count)]
    return [dataclasses.replace(rows[n], id=rows[n].id + (f"_{turn}" if turn else "")) for turn, n in turns]


class Clocked:
    """`ahead` of train_vqa.py, with a sum of the seconds that its user waits for a result."""

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
    """A function with the sum of the seconds that its calls take, the GPU's work included."""

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
        batch = ev.on_device(collate([sample]), model.device)
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

    answer_batch = {"graphs": GraphDecoder(), "library": answer_by_library}.get(design, ev.answer_batch)
    with patch.object(ev, "answer_batch", answer_batch):
        answer(present(rows[:WARM_UP]))
    inputs = present(rows)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    clock, start = Clocked(), time.perf_counter()
    if cache:
        inputs.features = vqa.FeatureStore(folder, model, processor)
        inputs.features.fill([inputs])
    filling = time.perf_counter() - start
    if cache == "warm":
        start += filling
    reading, batches = Timed(ev.prefill), Timed(answer_batch)
    with (
        patch.object(vqa, "ahead", clock),
        patch.object(ev, "prefill", reading),
        patch.object(ev, "answer_batch", batches),
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
        "seconds_reading": reading.seconds,  # the prompts, waiting for data included; of batched designs alone
        "seconds_decoding": batches.seconds - reading.seconds,
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": (prompt + tokens) / seconds,
        "waiting_for_data": clock.waited / seconds,
        "tflops": 2 * decoder * (prompt + tokens) / seconds / 1e12,  # of the decoder's matrices alone
    }
    if torch.cuda.is_available():
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if args.profile:
        print(f"\n{design}: where {args.profile} rows spend their time")
        with patch.object(ev, "answer_batch", answer_batch):
            print(profiled(partial(answer, present(rows[: args.profile]))))
    return result


def profiled(answer) -> str:
    """A table of what `answer` spends its time on: the parts of a batch, then the operations by their own time."""
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

    prefill = ev.prefill
    with (
        patch.object(ev, "prefill", named("## prefill", timed)),
        patch.object(ev, "answer_batch", named("## a batch", ev.answer_batch)),
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
    parser.add_argument("--model_name_or_path", required=True, help="folder with config and tokenizer")
    parser.add_argument("--data_path", required=True, help="JSONL of questions")
    parser.add_argument("--frames_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--audio_dir", required=True, help="as in train_vqa.py")
    parser.add_argument("--designs", default="seed,ours,fast", help=f"which of {', '.join(DESIGNS)}")
    parser.add_argument("--rows", type=int, default=200, help="questions to answer; the data are repeated to make them")
    parser.add_argument("--seed_rows", type=int, default=24, help="questions that seed and merged answer")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip")
    parser.add_argument("--max_image_size", type=int, default=384, help="longer side of a frame in pixels")
    parser.add_argument("--max_new_tokens", type=int, default=12, help="tokens of every answer")
    parser.add_argument("--batch_size", type=ev._batch_size, default="auto", help="of the designs with batches")
    parser.add_argument("--gpu_memory_limit_gib", type=float, default=0.0, help="hard cap on this process. 0: none")
    parser.add_argument(
        "--cache_features",
        type=Path,
        help="measure ours and fast with kept features too, cold and warm, in a folder made here and removed",
    )
    parser.add_argument("--profile", type=int, default=0, help="rows a design answers once more, profiled. 0: none")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON. None: print them alone")
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
            if "lora_B" in name:  # zero, so far: nothing to fold in
                weight.normal_(std=0.01)
    model, results, failed = adapted.get_base_model(), [], {}
    with patch.object(vqa, "turn_end_ids", lambda tokenizer: []):
        for design in sorted(args.designs, key=lambda name: DESIGNS[name][2]):
            _, batched, folded = DESIGNS[design]
            if folded and adapted is not None:
                model, adapted = vqa.fold_adapter(adapted), None
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
            except RuntimeError as error:  # memory, or a graph: the other designs go on
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
    print(f"\n{report['device']}: products of matrices reach {ceiling:.3g} TFLOP/s; {len(rows)} distinct rows")
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
        "reading s",
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
