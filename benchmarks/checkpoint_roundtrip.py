"""Time, bytes and memory of a checkpoint: write it, load it, add an adapter, merge, load the merge, generate.

    python benchmarks/checkpoint_roundtrip.py --work_dir /tmp/roundtrip --output roundtrip.json    # full size, a GPU
    python benchmarks/checkpoint_roundtrip.py --work_dir /tmp/roundtrip --tiny                     # on any CPU, seconds

The model is random and has the layout of transformers 4.47 (flat config, at full size without a Whisper config, old
names), with a vocabulary of 151,660 entries without gaps. At full size the work folder takes 37 GB. The exit status is
1 if loading needed more than 1.3 x the model's bytes on the GPU.
"""

import argparse
import gc
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import save_torch_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import merge_stage2_to_bf16 as merge
import train_vqa as vqa

FIXTURES = Path(vqa.__file__).parent / "tests" / "fixtures"
MAX_LOAD_RATIO = 1.3  # peak GPU bytes while loading / bytes of the model


def fill_vocabulary(source: Path, folder: Path) -> None:
    """Copy the config and tokenizer of a model folder, and fill the vocabulary up to the largest id.

    The fixture has the real Qwen2 ids after a gap; with a gap, an added token gets another id when reloaded.
    """
    shutil.copytree(source, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    taken = set(spec["model"]["vocab"].values())
    spec["model"]["vocab"] |= {f"filler{i}": i for i in range(max(taken)) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def old_name(name: str) -> str:
    """The name in transformers 4.47 of a parameter of today's model."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_old_layout(source: Path, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write random weights with the sizes of `source` as transformers 4.47 did, in shards."""
    fill_vocabulary(source, folder)
    tokenizer = vqa.load_tokenizer(folder)
    model = vqa.load_model(folder, tokenizer, init="random", dtype=dtype, device=device)
    weights = {old_name(name): p for name, p in model.named_parameters()}
    save_torch_state_dict(weights, folder, max_shard_size=vqa.SHARD_BYTES, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if vqa.WHISPER_LARGE_V3_TURBO.items() <= config["audio_config"].items():  # the default for a config without one
        del config["audio_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def add_adapter(model: vqa.SurgicalVQAModel, tokenizer, base: Path, folder: Path, rank: int) -> None:
    """Save an adapter whose `lora_B` is not zero, as after a training step, and its settings."""
    identity = vqa.fingerprint(model)
    with torch.device(model.device):
        peft_model = vqa.add_lora(model, r=rank)
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    origin = {"model_name_or_path": str(base), "init": "pretrained", "init_seed": 42, "dtype": dtype}
    settings = {"model": origin | {"base_fingerprint": identity}, "input": {"input_mode": "audio"}}
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings))


def resident_gib() -> tuple[float, float]:
    """This process's resident memory in GiB, mapped file pages included: (now, peak since `reset_peaks`)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # not Linux: the peak of the complete run
        return 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peaks(cuda: bool) -> None:
    """Reset both peaks to the current use. If the kernel refuses, RAM's peak includes the earlier phases."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def phase(name: str, measurements: list[dict], cuda: bool, folder: Path | None = None) -> Iterator[None]:
    """Measure the body and append to `measurements`: seconds, GB in `folder` afterwards, peaks in GiB."""
    reset_peaks(cuda)
    before, start = resident_gib()[0], time.perf_counter()
    yield
    if cuda:
        torch.cuda.synchronize()
    measurements.append(
        {
            "phase": name,
            "seconds": time.perf_counter() - start,
            "gb_on_disk": sum(file.stat().st_size for file in folder.iterdir()) / 1e9 if folder else None,
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "ram_before_gib": before,
            "peak_ram_gib": resident_gib()[1],
        }
    )


def run(work: Path, tiny: bool) -> dict:
    """Run all phases in `work`; returns the measurements, versions and the generated ids."""
    cuda = torch.cuda.is_available() and not tiny
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32 if tiny else torch.bfloat16)
    source = FIXTURES / ("tiny_model" if tiny else "full_size_model")
    base, adapter, merged, rows = work / "base", work / "adapter", work / "merged", []
    with phase("write the 4.47 layout", rows, cuda, base):
        work.mkdir(parents=True, exist_ok=True)
        write_old_layout(source, base, dtype, device)
    tokenizer = vqa.load_tokenizer(base)
    with phase("load it", rows, cuda):
        model = vqa.load_model(base, tokenizer, dtype=dtype, device=device)
    size = sum(p.nbytes for p in model.parameters())
    with phase("add and save an adapter", rows, cuda, adapter):
        adapter.mkdir()
        add_adapter(model, tokenizer, base, adapter, rank=4 if tiny else 64)
    del model
    with phase("merge, read back, compare", rows, cuda, merged):
        paths = ["--stage1_model_path", str(base), "--stage2_adapter_path", str(adapter), "--output_path", str(merged)]
        merge.main([*paths, "--device", device, "--dtype", str(dtype).removeprefix("torch.")])
    with phase("load the merge", rows, cuda):
        model = vqa.load_trained(merged, dtype=dtype, device=device).model
    inputs = merge.sample_inputs(model)
    with phase("generate 8 tokens", rows, cuda), torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    loads = [row["peak_gpu_gib"] * 2**30 / size for row in rows if row["phase"].startswith("load") and cuda]
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "model_gb": size / 1e9,
        "phases": rows,
        "load_ratio": max(loads, default=None),
        "generated_ids": tokens.tolist(),
    }


def show(result: dict) -> str:
    """The measurements as a Markdown table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['device']}, {versions}; the model takes {result['model_gb']:.2f} GB",
        "| phase | seconds | GB on disk | peak GPU GiB | RAM before, peak GiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["phases"]:
        disk, gpu = (f"{row[k]:.2f}" if row[k] is not None else "-" for k in ("gb_on_disk", "peak_gpu_gib"))
        ram = f"{row['ram_before_gib']:.1f}, {row['peak_ram_gib']:.1f}"
        lines.append(f"| {row['phase']} | {row['seconds']:.1f} | {disk} | {gpu} | {ram} |")
    if result["load_ratio"]:
        lines.append(f"\nLoading peaks at {result['load_ratio']:.3f} x the model's bytes on the GPU")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="empty or new folder for the checkpoints")
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny model, in float32 on the CPU")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in --work_dir")
    parser.add_argument("--output", type=Path, help="file for the measurements as JSON")
    args = parser.parse_args(argv)
    if args.work_dir.exists() and any(args.work_dir.iterdir()):
        raise vqa.VQAError(f"--work_dir {args.work_dir}: is not empty; name a new folder")
    try:
        result = run(args.work_dir, args.tiny)
    finally:
        if not args.keep:
            shutil.rmtree(args.work_dir, ignore_errors=True)
    print(show(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(result["load_ratio"] is not None and result["load_ratio"] > MAX_LOAD_RATIO)


if __name__ == "__main__":
    vqa.run(main)
