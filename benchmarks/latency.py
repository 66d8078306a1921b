"""Milliseconds from a question on disk to its answer, one question at a time, and where they go.

    python benchmarks/latency.py --model_name_or_path tests/fixtures/full_size_model \\
        --data_path test_set/in_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/in_002-001 \\
        --output latency.json

seed            media decoded one after the other, all tokens of speech, adapter unmerged, transformers' `generate`
full            `model.answer` on the same tokens, adapter merged (in 4 bits it stays apart)
speech          with `audio_tokens speech`
video           with `audio_tokens speech` and `frame_mode video`
cascade         a Whisper transcribes while the frames are decoded, then `model.answer` is asked in words
cascade_video   the same with `frame_mode video`

All designs use one model in one process, with random weights and no stop tokens, so that every answer has
`--max_new_tokens` tokens. The cascade's Whisper is a large-v3-turbo: its encoder is the model's own, its decoder has
four layers; it writes `--transcript_tokens` tokens, and the question of the row is asked in their place. It has the
buffers and CUDA graphs of `OneQuestion`, and an encoder that runs as soon as the speech is decoded, as the others have.

media           until the last frame is decoded, scaled and cut (and, in the cascade, the transcript is there)
first token     from then on: encoders and prompt
decoded         the first token from frames and speech that are decoded, in full size: scaling, cutting and mel included
each token      the mean of the further ones
end to end      files on disk to the last token

A second table has the designs by length of speech (`--seconds`): the speech of a row, repeated. A third one compares
the tokens of `model.answer` with those of `answer_batch`, and, for the rounding of batches alone, those of batches of
one with those of larger ones.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa
from benchmarks.speed_common import add_data_flags, machine, synchronize

# Tokens, and whether the question is transcribed first.
DESIGNS = {
    "seed": (("full", "images"), False),
    "full": (("full", "images"), False),
    "speech": (("speech", "images"), False),
    "video": (("speech", "video"), False),
    "cascade": (("full", "images"), True),
    "cascade_video": (("full", "video"), True),
}
PARTS = ("media", "first_token", "each_token", "total")


class Transcriber:
    """A Whisper with random weights and the encoder of a model, which decodes greedily as `OneQuestion` does."""

    START = (1, 2, 3, 4)  # any ids: start of transcript, language, task, no timestamps

    def __init__(self, model: vqa.SpeechMixin, tokens: int):
        audio = vqa.audio_config_of(model.config)
        width, heads, wide = audio.d_model, audio.encoder_attention_heads, audio.encoder_ffn_dim
        decoder = {"decoder_layers": 4, "decoder_attention_heads": heads, "decoder_ffn_dim": wide, "vocab_size": 51_866}
        decoder |= {"encoder_layers": 1}  # its own encoder is not used
        with torch.random.fork_rng(), model.device:
            torch.manual_seed(1)
            shape = WhisperConfig(**model.config.audio_config | decoder | {"d_model": width})
            self.whisper = WhisperForConditionalGeneration(shape).to(model.audio_encoder.dtype).eval()
        self.whisper.model.encoder = model.audio_encoder
        self.model, self.tokens, self.heads, self.replay = model, tokens, heads, vqa.OneQuestion(model).replay
        size = 2, 1, heads, len(self.START) + tokens, width // heads
        self.own = [model.audio_encoder.conv1.weight.new_zeros(size) for _ in range(4)]
        self.heard: list[list[torch.Tensor]] = []
        self.start = torch.tensor(self.START, device=model.device)

    def split(self, projected: torch.Tensor) -> torch.Tensor:
        """[n, width] as [1, heads, n, head size]."""
        return projected.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]

    def listen(self, mel: torch.Tensor) -> torch.Tensor:
        """Encode a mel; keep what each layer of the decoder attends to."""
        outputs = self.model.encode_audio(mel, None)
        layers = [layer.encoder_attn for layer in self.whisper.model.decoder.layers]
        self.heard = [[self.split(part(outputs)) for part in (a.k_proj, a.v_proj)] for a in layers]
        return outputs

    def read(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The most likely token behind the last of `ids` int64 [n], which stand at `places`: int64 [1]."""
        decoder = self.whisper.model.decoder
        x = decoder.embed_tokens(ids) + decoder.embed_positions.weight[places]
        mask = torch.arange(self.own[0].shape[3], device=x.device) <= places[:, None]

        def attended(attention, x, keys, values, **how):
            mixed = F.scaled_dot_product_attention(self.split(attention.q_proj(x)), keys, values, **how)
            return attention.out_proj(mixed[0].transpose(0, 1).flatten(1))

        for layer, own, heard in zip(decoder.layers, self.own, self.heard, strict=True):
            normed, attention = layer.self_attn_layer_norm(x), layer.self_attn
            for buffer, part in zip(own, (attention.k_proj, attention.v_proj), strict=True):
                buffer.index_copy_(2, places, self.split(part(normed)))
            x = x + attended(attention, normed, *own, attn_mask=mask)
            x = x + attended(layer.encoder_attn, layer.encoder_attn_layer_norm(x), *heard)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return self.whisper.proj_out(decoder.layer_norm(x[-1:])).argmax(-1)

    def begin(self, start: torch.Tensor) -> torch.Tensor:
        """Read the start; the first token and its place, int64 [2]."""
        places = torch.arange(len(start), device=start.device)
        return torch.cat([self.read(start, places), places[-1:] + 1])

    def step(self, state: torch.Tensor) -> torch.Tensor:
        """Read a token at its place; the next one and its place."""
        token, place = state.split(1)
        return torch.cat([self.read(token, place), place + 1])

    @torch.inference_mode()
    def __call__(self, mel: torch.Tensor) -> list[int]:
        """The tokens of a transcript."""
        self.replay(self.listen, *vqa.on_device({"mel": mel}, self.model.device).values())
        state = self.replay(self.begin, self.start)
        ids = [int(state[0])]
        while len(ids) < self.tokens:
            state = self.replay(self.step, state)
            ids.append(int(state[0]))
        return ids


class Clock:
    """A streamer for `generate` that notes when each token was there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Of the prompt, then of each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Of the answer."""


def ask_seed(model, clip: Sequence[Path], speech: Path, question: str, tokens: int) -> dict[str, float]:
    """One question in the design of the seed."""
    processor, start, clock = model.processor, time.perf_counter(), Clock()
    frames = [vqa.load_frame(path, processor.max_image_size) for path in clip]
    row = vqa.VQARow("latency.py", 1, "", "", (), question, "", "", "")
    sample = processor.make_sample(row, frames, vqa.load_speech(speech), with_answer=False)
    media, pad = time.perf_counter(), processor.tokenizer.pad_token_id
    decoding = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=pad)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        batch = vqa.on_device(vqa.VQACollator(pad, "left")([sample]), model.device)
        model.generate(**batch, generation_config=decoding, streamer=clock)
    _, first, *_, last = [*clock.times, clock.times[-1]]
    parts = {"media": media - start, "first_token": first - media, "decode": last - first, "total": last - start}
    return {name: 1000 * seconds for name, seconds in parts.items()}


def ask_ours(model, clip: Sequence, speech, question: str, tokens: int) -> dict[str, float]:
    """One spoken question to `model.answer`."""
    return model.answer(clip, speech, max_new_tokens=tokens).ms


def ask_cascade(
    transcribe: Transcriber, model, clip: Sequence[Path], speech: Path, question: str, tokens: int
) -> dict[str, float]:
    """One spoken question, transcribed and then asked in words."""
    start = time.perf_counter()
    media = vqa.read_media(model.processor, clip, speech, model.device)
    transcribe(next(media)[0])
    cut = list(itertools.islice(media, len(clip)))
    before = 1000 * (time.perf_counter() - start)
    ms = model.answer(cut, question=question, max_new_tokens=tokens).ms
    list(media)  # the frames are checked meanwhile
    return {**ms, "media": before + ms["media"], "total": before + ms["total"]}


def measure(ask: Callable, asked: Sequence[tuple], tokens: int, seconds: float) -> dict:
    """Ask each of `asked` twice, count the second time; median, 95th percentile and all figures of each part in ms.
    What takes more than `seconds` ends sooner."""
    gc.collect()
    found, end = [], time.perf_counter() + seconds
    for counted in (False, True):
        for question in asked:
            synchronize()
            ms = ask(*question, tokens)
            if counted:
                found.append(ms | {"each_token": ms["decode"] / max(tokens - 1, 1)})
            if time.perf_counter() > end - (0 if counted else seconds / 2):
                break
    parts = {part: [ms[part] for ms in found] for part in PARTS}
    return {"questions": len(found), "ms": parts} | {
        name: {part: function(values) for part, values in parts.items()}
        for name, function in (("median", statistics.median), ("p95", lambda v: float(np.percentile(v, 95))))
    }


def speech_of(row, seconds: float, folder: Path) -> Path:
    """A WAV of `seconds` with the speech of a row, repeated."""
    speech = vqa.load_speech(row.audio_path)
    samples = np.resize(speech, round(seconds * vqa.SAMPLE_RATE))
    path = folder / f"{row.audio_path.stem}_{seconds:g}.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(vqa.SAMPLE_RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path


def equal_tokens(model, asked: Sequence[tuple], tokens: int) -> dict[str, float]:
    """Shares of equal tokens and of equal answers: `model.answer` beside `answer_batch` on one row, and that beside a
    batch of all rows."""
    processor, samples = model.processor, []
    for clip, speech, _ in asked:
        frames = [vqa.load_frame(path, processor.max_image_size) for path in clip]
        row = vqa.VQARow("latency.py", 1, "", "", (), "", "", "", "")
        samples.append(processor.make_sample(row, frames, vqa.load_speech(speech), with_answer=False))
    pad = processor.tokenizer.pad_token_id
    single = [model.answer(clip, speech, max_new_tokens=tokens).ids for clip, speech, _ in asked]
    alone = [vqa.answer_batch(model, [sample], pad, [], tokens)[0][0] for sample in samples]
    together = [ids for ids, _ in vqa.answer_batch(model, samples, pad, [], tokens)]
    found = {}
    for name, one, other in (("answer", single, alone), ("batches", alone, together)):
        pairs = [(a, b) for one_ids, ids in zip(one, other, strict=True) for a, b in zip(one_ids, ids, strict=True)]
        found[f"{name}_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
        found[f"{name}_first"] = sum(a[0] == b[0] for a, b in zip(one, other, strict=True)) / len(one)
        found[f"{name}_answers"] = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    return found


def profiled(ask: Callable) -> str:
    """Where one question spends its time, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        ask()
        synchronize()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def load(args: argparse.Namespace, four_bits: bool):
    """A PeftModel with random weights, whose adapter does something, and its tokenizer."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    tokenizer = vqa.load_tokenizer(args.model_name_or_path)
    base = vqa.load_model(
        *(args.model_name_or_path, tokenizer), init="random", seed=1, dtype=dtype, device=device, load_in_4bit=four_bits
    )
    adapted = vqa.add_lora(base).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # zero until now, so that merging would change nothing
                weight.normal_(std=0.01)
    for part in (base.model.visual, base.audio_encoder):  # as `load_trained` does
        vqa.round_weights(part, dtype)
    return adapted, tokenizer


def measure_precision(precision: str, args: argparse.Namespace, rows: list, folder: Path, report: dict) -> None:
    """Add to `report` the figures of all designs in one precision: by design, by length of speech, and of equal tokens;
    after each design it is printed and written."""
    adapted, tokenizer = load(args, precision == "4bit")
    model = adapted.get_base_model()
    clips = [vqa.select_frames(row.frame_paths, args.frames) for row in rows]
    asked = [(clip, row.audio_path, row.question) for clip, row in zip(clips, rows, strict=True)]
    equal, transcribe = report["equal"].setdefault(precision, {}), None
    for design in args.designs:
        tokens, cascaded = DESIGNS[design]
        if design != "seed" and adapted is not None and precision != "4bit":
            model, adapted = vqa.merge_adapter(adapted), None
        model.processor = vqa.VQAProcessor(tokenizer, model.config, args.max_image_size, "audio", *tokens)
        ask = partial(ask_seed if design == "seed" else ask_ours, model)
        start = time.perf_counter()
        if cascaded:
            transcribe = transcribe or Transcriber(model, args.transcript_tokens)
            ask = partial(ask_cascade, transcribe, model)
        elif design != "seed":
            model.warm_up(clips[0], max_new_tokens=args.max_new_tokens)
        warming = time.perf_counter() - start
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = {"precision": precision, "design": design, "warm_up_seconds": warming}
        result |= measure(ask, asked, args.max_new_tokens, args.limit)
        if design in ("full", "speech", "video"):
            decoded = [([vqa.decode_frame(p) for p in c], vqa.load_speech(s), q) for c, s, q in asked[: args.repeats]]
            found = measure(ask, decoded, args.max_new_tokens, args.limit)["ms"]
            sums = [sum(parts) for parts in zip(found["media"], found["first_token"], strict=True)]
            result["decoded"] = {"median": statistics.median(sums), "p95": float(np.percentile(sums, 95)), "ms": sums}
            equal[design] = equal_tokens(model, asked, args.max_new_tokens)
        if torch.cuda.is_available():
            result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        report["designs"].append(result)
        if design in ("speech", "video", "cascade", "cascade_video"):
            for seconds in args.seconds:
                spoken = [
                    (c, speech_of(row, seconds, folder), row.question) for c, row in zip(clips, rows, strict=True)
                ]
                found = measure(ask, spoken[: args.length_repeats], args.max_new_tokens, args.limit)
                report["lengths"].append({"precision": precision, "design": design, "seconds": seconds} | found)
        if args.profile and design != "seed":
            print(f"\n{precision} {design}\n{profiled(partial(ask, *asked[0], args.max_new_tokens))}", flush=True)
        show(report)
        if args.output:
            args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def show(report: dict) -> None:
    """Print the tables of a report."""

    def both(found: dict, part: str) -> str:
        return f"{found['median'][part]:.1f} ({found['p95'][part]:.1f})"

    references = {r["precision"]: r["median"]["total"] for r in report["designs"] if r["design"] == "seed"}
    print(f"\n{report['device']}, so far; ms, median (95th percentile)\n")
    print("| precision | design | n | media | first token | decoded | each token | end to end | x seed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in report["designs"]:
        decoded = f"{r['decoded']['median']:.1f} ({r['decoded']['p95']:.1f})" if "decoded" in r else ""
        seed = references.get(r["precision"])
        cells = [r["precision"], r["design"], r["questions"], both(r, "media"), both(r, "first_token"), decoded]
        cells += [both(r, "each_token"), both(r, "total"), f"{seed / r['median']['total']:.2f}" if seed else ""]
        print("| " + " | ".join(map(str, cells)) + " |")
    names = list(dict.fromkeys((r["precision"], r["design"]) for r in report["lengths"]))
    if names:
        print("\n| s of speech | " + " | ".join(f"{design}, {precision}" for precision, design in names) + " |")
        print("|---" * (len(names) + 1) + "|")
    for seconds in dict.fromkeys(r["seconds"] for r in report["lengths"]):
        row = {(r["precision"], r["design"]): both(r, "total") for r in report["lengths"] if r["seconds"] == seconds}
        print(f"| {seconds:g} | " + " | ".join(row.get(name, "") for name in names) + " |")
    for precision, designs in report["equal"].items():
        for design, shares in designs.items():
            print(f"equal, {precision} {design}: " + ", ".join(f"{n} {share:.1%}" for n, share in shares.items()))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags; an unknown or abbreviated one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--designs", default=",".join(DESIGNS), help="comma-separated (all)")
    parser.add_argument("--precisions", default="bf16,4bit", help="of bf16 (on a CPU float32) and 4bit (both)")
    parser.add_argument("--repeats", type=int, default=20, help="questions per design, of different rows (20)")
    parser.add_argument("--length_repeats", type=int, default=8, help="questions per length of speech (8)")
    parser.add_argument("--seconds", default="2,5,10,15,20,25", help="lengths of speech to compare, in s")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip (8)")
    parser.add_argument("--max_image_size", type=int, default=384, help="longer side of a frame in pixels (384)")
    parser.add_argument("--max_new_tokens", type=int, default=12, help="tokens of every answer (12)")
    parser.add_argument("--transcript_tokens", type=int, default=14, help="tokens of every transcript (14)")
    parser.add_argument(
        "--limit", type=float, default=30, help="s after which a measurement ends with what it has (30)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where one question of each design spends its time"
    )
    parser.add_argument("--output", type=Path, help="file for the figures as JSON. None: only print them")
    args = parser.parse_args(argv)
    for name, known in (("designs", DESIGNS), ("precisions", ("bf16", "4bit"))):
        values = getattr(args, name).split(",")
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{name}: {', '.join(map(repr, unknown))} is none of {', '.join(known)}")
        setattr(args, name, [value for value in known if value in values])  # the seed's before the adapter is merged
    args.seconds = [float(seconds) for seconds in args.seconds.split(",") if seconds]
    if min(args.repeats, args.length_repeats, args.frames, args.max_new_tokens, args.transcript_tokens) < 1:
        parser.error("--repeats, --length_repeats, --frames and the numbers of tokens must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line entry: see the module docstring."""
    args = parse_arguments(argv)
    rows = vqa.load_rows(args.data_path, args.frames_dir, args.audio_dir)[: args.repeats]
    report = {**machine(), "designs": [], "lengths": [], "equal": {}}
    with patch.object(vqa, "stop_token_ids", lambda tokenizer: []), tempfile.TemporaryDirectory() as folder:
        for precision in args.precisions:
            measure_precision(precision, args, rows, Path(folder), report)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
