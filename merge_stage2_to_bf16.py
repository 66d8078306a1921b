"""Merge a trained adapter into its base: one BF16 checkpoint that trains and evaluates without any other flag.

    python merge_stage2_to_bf16.py --stage1_model_path BASE --stage2_adapter_path ADAPTER --output_path OUT
    python merge_stage2_to_bf16.py --stage1_model_path BASE --output_path OUT     # no adapter: only converts the layout

Each merged weight is W + alpha / r * B A, computed in float32 and rounded once. OUT appears under its name only when
it is complete, has been read back, and answers as the model in memory did.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_vqa as vqa

SPARE_BYTES = 2**26  # config, tokenizer and headers


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; an unknown or abbreviated one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--stage1_model_path", required=True, help="folder or hub id of the base model")
    parser.add_argument("--stage2_adapter_path", help="folder or hub id of the adapter. None: only convert the base")
    parser.add_argument("--output_path", required=True, type=Path, help="folder to be made; must not exist")
    parser.add_argument("--audio_encoder", help="Whisper for a plain Qwen2-VL. None: as the adapter's settings say")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the merged weights")
    parser.add_argument(
        "--device", help="where to compute, such as cpu or cuda. None: the accelerator, if there is one"
    )
    parser.add_argument("--seed", type=int, help="of a new projector. None: as the adapter's settings say, else 42")
    parser.add_argument(
        "--prompt_layout",
        choices=list(vqa.PROMPT_LAYOUTS),
        help="prompt of a model without vqa_settings.json; an adapter without them needs it. None: as they say",
    )
    parser.add_argument(
        "--max_eval_frames", type=int, help="frames a clip in evaluation, 0 for all, needed beside --prompt_layout"
    )
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin and .pt weights (weights_only=True)")
    return parser.parse_args(argv)


def sample_inputs(model: vqa.SpeechMixin) -> dict[str, torch.Tensor]:
    """A batch of one made-up sample on the model's device: two frames of grey noise, and a second of a 440 Hz tone."""
    tokenizer = model.processor.tokenizer
    processor = vqa.VQAProcessor(tokenizer, model.config, max_image_size=112)
    noise = np.random.default_rng(0).integers(0, 256, (2, 112, 112), dtype=np.uint8)
    frames = [Image.fromarray(frame).convert("RGB") for frame in noise]
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(processor.max_samples)[: vqa.SAMPLE_RATE] / vqa.SAMPLE_RATE)
    row = vqa.VQARow("sample", 1, "tone", "noise", (), "?", "none", "The sample is noise.", "noise")
    sample = processor.make_sample(row, frames, tone.astype(np.float32), with_answer=True)
    batch = vqa.VQACollator(tokenizer.pad_token_id)([sample])
    del batch["labels"]  # with labels the model returns the loss alone
    return {name: value.to(model.device) for name, value in batch.items()}


def sample_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the last 16 positions of the sample, float32 on the CPU [16, vocabulary]."""
    with torch.no_grad():
        return model(**inputs, logits_to_keep=16).logits[0].float().cpu()


def compare(base: torch.Tensor, live: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype) -> str:
    """One line on logits [T, vocabulary] without the adapter, with it unmerged and merged, and why these differ."""
    moved, difference = ((live - other).abs().max().item() for other in (base, merged))
    same = (live.argmax(-1) == merged.argmax(-1)).sum().item()
    why = {
        torch.bfloat16: "expected: a merged weight is rounded to bf16, to 1 part in 256, where the live adapter adds "
        "its update unrounded, and bf16 rounds again in every layer",
        torch.float32: "expected: the same sums in another order",
    }[dtype]
    return (
        f"Largest logit difference, merged against unmerged: {difference:.3g}, where the adapter moves logits by up to "
        f"{moved:.3g}; {same} of {len(live)} most likely tokens are the same ({why})"
    )


def pick_device(name: str | None) -> torch.device:
    """The device of that name, for None the accelerator if there is one; VQAError where it is not here."""
    device = name or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a name that is none, or a device that is not here
        raise vqa.VQAError(f"--device {device}: not to be had here ({vqa.first_line(error)})") from error


def check_disk(folder: Path, weight_bytes: int) -> None:
    """VQAError where `folder` (made if need be) has no room for a checkpoint of `weight_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, weight_bytes + SPARE_BYTES
    if free < needed:
        left = ", ".join(map(str, folder.glob(".*.incomplete")))
        raise vqa.VQAError(
            f"--output_path: {folder} has {free / 1e9:.2f} GB free and the merged model takes {needed / 1e9:.2f} GB; "
            "make room or name another disk" + (f" (an interrupted merge left {left})" if left else "")
        )


def use_adapter(model: torch.nn.Module, enabled: bool) -> None:
    """Let the adapter inside `model` take part in its forward pass, or not."""
    for module in model.modules():
        if isinstance(module, vqa.BaseTunerLayer | vqa.ModulesToSaveWrapper):
            module.enable_adapters(enabled)


def write_settings(settings: dict, output: Path, dtype: str, identity: str, folder: Path) -> None:
    """Write what training chose, so that evaluation of the merged model repeats it, and the card; the base is the model
    itself."""
    merged_from = settings["model"]
    model = {"model_name_or_path": str(output), "init": "pretrained", "dtype": dtype, "base_fingerprint": identity}
    model |= {"audio_encoder": None, "load_in_4bit": False, "allow_pickle": False, "merged_from": merged_from}
    settings = {**settings, "model": {**merged_from, **model}}
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / vqa.CARD_FILE).write_text(vqa.model_card(settings), encoding="utf-8")


def check_written(
    folder: Path, vocab: dict[str, int], dtype: torch.dtype, device: torch.device, identity: str, logits: torch.Tensor
) -> None:
    """VQAError where the checkpoint in `folder`, read as any other, is not the model that was written."""
    read = vqa.load_trained(folder, device=device, dtype=dtype)
    if moved := dict(vocab.items() - read.processor.tokenizer.get_vocab().items()):
        raise vqa.VQAError(f"{folder}: tokens {moved} come back under other ids; the base's vocabulary has holes")
    difference = (sample_logits(read.model, sample_inputs(read.model)) - logits).abs().max().item()
    if read.base_fingerprint != identity or not difference <= 1e-3 * logits.abs().max().item():
        raise vqa.VQAError(
            f"{folder}: reads back as another model (logits differ by {difference:.3g}); is the disk faulty?"
        )


def read_settings(args, source: str, device: torch.device, changes: dict) -> tuple[dict, dict, object, object]:
    """(what the flags say of the prompt, the settings of `source`, its ModelSettings, its InputSettings).

    VQAError where the two contradict each other, or the flags tell half.
    """
    prompt = {"prompt_layout": args.prompt_layout} if args.prompt_layout else {}
    if args.max_eval_frames is not None and args.max_eval_frames < 0:
        raise vqa.VQAError(f"--max_eval_frames {args.max_eval_frames}: must be 0 (all frames) or more")
    if args.max_eval_frames is not None:
        prompt["max_eval_frames"] = args.max_eval_frames or None
    settings, model_settings, inputs = vqa.trained_settings(source, device.type, changes | prompt)
    if settings and inputs.max_eval_frames != settings["input"].get("max_eval_frames", 6):
        raise vqa.VQAError(f"--max_eval_frames {args.max_eval_frames}: {source} has settings of its own; leave it out")
    if prompt and not settings:
        vqa.refuse_unsaid_layout(source, prompt)
    return prompt, settings, model_settings, inputs


def write_merged(
    model: torch.nn.Module, settings: dict, args, dtype: torch.dtype, device: torch.device, logits: torch.Tensor
) -> None:
    """Write the model beside --output_path and read it back; only then does it get its name."""
    output = args.output_path.absolute()
    partial = output.with_name(f".{output.name}.{os.getpid()}.incomplete")
    partial.mkdir()
    try:
        print(f"Writing {output}")
        vqa.write_weights(model, partial)
        base = vqa.resolve_model_dir(args.stage1_model_path)
        vqa.write_config_and_tokenizer(model, model.processor.tokenizer, base, partial)
        identity = vqa.fingerprint(model)
        if settings:
            origin = vqa.hub_origin(base) or settings.get("base", {})
            write_settings({**settings, "base": origin}, output, args.dtype, identity, partial)
        vqa.write_digests(partial, vqa.read_digests(base, args.stage2_adapter_path))
        vqa.write_manifest(partial)  # a power cut must not leave a finished name on truncated files
        vocab = model.processor.tokenizer.get_vocab()
        model.to("meta")  # two models at a time may not fit
        check_written(partial, vocab, dtype, device, identity, logits)
        partial.rename(output)
        vqa.sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the flags say; returns the exit status."""
    # 1. Arguments, and all that can be refused before weights are read
    args = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    output, dtype = args.output_path.absolute(), getattr(torch, args.dtype)
    if output.exists():
        raise vqa.VQAError(f"--output_path {output}: is there already; name a new folder, or remove it")
    device = pick_device(args.device)
    adapter = args.stage2_adapter_path
    if adapter:
        adapter = str(vqa.resolve_model_dir(adapter, weights=True, flag_name="--stage2_adapter_path"))
        args.stage2_adapter_path = adapter
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise vqa.VQAError(f"{adapter}: holds no adapter (adapter_config.json, adapter_model.safetensors)")
    changes = {"model_name_or_path": args.stage1_model_path}
    changes |= {"audio_encoder": args.audio_encoder} if args.audio_encoder else {}
    changes |= {"init_seed": args.seed} if args.seed is not None else {}
    source = adapter or args.stage1_model_path
    prompt, settings, model_settings, inputs = read_settings(args, source, device, changes)

    # 2. Load, merge, and answer one sample before and after
    print(f"Loading {args.stage1_model_path} on {device} in {args.dtype}")
    four_bits = bool(adapter) and model_settings.load_in_4bit
    # Quantised from the dtype that training quantised from, so that the weights are those that the adapter knows.
    base_dtype = getattr(torch, model_settings.dtype) if four_bits else dtype
    dtypes = {"dtype": base_dtype, "base_dtype": base_dtype}
    changes |= prompt | dtypes | {"device": device, "allow_pickle": args.allow_pickle}
    trained = vqa.load_trained(source, merge=False, **changes)
    if four_bits:
        vqa.dequantise(trained.model, dtype)
        print(
            "The adapter was trained on the base in 4 bits and goes into those weights, dequantised: the merged model "
            "answers as in training, and differs from the 16-bit base by the rounding to 4 bits as well"
        )
    model = trained.model
    if prompt and not settings:
        inputs = dataclasses.replace(inputs, encoder_tokens=model.processor.encoder_tokens)
        settings = {"model": dataclasses.asdict(model_settings), "input": dataclasses.asdict(inputs)}
    check_disk(output.parent, sum(p.numel() for p in model.parameters()) * dtype.itemsize)
    inputs = sample_inputs(model)
    if adapter:
        print(f"Merging {adapter}")
        live = sample_logits(model, inputs)
        use_adapter(model, False)
        before = sample_logits(model, inputs)
        use_adapter(model, True)
        model = vqa.merge_adapter(model)
        for weight in model.parameters():  # what was trained in full is float32; one checkpoint has one dtype
            weight.data = weight.data.to(dtype)
    merged = sample_logits(model, inputs)

    # 3. Write beside the output, read back, and only then give it its name
    del trained
    write_merged(model, settings, args, dtype, device, merged)
    print("Read back: every answer to the sample is that of the model in memory")
    if adapter:
        print(compare(before, live, merged, dtype))
    print(f"Saved {output}: give it as --model_name_or_path")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an ended job removes what it half wrote
    vqa.run(main)
