"""Seconds and memory of --eval_answers, in a training run of two steps with random weights.

    python benchmarks/eval_answers.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path test_set/out_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/out_002-001 --bf16 True

Flags that it does not know are train_vqa.py's (`--max_eval_frames 0`, `--cache_features F`, `--load_in_4bit True`,
`--per_device_eval_batch_size 1`). Both steps are followed by an evaluation; the first one also loads and chooses
kernels. Random weights rarely stop, so that nearly every answer has the 32 tokens at which answers are cut. The speech
is linked into a temporary folder: with the data on another disk than /tmp, set TMPDIR.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from benchmarks.speed_common import add_data_flags, machine, repeat_rows, synchronize


def clocked(method, note):
    """`method` of VQATrainer, which hands its seconds, its peak memory in GiB and its result to `note`."""

    def call(*args):
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = method(*args)
        synchronize()
        peaks = (
            [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if torch.cuda.is_available() else []
        )
        note(time.perf_counter() - start, [peak / vqa.GIB for peak in peaks], result)
        return result

    return call


def main(argv: list[str] | None = None) -> list[dict]:
    """Command line entry: see the module docstring. Returns the figures of both evaluations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--answers", type=int, default=50, help="questions to answer; the data are repeated (50)")
    args, more = parser.parse_known_args(argv)
    figures = []

    def note_answers(seconds: float, peaks: list[float], answers: list[dict]) -> None:
        tokens = [answer["n_tokens"] for answer in answers]
        figures.append({"answers": len(answers), "tokens": sum(tokens), "answering_s": seconds, "peak_gib": peaks})

    def note_all(seconds: float, _, shares: dict) -> None:
        figures[-1] |= {"all_s": seconds, **shares}

    trainer = vqa.VQATrainer
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(trainer, "answer_rows", clocked(trainer.answer_rows, note_answers)),
        patch.object(trainer, "score_answers", clocked(trainer.score_answers, note_all)),
    ):
        data = repeat_rows(args.data_path, args.audio_dir, args.answers, Path(folder))
        flags = ["--model_name_or_path", args.model_name_or_path, "--frames_dir", args.frames_dir, *data]
        flags += ["--eval_data_path", data[1], "--eval_answers", str(args.answers), "--init", "random"]
        flags += ["--output_dir", f"{folder}/out", "--per_device_train_batch_size", "1", "--max_steps", "2"]
        flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True"]
        status = vqa.main([*flags, *more])
    print(json.dumps(machine()))
    for number, figure in enumerate(figures, start=1):
        print(f"evaluation {number}: {json.dumps(figure)}")
    if status:
        raise SystemExit(status)
    return figures


if __name__ == "__main__":
    main()
