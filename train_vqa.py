"""Teach a vision-language model to hear a surgeon's spoken question, watch endoscopic frames, and answer.

    python train_vqa.py \\
        --train_data_path test_set/in_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/in_002-001 \\
        --output_dir ./checkpoints/surgical_vqa_50samples \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 2e-4 \\
        --num_train_epochs 20 --save_strategy epoch --bf16 True --logging_steps 5

    python train_vqa.py --dry_run ...     # reads the data, counts parameters, tokens and steps; allocates no weights

Qwen2-VL answers, the encoder of Whisper listens, one linear layer joins them:

    speech -> log-mel [mel, 3000] -> Whisper encoder (frozen) -> [1500, d] -> audio_projector (trained) -> audio tokens
    frames -> Qwen2-VL vision encoder (frozen)                                                          -> image tokens
    both + prompt -> Qwen2 decoder (LoRA) -> answer

`--train_decoder full`, `--train_vision_tower` and `--train_audio_encoder` train more than that.

In reading order: arguments, data, prompt and labels, dataset, model, loaders, feature cache, saving and resuming,
Trainer, the plan, main(). `evaluate_checkpoint.py` imports from here, so that training and evaluation cannot drift
apart.
"""

import contextlib
import copy
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import random
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import typing
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from datetime import timedelta
from functools import cache, lru_cache, partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import accelerate
import av
import av.logging
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio.transforms
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCardData,
    snapshot_download,
    split_torch_state_dict_into_shards,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from PIL import __version__ as PIL_VERSION
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    EarlyStoppingCallback,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging
from transformers.utils.versions import require_version
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

DEFAULT_MODEL = "kulsoom-abdullah/Qwen2-Audio-7B-Transcription"  # the published stage-2 checkpoint

SAMPLE_RATE = 16_000  # Hz, what Whisper was trained on
HOP_LENGTH = 160  # samples between two mel frames: 10 ms
MEL_FRAMES_PER_TOKEN = 2  # the encoder's second convolution has stride 2
SAMPLES_PER_TOKEN = HOP_LENGTH * MEL_FRAMES_PER_TOKEN  # one encoder output covers 20 ms
MAX_SPEECH_SECONDS = 30  # Whisper's window: 30 s x 16,000 / 320 = 1500 encoder outputs

MIN_SPEECH_SECONDS = 0.1  # no question is shorter
SILENCE = 1e-4  # -80 dB: the loudest sample of a recording that holds nothing
SPEECH_RATES = (8_000, 192_000)  # Hz
# The resampler's taps grow with rate x 16,000 / gcd^2: 70,560 for 44,100 Hz; a rate such as 44,101 takes 2.8 GB.
MAX_RATE_RATIO = 4e6
# As librosa resampled what the published models heard (soxr_hq): flat to 0.913 of the band, and 20 bits = 120.4 dB
# down at its end. Kaiser's design from that: beta = 0.1102 (120.4 - 8.7); taps = (120.4 - 7.95) / (2.285 x 0.087 pi),
# of which each side has half, counted in zero crossings of a cut-off amid the two.
RESAMPLING = {"lowpass_filter_width": 86, "rolloff": 0.9565, "resampling_method": "sinc_interp_kaiser", "beta": 12.31}

FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FRAME_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other readers are not needed
AUDIO_EXTENSIONS = (".mp3", ".wav", ".flac", ".ogg", ".m4a", ".webm", ".opus", ".aac")
# How a file begins, what it then is, and FFmpeg's reader for it where it is sound. A named reader keeps FFmpeg from its
# others: a playlist, say, would open further files.
KINDS = (
    (rb"\xff\xfe[^\0]\0|\xfe\xff\0[^\0]", "UTF-16 text", None),
    (rb"....ftyp(heic|heix|mif1|msf1|avif|avis)", "a HEIC or AVIF image", None),
    (rb"GIF8", "a GIF image", None),
    (rb"(RIFF|RF64)....WAVE", "a WAV", "wav"),
    (rb"fLaC", "a FLAC", "flac"),
    (rb"OggS", "an Ogg", "ogg"),
    (rb"....ftyp", "an MP4 (m4a)", "mov"),
    (rb"\x1aE\xdf\xa3", "a WebM", "matroska"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "an AAC", "aac"),
    (rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]", "an MP3", "mp3"),
    (rb"\xff\xd8\xff", "a JPEG image", None),
    (rb"\x89PNG", "a PNG image", None),
    (rb"RIFF....WEBP", "a WebP image", None),
    (rb"\s*<(!doctype html|html)", "an HTML page", None),
    (rb"\s*<\?xml", "an XML page", None),
    (rb"\s*[{\[]", "JSON text", None),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", None),
)
IMAGES = ("a JPEG image", "a PNG image", "a WebP image")
# EXIF orientations 2 to 8, and what turns them upright.
TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {number: Image.Transpose[name] for number, name in enumerate(TURN_NAMES.split(), start=2)}
# What Pillow raises on damaged files.
DECODE_ERRORS = (
    *(Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError),
    *(KeyError, TypeError, OverflowError, MemoryError, AttributeError, ZeroDivisionError),
)
STREAMED_BYTES = 10**9  # a WAV's header that claims as much was written before its length was known
MAX_FRAME_PIXELS = 50_000_000  # 150 MB decoded; an endoscope has 2 million, a decompression bomb billions
REDUCING_GAP, BICUBIC_BITS = 2.0, 22  # how frames are scaled: Pillow's argument, and the digits of its weights
MAX_ASPECT = 100  # Qwen2-VL refuses sides of more than 200 : 1, and scaling down rounds the short one
# Layer III bit rates in kbit/s: of MPEG 2 and 2.5, of MPEG 1.
MP3_KBPS = (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
# Media that passed under others are decoded again; raise the number when decode_frame or decode_audio refuse more, or
# when more is remembered.
CHECKED_BY = f"checks 4, Pillow {PIL_VERSION}, av {av.__version__}"
MAX_REMEMBERED = 500_000  # files that passed, about 140 bytes each
ONE_COLOUR = 8  # levels, of 255: a frame in which no channel has two that are farther apart shows nothing
MAX_EMPTY = 0.01  # share of the rows, from two rows on, that may have frames which show nothing
DIGEST_BYTES = 16  # of a sha256: two of a million contents agree with probability 2**-89
SPEECH_KEPT = 64  # files whose mel each loader worker keeps: 98 MB in 128 bins
MAX_KNOWN_TEXTS = 10_000  # tokenised pieces of prompts and answers, a few MB
FEATURE_SCHEMA = 2  # raise it when what the encoders are fed, or what is stored of them, changes

# Where media lie below their folders, without extension: what is looked for, and what else is advised where that finds
# nothing. {file} comes first, as one flag then serves training and evaluation.
AUDIO_NAMES = ("{video_id}_{id}_{question_type}", "{video_id}_{id}", "{id}")
FRAME_NAMES = ("{video}/{frame}", "{video}/{frame_number}")
AUDIO_PATTERNS = [f"{folder}{name}" for folder in ("", "{file}/", "out_{video_id}/", "in_{video_id}/", "{video_id}/")
                  for name in AUDIO_NAMES]  # fmt: skip
FRAME_PATTERNS = [f"{folder}{name}" for folder in ("", "{file}/") for name in (*FRAME_NAMES, "{frame}")]
FRAME_PATTERNS += ["{video_id}/{frame}", "{video_id}/{frame_number}", "{frame_number}"]
ROW_FIELDS, FRAME_FIELDS = ("id", "video_id", "question_type", "file"), ("frame", "frame_number", "video")

INPUT_MODES = ("audio", "audio_text", "text")
AUDIO_TOKENS = ("full", "speech")
FRAME_MODES = ("images", "video")
INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."
# The published stage-2 checkpoint was trained with these two as plain text, which the tokenizer splits into pieces.
AUDIO_BOS, AUDIO_EOS = "<|audio_bos|>", "<|audio_eos|>"
AUDIO_PAD, NEW_PAD = "<|audio_pad|>", "<|pad|>"
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class PromptLayout:
    """The words of a prompt around speech, frames and instruction."""

    opening: str  # without speech; with it `<|im_start|>user\n<|audio_bos|>` SPEECH `<|audio_eos|>\n` opens
    before_frames: str  # between the speech and the frames
    question: str  # in words, before the instruction
    after_answer: str  # learned behind the stop token


USER_TURN, SYSTEM_TEXT = "<|im_start|>user\n", "You are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
# plain: the published stage-2 checkpoint. chat: the public scripts, which render the chat template with its default
# system turn and cut that turn's first three tokens off, so that the rest of it stands behind the speech.
PROMPT_LAYOUTS = {
    "plain": PromptLayout(USER_TURN, "", "Question: {}\n", ""),
    "chat": PromptLayout(f"<|im_start|>system\n{SYSTEM_TEXT}", SYSTEM_TEXT, "User Question: {}\n", "\n"),
}
IGNORE_INDEX = -100  # torch's cross entropy leaves these labels out

# Only the linear layers of the decoder: the same suffixes also occur in the Whisper encoder.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
LORA_MODULES_PER_LAYER = 7
# The encoder of openai/whisper-large-v3-turbo, which checkpoints in the 4.47 layout carry without saying so.
WHISPER_LARGE_V3_TURBO = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
WHISPER_LARGE_V3_TURBO |= {"num_mel_bins": 128, "max_source_positions": 1500}

# Fraction of the activations that torch.compile keeps. At 0.5 it keeps the outputs of matrix multiplications, and
# recomputes norms, activations and dropout.
ACTIVATION_MEMORY_BUDGET = 0.5
# Compiled batches are padded to a multiple of this many tokens, because cuDNN's attention plans anew for each length
# (0.15 s; a step takes 0.76 s). Of 14 lengths in 50 questions, 16 leaves 2 (0.2 % more tokens) and 64 leaves 1 (1.1 %).
PADDING_MULTIPLE = 16
# 0.46 is the first that transformers takes. Newer ones than were tested may store or compute otherwise.
BITSANDBYTES = "bitsandbytes>=0.46.1,<0.51"
# Values of --optim for which the Trainer takes an optimizer of bitsandbytes.
BITSANDBYTES_OPTIMIZER = re.compile(r"paged_\w+|(adamw(_bnb)?|ademamix|lion)_8bit|ademamix|lion_32bit|rmsprop_bnb\w*")
LIGER = "liger-kernel>=0.8"  # whose SwiGLU takes a factor for the gate and one for the product
GIB = 2**30
FITTING_SHARE = 0.93  # of the memory that an estimate may take: it may err, and the allocator leaves gaps
CUDA_CONTEXT_GIB = 1.0  # what the driver and cuBLAS hold beside the allocator
# States that an optimizer keeps of a parameter, by the names that --optim has for it. One is in float32, or in the 8
# bits of the name, with a float32 for each 256. Paged ones are in memory that the CPU and the GPU share.
OPTIMIZER_STATES = {"sgd|adafactor": 0, "adagrad|rmsprop.*|lion.*": 1, "adamw_.*": 2, "ademamix.*": 3, "paged_.*": 0}
EIGHT_BITS = 1 + 4 / 256

PREFILL_TOKENS = 16384  # prompts read at a time: enough to fill a GPU, and what MLP activations take stays bounded
# --eval_answers: a token keeps 57 kB at full size, so that 32 rows of 2,700 tokens take 5 GB; answers are cut as by
# evaluate_checkpoint.py's default.
ANSWERS_AT_ONCE, ANSWER_TOKENS = 32, 32
# One question at a time: its prompt is padded to a multiple of the first, the keys are read to one of the second, in
# blocks of the third. Each length that occurs takes a CUDA graph; for speech of up to 1,500 tokens these are 12 and 4.
PROMPT_BUCKET, KEYS_BUCKET, KEYS_BLOCK = 128, 512, 64
ANSWERS_DIR = "eval_answers"  # in --output_dir: step-N.jsonl with the rows, step-N.summary.json with their scores
ANSWER_METRICS = ("choice", "contains", "stopped")  # each logged as eval_...
SCORER = Path(__file__).resolve().with_name("evaluate_checkpoint.py")  # run, not imported: it imports this file

MAX_WORKERS = 8  # decoding 8 frames of 1240x1080 and the speech takes one core 0.3 s, a GPU step less than twice that
# The rest of a Whisper config speaks of its decoder.
AUDIO_CONFIG_FIELDS = (*WHISPER_LARGE_V3_TURBO, "activation_function", "scale_embedding", "init_std")

ATTENTION_KERNELS = {"sdpa": "SDPA", "eager": "eager", "flash_attention_2": "FlashAttention-2"}  # and how they are said
DECODER_TRAINING = ("lora", "full")
# How PEFT's modules_to_save call the projector, which is always trained, and the encoders, which are on request.
PROJECTOR, ENCODERS = "audio_projector", {"vision_tower": "visual", "audio_encoder": "audio_encoder"}
# The parts beside the decoder's layers, which are never in 4 bits.
SIXTEEN_BIT_PARTS = ("model.visual", "audio_encoder", PROJECTOR, "lm_head")
# bitsandbytes keeps the statistics of a 4-bit weight as tensors of their own, beside the packed one.
FOUR_BIT_KEY = re.compile(r"(.+)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__(?:nf4|fp4))")
# transformers 4 wrote other names; `from_pretrained` renames them, for this class only if told to.
KEY_MAPPING = {r"^visual\.": "model.visual.", r"^model\.(?!language_model\.|visual\.)": "model.language_model."}
# "flash" in the name: transformers then hands over all frames of a batch in one call.
FRAME_ATTENTION = "sdpa_frames_by_the_flash_interface"
QUESTION_ATTENTION = "sdpa_one_question"
RECOMPUTE = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

SHARD_BYTES = 5 * 10**9  # a file of weights
# Files of the base that other programs ask for and this project does not; none of them holds weights or code.
COPIED_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
COPIED_FILES += ("chat_template.json", "chat_template.jinja")
STARTED_FILE = "started_from_adapter"  # in --output_dir: a run without checkpoint must not resume on the bare base
SETTINGS_FILE = "vqa_settings.json"
DIGESTS_FILE = "training_digests.dat"  # of all that a model was trained on: see `VQARow.contents`
# Settings, and flags of the same names, that `load_model` and VQAProcessor take as they are.
BASE_FIELDS = ("init", "attn_implementation", "audio_encoder", "load_in_4bit")
PROCESSOR_FIELDS = ("max_image_size", "input_mode", "audio_tokens", "frame_mode", "prompt_layout")
RECORDED = ("_path", "_dir", "_pattern", "_samples", "_features")  # how flags end that its section `data` holds
# Fields of an adapter_config.json that `load_adapter` reads, or that show in the names of the adapter's tensors.
ADAPTER_FIELDS_READ = (
    *("r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "peft_type", "peft_version", "task_type", "inference_mode"),
    *("auto_mapping", "base_model_name_or_path", "revision"),
)
MANIFEST_FILE = "manifest.json"  # sizes and hashes of all other files of a checkpoint, but for the card
CARD_FILE = "README.md"  # which people fill in
PROGRESS_FILE = "vqa_progress.json"  # what the loss log has so far
EVALUATION_DUE = "evaluation_due"  # marker file: a signal interrupted the evaluation after this save
# What a run resumes from, beside the adapter or the full model.
RESUME_FILES = (SETTINGS_FILE, PROGRESS_FILE, "optimizer.pt", "scheduler.pt", "trainer_state.json")
# Of the files in a manifest evaluation needs those with these endings (so no pickle is uploaded), but not these two.
UPLOADED, NOT_UPLOADED = (".safetensors", ".json", ".jinja", ".txt", ".dat"), (PROGRESS_FILE, "trainer_state.json")
LAST_CHECKPOINT = "last-checkpoint"  # folder in the repo, for --hub_strategy checkpoint
# Weights and configs of another model that a repo held before: beside new ones they would be read.
MODEL_FILES = re.compile(r"(adapter_)?(config\.json|model[^/]*\.safetensors(\.index\.json)?)")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FOLLOW_SECONDS = 1800  # that a rank waits for one that failed before it, and may be saving
BROKEN_SECONDS = 10  # that it waits, where what the ranks share broke, to learn whether another one was killed
MAX_PROBLEMS_SHOWN = 20
# FFmpeg has one log for the process, which PyAV's `Capture` sorts by the thread that decodes. Errors only: good files
# have warnings too. Repeated lines stay: of two threads with equal damage one would hear nothing.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)

# PEFT reads a deprecated attribute of the model.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
# accelerate passes DDP an argument that torch 2.13 names anew.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


class VQAError(ValueError):
    """Something the user can fix: its text names the file, line, id or flag, and says what to do."""


def raise_problems(problems: Sequence, meaning: str = "") -> None:
    """Raise one VQAError for all `problems` (a line each up to MAX_PROBLEMS_SHOWN, the total, and what they mean)."""
    if problems:
        lines = [str(problem) for problem in problems[:MAX_PROBLEMS_SHOWN]]
        if len(problems) > 1:
            cut = f", the first {MAX_PROBLEMS_SHOWN} shown" if len(problems) > MAX_PROBLEMS_SHOWN else ""
            lines.append(f"{len(problems)} problems in all{cut}")
        raise VQAError("\n".join([*lines, meaning] if meaning else lines))


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def flag(default, explanation: str, choices: Sequence[str] | None = None):
    """A field of an argument dataclass: its default, its text for --help, and what it may be."""
    return field(default=default, metadata={"help": explanation, **({"choices": list(choices)} if choices else {})})


# Flags of transformers' TrainingArguments that training does not take, and why.
NOT_OFFERED = {
    "average_tokens_across_devices": "it stays on, since each answer token weighs the same, on whichever GPU it is",
    "deepspeed fsdp fsdp_config parallelism_config": "several GPUs are used by torchrun alone",
    "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout "
    "local_rank log_level_replica log_on_each_node save_on_each_node": "torchrun and this script decide it",
    "batch_eval_metrics do_predict eval_do_concat_batches eval_use_gather_object include_for_metrics "
    "prediction_loss_only": "an evaluation in training keeps no logits; evaluate_checkpoint.py asks for answers",
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs": (
        "here it is --checkpoint_every_n (1: every layer, 0: none)"
    ),
    "torch_compile torch_compile_backend torch_compile_mode": "here it is --compile_layers True",
    "liger_kernel_config": "--use_liger_kernel takes Liger's RMSNorm and SwiGLU alone, because the fused cross entropy "
    "bypasses the speech",
    "fp16 bf16_full_eval fp16_full_eval": "--bf16 True sets the precision of training and evaluation",
    "hub_always_push": "training waits for each upload, so that none is left out",
    "project trackio_bucket_id trackio_space_id trackio_static_space_id": "training uploads nothing to Trackio",
    "debug logging_nan_inf_filter": "a loss or gradient that is not finite ends the run and names its rows",
    "do_train": "training is what this script does",
    "dataloader_drop_last": "it would drop rows of the evaluation too",
    "dataloader_in_order ignore_data_skip": "a resumed run could not go on with the same rows",
    "enable_jit_checkpoint": "after a SIGTERM every run saves, and --resume_from_checkpoint True goes on from there",
    "label_names length_column_name remove_unused_columns": "this script makes its samples itself",
    "label_smoothing_factor": "the loss is the plain cross entropy of the answer",
    "optim_args optim_target_modules": "the optimizers on offer need none",
    "restore_callback_states_from_checkpoint": "a resumed run takes up what it needs, but for the old patience",
    "skip_memory_metrics": "the peak of each phase is printed at the end",
    "accelerator_config auto_find_batch_size torch_empty_cache_steps": "--dry_run says which batch fits",
    "use_cache": "training has no use for a cache, and answers are always made with one",
}
# What this script sets of them, where transformers' default is another; and --use_liger_kernel, which ModelArguments
# has, because the Trainer's would also replace the model's forward, and with it the speech.
SET_HERE = {
    "logging_nan_inf_filter": False,  # True would print the last finite loss in place of NaN
    "do_train": True,
    "remove_unused_columns": False,
    "prediction_loss_only": True,  # the logits of an evaluation, [B, T, 152064] a step, do not fit beside the model
    "label_names": ["labels"],
    "use_liger_kernel": False,
    "ddp_broadcast_buffers": False,  # no buffer changes
}
# Flags of the public SurgViVQA-Audio, of transformers 4 and of merge_stage2_to_bf16.py, and what does the same here.
REFUSED_FLAGS = {
    "--allow_missing_audio": "rows without speech are never trained; --skip_bad_samples True leaves them out",
    "--allow_pickle": "training reads safetensors alone; convert the model once with `python merge_stage2_to_bf16.py "
    "--stage1_model_path MODEL --output_path OUT --allow_pickle`",
    "--cache_dir": "the environment variable HF_HUB_CACHE names the folder of downloads",
    "--evaluation_strategy": "here it is --eval_strategy",
    "--group_by_length": "here it is --train_sampling_strategy group_by_length",
    "--include_question_text": "here it is --input_mode audio_text",
    "--logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR names the folder of --report_to tensorboard",
    "--max_seq_length": "samples are never cut; lower --max_image_size or --max_train_frames to shorten them",
    "--no_cuda": "here it is --use_cpu True",
    "--overwrite_output_dir": "no run is overwritten; name another --output_dir, or go on with "
    "--resume_from_checkpoint True",
    **{f"--{name}": f"leave it out; {reason}" for names, reason in NOT_OFFERED.items() for name in names.split()},
}
# Those of transformers' optimizers that need torch or bitsandbytes alone.
OPTIMIZERS = [
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *(name.value for name in OptimizerNames if BITSANDBYTES_OPTIMIZER.fullmatch(name.value)),
]
# Flags that nothing reads without another one: the flags, the other, whether its value makes them read.
READ_WITH = (
    ("eval_steps", "--eval_strategy steps", lambda flags: flags.eval_strategy == "steps"),
    (
        "eval_delay load_best_model_at_end metric_for_best_model",
        "--eval_strategy steps or epoch",
        lambda flags: flags.eval_strategy != "no",
    ),
    ("eval_strategy", "--eval_data_path", lambda flags: flags.eval_strategy == "no" or flags.eval_data_path),
    ("do_eval eval_on_start eval_answers", "--eval_data_path", lambda flags: flags.eval_data_path),
    ("hub_model_id hub_private_repo hub_revision hub_strategy hub_token", "--push_to_hub True", lambda f: f.upload),
    (
        "hub_strategy",
        "checkpoints (--save_strategy steps, epoch or best)",
        lambda flags: flags.hub_strategy == "end" or flags.save_strategy != "no",
    ),
    ("greater_is_better", "--metric_for_best_model", lambda flags: flags.metric_for_best_model),
    ("early_stopping_patience", "--load_best_model_at_end True", lambda flags: flags.load_best_model_at_end),
    ("early_stopping_threshold", "--early_stopping_patience", lambda flags: flags.early_stopping_patience),
    ("num_gpus", "--dry_run", lambda flags: flags.dry_run),
    (
        "speech_token_jitter",
        "--audio_tokens speech, and an --input_mode with speech",
        lambda flags: counts_speech(flags),
    ),
    (
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
        "--dataloader_num_workers 1 or more",
        lambda flags: flags.dataloader_num_workers,
    ),
)
# What numbers must be: the flags, the rule, and the rule in words.
NUMBER_RULES = (
    ("max_train_frames max_train_samples max_eval_samples", lambda n: n >= 1, "at least 1; leave it out for all"),
    (
        "max_image_size lora_r lora_alpha per_device_train_batch_size per_device_eval_batch_size save_total_limit "
        "gradient_accumulation_steps eval_accumulation_steps dataloader_prefetch_factor num_gpus",
        lambda n: n >= 1,
        "at least 1",
    ),
    ("max_steps", lambda n: n >= 1 or n == -1, "at least 1; -1: as --num_train_epochs says"),
    (
        "learning_rate gpu_memory_limit_gib logging_steps save_steps eval_steps neftune_noise_alpha num_train_epochs",
        lambda n: 0 < n < math.inf,  # nor NaN
        "above 0",
    ),
    (
        "weight_decay adam_epsilon max_grad_norm dataloader_num_workers eval_delay early_stopping_threshold",
        lambda n: 0 <= n < math.inf,
        "0 or more",
    ),
    ("max_eval_frames", lambda n: n >= 0, "0 (all frames) or more"),
    ("speech_token_jitter early_stopping_patience eval_answers", lambda n: n >= 0, "0 (off) or more"),
    ("lora_dropout adam_beta1 adam_beta2", lambda n: 0 <= n < 1, "0 or more, and below 1"),
    ("seed data_seed", lambda n: 0 <= n < 2**32, f"from 0 to {2**32 - 1}"),
)


@dataclass
class ModelArguments:
    """What is trained, and from where it starts."""

    model_name_or_path: str = flag(DEFAULT_MODEL, "Folder or hub id of the base: config, tokenizer, safetensors.")
    init: str = flag(
        "pretrained",
        "pretrained: load the weights. random: draw them from --seed, in evaluation too (for tests).",
        ["pretrained", "random"],
    )
    audio_encoder: str | None = flag(
        None,
        "Folder or hub id of a Whisper whose encoder is grafted onto a plain Qwen2-VL. None: the model brings its own.",
    )
    adapter_path: str | None = flag(
        None,
        "Adapter that a new run starts from, with a fresh optimizer. Rank, alpha, prompt and trained parts are the "
        "adapter's; its base and inputs too, where their flags are left out. None: a new adapter.",
    )
    load_in_4bit: bool = flag(
        False,
        "Keep the decoder's linear layers in bitsandbytes' 4 bits (QLoRA): 16-bit weights are quantised as they load "
        "(NF4, double quantisation), those stored in 4 bits stay as they are. False: 16 bits, dequantised if need be.",
    )
    attn_implementation: str = flag(
        "sdpa",
        "Attention kernel. flash_attention_2 needs the flash-attn package, a CUDA GPU and --bf16 True.",
        list(ATTENTION_KERNELS),
    )
    train_decoder: str = flag(
        "lora",
        "lora: adapters on the decoder's linear layers. full: full fine-tuning of the decoder, its embeddings "
        "and its head, in float32 (16 bytes a parameter with Adam, which several GPUs share); what is saved is then a "
        "full model.",
        list(DECODER_TRAINING),
    )
    train_vision_tower: bool = flag(False, "Train Qwen2-VL's vision encoder in full, in float32. False: frozen.")
    train_audio_encoder: bool = flag(
        False, "Train the speech encoder in full, in float32, but for its fixed sinusoids. False: frozen."
    )
    lora_r: int = flag(64, "LoRA rank on the decoder's linear layers.")
    lora_alpha: int = flag(16, "LoRA scale: the update is multiplied by alpha / r.")
    lora_dropout: float = flag(0.05, "Dropout on the LoRA input during training.")
    checkpoint_every_n: str = flag(
        "1",
        "Activation checkpointing of the decoder and of trained encoders: 1 recomputes every layer (least "
        "memory), N every N-th layer, 0 none (fastest), auto the fewest that by --dry_run's estimate fit into "
        "--gpu_memory_limit_gib or the card. The result is the same.",
    )
    compile_layers: bool = flag(
        False,
        "Compile the decoder's layers: faster, and 0.4 times the activations; needs a C compiler, and up to two "
        f"minutes for the first step. Batches are padded to a multiple of {PADDING_MULTIPLE} tokens, which the loss "
        "does not see. Results differ by rounding, and dropout draws other numbers. False: layers run as they are.",
    )
    use_liger_kernel: bool = flag(
        False,
        "Compute the decoder's RMSNorm and SwiGLU by Liger's kernels: faster, and less memory, without "
        "--compile_layers. Needs liger-kernel, a CUDA GPU and hidden_act silu. Results differ by rounding. Liger's "
        "fused cross entropy, which would bypass the speech, is not used. False: layers run as they are.",
    )
    gpu_memory_limit_gib: float | None = flag(
        None, "Hard cap in GiB on this process's GPU memory, to rehearse a smaller card. None: no cap."
    )
    base_seed: int | None = field(default=None, init=False)  # that drew the base of --adapter_path. None: --seed

    @property
    def padding_multiple(self) -> int:
        """Batches are padded to a multiple of this many tokens."""
        return PADDING_MULTIPLE if self.compile_layers else 1


@dataclass
class DataArguments:
    """Where the questions, the frames and the speech are, and how much of them the model gets."""

    train_data_path: str | None = flag(None, "JSONL of training questions. Required.")
    frames_dir: str | None = flag(None, "Folder of the frames of all videos, named as --frame_pattern says. Required.")
    audio_dir: str | None = flag(None, "Folder of the speech of --train_data_path. Required unless --input_mode text.")
    eval_data_path: str | None = flag(
        None,
        "JSONL of questions for the loss in training (--eval_strategy; else once at the end). None: no evaluation.",
    )
    eval_audio_dir: str | None = flag(None, "Folder with the speech of --eval_data_path. None: --audio_dir.")
    audio_pattern: str | None = flag(
        None,
        "Path of a row's speech below --audio_dir or --eval_audio_dir, without extension, such as '{file}/{id}'. "
        "Fields: {id}, {video_id}, {question_type}, {file} (name of the question file without extension). None: "
        "'{video_id}_{id}_{question_type}', else '{video_id}_{id}', else '{id}'.",
    )
    frame_pattern: str | None = flag(
        None,
        "Path of a frame below --frames_dir, likewise; it has also the fields {frame} (such as 002-001_18743), {video} "
        "(002-001) and {frame_number} (18743). None: '{video}/{frame}', else '{video}/{frame_number}'.",
    )
    input_mode: str = flag(
        "audio",
        "How the question comes. audio: as speech. text: in the prompt. audio_text: both, so it need not listen.",
        list(INPUT_MODES),
    )
    prompt_layout: str | None = flag(
        None,
        "Words around speech and frames. plain: of the published stage-2 model. chat: of the public SurgViVQA-Audio "
        "scripts. None: as the adapter or model that the run starts from was trained, else plain.",
        list(PROMPT_LAYOUTS),
    )
    max_train_frames: int | None = flag(None, "Frames per clip in training, evenly sampled. None: all.")
    max_eval_frames: int | None = flag(6, "Frames per clip in evaluation, evenly sampled. 0: all.")
    max_image_size: int = flag(384, "Longer side of a frame in pixels, before Qwen2-VL rounds it to multiples of 28.")
    audio_tokens: str = flag(
        "full",
        "full: all 1500 outputs of the encoder. speech: only those that cover it, one per 20 ms (other results).",
        list(AUDIO_TOKENS),
    )
    speech_token_jitter: int = flag(
        0,
        "With --audio_tokens speech: in training each row gets 0 to N outputs for the silence behind its speech, drawn "
        "anew each epoch, else the number of tokens may name the question. None in evaluation. 0: none. Speech of one "
        "voice: 50, up to 1 s.",
    )
    frame_mode: str = flag(
        "images",
        "images: each frame by itself. video: frames in pairs, as Qwen2-VL's video (half the tokens; other results).",
        list(FRAME_MODES),
    )
    cache_features: str | None = flag(
        None,
        "Folder that keeps the outputs of the two frozen encoders, so that later epochs, runs and evaluations "
        "neither decode nor encode again: in bf16 up to 11.2 MB a clip of 8 frames at 384 px and 3.8 MB a speech. In "
        "float32 batches of 1 give the same result bit for bit, else it differs by rounding. None: encode each time.",
    )
    max_train_samples: int | None = flag(None, "Use the first N training rows. None: all.")
    max_eval_samples: int | None = flag(None, "Use the first N eval rows. None: all.")
    allow_symlinks: bool = flag(False, "Let links in --frames_dir and --audio_dir lead out of them, as to a data disk.")
    skip_bad_samples: bool = flag(
        False,
        "Leave out rows that are malformed or lack media that decode, and print and record which. False: an error.",
    )
    allow_empty_frames: bool = flag(
        False,
        "Train where more than one in 100 rows (at least 2) has frames of one colour, or frames whose names differ and "
        "whose bytes are equal. False: an error.",
    )
    check_data: bool = flag(False, "Decode the data, report what is wrong, and exit; needs no --output_dir or model.")
    dry_run: bool = flag(False, "Read the data, count parameters, tokens, steps and memory without weights, and exit.")
    num_gpus: int = flag(1, "With --dry_run: how many GPUs to plan for. Training takes those that torchrun names.")
    target_train_loss: float | None = flag(
        None, "Stop once the logged loss is below this; exit status 1 if it never is. None: train to the end."
    )


def withheld(original) -> tuple:
    """The field of a flag of TrainingArguments that is not offered: its default, or what SET_HERE has for it."""
    factory = original.default_factory
    if factory is MISSING:
        factory = partial(SET_HERE.get, original.name, original.default)
    return original.name, object, field(default_factory=factory, init=False)


not_offered = [f for f in fields(TrainingArguments) if f.name in SET_HERE or f"--{f.name}" in REFUSED_FLAGS]
OfferedArguments = make_dataclass("OfferedArguments", map(withheld, not_offered), bases=(TrainingArguments,))


@dataclass
class VQATrainingArguments(OfferedArguments):
    """transformers' TrainingArguments; what this script decides itself is no flag, so that none is silently unused."""

    do_eval: bool = flag(
        True,
        "Evaluate on --eval_data_path, as is done wherever that is given: as --eval_strategy says, else at the end.",
    )
    warmup_ratio: float | None = flag(
        None, "Share of the steps, from 0 to below 1, in which the learning rate rises; in place of --warmup_steps."
    )
    resume_from_checkpoint: str | None = flag(
        None, "True: go on from the newest complete checkpoint of --output_dir; or the folder of one. None: start anew."
    )
    optim: str = flag(
        "adamw_torch_fused", "The optimizer; those of bitsandbytes need that package and a GPU.", OPTIMIZERS
    )
    train_sampling_strategy: str = flag(
        "random",
        "Order of the training rows: random, sequential (as in the file), or group_by_length (random, but rows of "
        "about the same number of tokens come together, so that batches are padded less).",
        ["random", "sequential", "group_by_length"],
    )

    early_stopping_patience: int = flag(
        0,
        "Stop after so many evaluations in a row that did not improve --metric_for_best_model (by default the loss); "
        "needs --load_best_model_at_end True. 0: train to the end.",
    )
    early_stopping_threshold: float = flag(
        0.0, "With --early_stopping_patience: an improvement of no more than this counts as none."
    )
    eval_answers: int = flag(
        0,
        "At each evaluation also answer so many of its rows, greedily, always the same, as equally many of each "
        "question type as there are; logs eval_choice and eval_contains (shares right, by evaluate_checkpoint.py) and "
        "eval_stopped (share that ended by itself), which --metric_for_best_model may name. Answers are cut at "
        f"{ANSWER_TOKENS} tokens, kept in {ANSWERS_DIR} of --output_dir, and computed {ANSWERS_AT_ONCE} at a time, or "
        "fewer where these do not fit. 0: the loss alone.",
    )

    push_to_hub: bool = flag(
        False,
        "Upload the final model to the Hugging Face hub: what --checkpoint_path needs, and its card. "
        "Needs a token that may write, from the environment variable HF_TOKEN or `hf auth login`.",
    )
    hub_model_id: str | None = flag(
        None, "Where to: user/repo, made if need be. None: the name of --output_dir, of the owner of the token."
    )
    hub_strategy: str = flag(
        "end",
        "end: upload the final model. every_save: also each checkpoint's, one after the other in the same place. "
        f"checkpoint: with it the checkpoint as a folder {LAST_CHECKPOINT}, optimizer included, to resume from.",
        ["end", "every_save", "checkpoint"],
    )
    hub_private_repo: bool | None = flag(None, "Make the repo private, if it is made. None: as its owner's default.")
    hub_revision: str | None = flag(None, "Branch to upload to, made if need be. None: main.")
    hub_token: str | None = flag(
        None, "The token. It shows in the list of processes: better set HF_TOKEN. None: HF_TOKEN or `hf auth login`."
    )

    def __post_init__(self):
        self.upload, self.push_to_hub = self.push_to_hub, False  # the Trainer's own would upload half-written folders
        self.about: dict = {}  # what loggers get beside these flags
        if not self.do_eval:
            raise ValueError("--do_eval False: leave out --eval_data_path to train without evaluation")
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"--warmup_ratio {self.warmup_ratio}: must be 0 or more, and below 1")
            if self.warmup_steps not in (0, self.warmup_ratio):
                raise ValueError("--warmup_ratio and --warmup_steps say the same; leave one of them out")
            self.warmup_steps = self.warmup_ratio  # transformers takes a number below 1 for the share
        super().__post_init__()
        if "trackio" in self.report_to and not self.run_name:  # else the evaluation at the end is a run of its own
            self.run_name = f"{Path(self.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the computation, by autocast."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def to_dict(self) -> dict:
        """All flags but for tokens, and `about`: what W&B, TensorBoard, Trackio and others get to know of a run."""
        return super().to_dict() | self.about


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, VQATrainingArguments]:
    """Parse `argv`; an unknown or abbreviated flag ends the process with status 2, as argparse does. Without an
    accelerator `use_cpu` is set, since TrainingArguments refuses `--bf16 True` there otherwise; with one, data loading
    gets workers, unless `--dataloader_num_workers` says how many. VQAError where a required flag is missing, or two
    contradict each other."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, VQATrainingArguments),
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        usage="%(prog)s [--FLAG VALUE ...]  (--help lists all flags)",
    )
    given = {"--" + a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")}  # either spelling
    for name, advice in REFUSED_FLAGS.items():
        if name in given:
            raise VQAError(f"{name}: {advice}")
    if unknown := parser.parse_known_args(argv)[1]:  # usage and status 2; transformers would raise
        name = "--" + unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, flag_names(), n=1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f"; did you mean {n}?" for n in near))
    if not torch.accelerator.is_available() and "--use_cpu" not in given:
        print("No accelerator found: training on the CPU (use_cpu).")
        argv = [*argv, "--use_cpu", "True"]
    elif "--dataloader_num_workers" not in given:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        argv = [*argv, "--dataloader_num_workers", str(min(MAX_WORKERS, max(1, cores)))]
    try:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # TrainingArguments' own cross-checks, and packages that a flag needs
        what = "--lr_scheduler_kwargs: " if isinstance(error, json.JSONDecodeError) else ""
        raise VQAError(what + " ".join(str(error).split())) from error
    if model_args.adapter_path:
        start_from_adapter(model_args, data_args, training_args.resume_from_checkpoint, given)
    flags = together(model_args, data_args, training_args)
    refuse_missing(flags, given)
    check_patterns(flags.audio_pattern, flags.frame_pattern)
    refuse_numbers(flags)
    refuse_contradictions(flags, given)
    refuse_optimizer(training_args)
    refuse_unmeasured(flags)
    refuse_surroundings(flags, training_args)
    data_args.max_eval_frames = data_args.max_eval_frames or None
    data_args.num_gpus = max(data_args.num_gpus, training_args.world_size)
    training_args.ddp_find_unused_parameters = data_args.input_mode == "text"  # which leaves the projector idle
    if not counts_speech(flags):
        data_args.speech_token_jitter = 0
    return model_args, data_args, training_args


def together(model_args: ModelArguments, data_args: DataArguments, args: VQATrainingArguments) -> SimpleNamespace:
    """All flags, and what follows from them; --use_liger_kernel is the model's, since the Trainer's own is off."""
    flags = SimpleNamespace(**{**vars(args), **vars(data_args), **vars(model_args)})
    flags.compute_dtype, flags.padding_multiple = args.compute_dtype, model_args.padding_multiple
    return flags


def flag_names() -> list[str]:
    """All flags of training."""
    parts = (ModelArguments, DataArguments, VQATrainingArguments)
    return [f"--{f.name}" for part in parts for f in fields(part) if f.init]


def start_from_adapter(
    model_args: ModelArguments, data_args: DataArguments, resumed: str | None, given: set[str]
) -> None:
    """Set what --adapter_path decides: LoRA's shape and the trained parts; and base and inputs that are not `given`.
    VQAError for flags that contradict the adapter, --resume_from_checkpoint (`resumed`) among them, and where it is
    damaged or its prompt unknown."""
    path = resolve_model_dir(model_args.adapter_path, weights=True, flag_name="--adapter_path")
    model_args.adapter_path = str(path)
    if not (path / "adapter_config.json").is_file():
        raise VQAError(f"--adapter_path {path}: holds no adapter (adapter_config.json, adapter_model.safetensors)")
    refuse_damage(path)
    config = read_adapter_config(path / "adapter_config.json")
    adopted = {"train_decoder": "lora", "lora_r": config["r"], "lora_alpha": config["lora_alpha"]}
    adopted |= {f"train_{encoder}": trained for encoder, trained in trained_encoders(config).items()}
    asked = {**vars(model_args), **vars(data_args)}
    for name, value in adopted.items():
        if f"--{name}" in given and asked[name] != value:
            raise VQAError(f"--{name} {asked[name]}: {path} was trained with {value}; leave the flag out")
    inputs = [f.name for f in fields(InputSettings)]
    handed_on = ["model_name_or_path", "init", "audio_encoder", "load_in_4bit", *inputs]
    changes = {name: asked[name] for name in handed_on if f"--{name}" in given}
    settings, model, inputs = trained_settings(path, "cpu", changes)
    stored = {**asdict(model), **asdict(inputs)}
    adopted |= {name: stored[name] for name in handed_on if name in asked}
    model_args.base_seed = model.init_seed if settings else None
    differing = []
    for part in (model_args, data_args):
        for f in fields(part):
            if f.name in adopted:
                setattr(part, f.name, adopted[f.name])
                if adopted[f.name] != f.default:
                    differing.append(f"--{f.name} {adopted[f.name] or 0}")
    if (resumed or "false").lower() != "false":
        raise VQAError(
            "--adapter_path starts a new run, --resume_from_checkpoint goes on with one: leave one of them out (to go "
            f"on with a run from {path}: --resume_from_checkpoint with {' '.join(differing)})"
        )
    print(f"   Starting from {path}, as with {' '.join(differing)}")


def refuse_missing(flags: SimpleNamespace, given: set[str]) -> None:
    """VQAError where a flag is missing that is required, or that others need; `given` are those on the command line."""
    missing = [f"--{name}" for name in ("train_data_path", "frames_dir") if not getattr(flags, name)]
    if flags.input_mode != "text" and not flags.audio_dir:
        missing.append("--audio_dir (or --input_mode text)")
    if "--output_dir" not in given and not (flags.dry_run or flags.check_data):
        missing.append("--output_dir")
    if missing:
        raise VQAError("missing flag: " + ", ".join(missing))


def refuse_numbers(flags: SimpleNamespace) -> None:
    """VQAError where a number is one that nothing can be trained with."""
    if not re.fullmatch(r"\d+|auto", flags.checkpoint_every_n):
        raise VQAError("--checkpoint_every_n must be 0 (none), 1 (every layer), N (every N-th layer) or auto")
    for names, holds, rule in NUMBER_RULES:
        for name in names.split():
            number = getattr(flags, name)
            unread = name == "num_train_epochs" and flags.max_steps > 0
            if number is not None and not unread and not holds(number):
                raise VQAError(f"--{name} {number}: must be {rule}")


def counts_speech(flags: SimpleNamespace) -> bool:
    """Whether the speech of a row takes as many tokens as it is long."""
    return flags.audio_tokens == "speech" and flags.input_mode != "text"


def refuse_contradictions(flags: SimpleNamespace, given: set[str]) -> None:
    """VQAError where flags contradict others on what is trained, or how, or nothing reads them for lack of another."""
    for names, other, is_read in READ_WITH:
        for name in names.split():
            if f"--{name}" in given and getattr(flags, name) and not is_read(flags):
                raise VQAError(f"--{name} needs {other}: add that, or leave it out")
    if flags.use_liger_kernel and flags.compile_layers:
        raise VQAError("--use_liger_kernel: --compile_layers True fuses the same operations; leave one of them out")
    if flags.train_audio_encoder and flags.input_mode == "text":
        raise VQAError("--train_audio_encoder: with --input_mode text there is no speech; leave one of them out")
    for name in ("train_vision_tower", "train_audio_encoder"):
        if flags.cache_features and getattr(flags, name):
            raise VQAError(f"--cache_features keeps what frozen encoders put out, and --{name} trains one; drop either")
    source, what = flags.adapter_path, "adapter of --adapter_path"
    if flags.train_decoder == "full":
        if idle := sorted(given & {"--lora_r", "--lora_alpha", "--lora_dropout"}):
            raise VQAError(f"{', '.join(idle)}: --train_decoder full has no adapters; leave it out")
        if flags.load_in_4bit:
            raise VQAError("--load_in_4bit: 4-bit weights cannot be trained; leave it out, or --train_decoder full")
        source, what = flags.model_name_or_path, "base model"
    if source and Path(source).resolve() == Path(flags.output_dir).resolve():
        advice = "which the new one would overwrite; name another folder"
        raise VQAError(f"--output_dir {flags.output_dir}: holds the {what}, {advice}")


def refuse_optimizer(args: VQATrainingArguments) -> None:
    """VQAError where optimizer or schedule cannot be made from their flags, by making them for one number."""
    number = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(number, lr=args.learning_rate)
    flag_said = f"--optim {args.optim.value}"
    try:
        if not BITSANDBYTES_OPTIMIZER.fullmatch(args.optim.value):  # which need a GPU
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            kind(number, **options)
        kwargs = args.lr_scheduler_kwargs
        flag_said = f"--lr_scheduler_type {args.lr_scheduler_type.value} with --lr_scheduler_kwargs {kwargs}"
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, kwargs)
    except (ValueError, TypeError, ImportError) as error:
        raise VQAError(f"{flag_said}: {first_line(error)}") from error


def refuse_unmeasured(flags: SimpleNamespace) -> None:
    """VQAError where no evaluation measures what is to choose the model."""
    metrics = [f"eval_{name}" for name in ("loss", *(ANSWER_METRICS if flags.eval_answers else ()))]
    metric = flags.metric_for_best_model
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in metrics:
        more = "" if flags.eval_answers else "; --eval_answers N adds eval_" + ", eval_".join(ANSWER_METRICS)
        raise VQAError(f"--metric_for_best_model {metric}: evaluations measure {', '.join(metrics)}{more}")
    if flags.eval_answers and not SCORER.is_file():
        raise VQAError(f"--eval_answers: {SCORER}, which scores the answers, is missing; copy it there")


def refuse_surroundings(flags: SimpleNamespace, args: VQATrainingArguments) -> None:
    """VQAError where this machine lacks what the flags ask for, or one process would get several GPUs.
    --dry_run needs the packages too, but no GPU: it may plan for another machine's."""
    for name in ("check_data", "dry_run"):
        if getattr(flags, name) and args.world_size > 1:
            raise VQAError(f"--{name} takes one process: start it by `python`; --dry_run plans for --num_gpus N")
    if flags.check_data:
        return
    if flags.checkpoint_every_n == "auto" and memory_limit(flags) is None:
        raise VQAError("--checkpoint_every_n auto needs a CUDA GPU, or --gpu_memory_limit_gib to fit into")
    if flags.compile_layers:
        check_compiler(args.device.type)
    if flags.use_liger_kernel:
        check_liger(args.device.type, needs_gpu=not flags.dry_run)
    by_bitsandbytes = BITSANDBYTES_OPTIMIZER.fullmatch(args.optim.value)
    shared = flags.train_decoder == "full" and max(flags.num_gpus, args.world_size) > 1
    if shared and (by_bitsandbytes or args.optim == OptimizerNames.ADAFACTOR):
        raise VQAError(
            f"--optim {args.optim.value}: cannot work on weights that GPUs share, as with --train_decoder full on "
            "several; leave it out, or take adamw_torch, adagrad, rmsprop or sgd"
        )
    if flags.load_in_4bit or by_bitsandbytes:
        check_bitsandbytes("--load_in_4bit" if flags.load_in_4bit else f"--optim {args.optim.value}")
    if absent := sorted(set(args.report_to) - set(get_available_reporting_integrations())):
        raise VQAError(f"--report_to {' '.join(absent)}: no such package is installed; install it, or drop the flag")
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise VQAError("--save_strategy best: say by what, such as --metric_for_best_model eval_loss")
    if args.report_to and args.hub_token:
        what = ", ".join(args.report_to)
        raise VQAError(f"--hub_token: {what} may keep the command line, and so the token; set HF_TOKEN in its place")
    if "wandb" in args.report_to:  # it asks for a key at a terminal, unless it is off or offline
        try:
            importlib.import_module("wandb").login()
        except Exception as error:  # of several kinds, by the version of wandb
            advice = "run `wandb login`, set WANDB_MODE=offline, or leave the flag out"
            raise VQAError(f"--report_to wandb: {first_line(error)}; {advice}") from error
    if flags.dry_run:
        return
    if by_bitsandbytes and args.device.type == "cpu":
        raise VQAError(f"--optim {args.optim.value}: bitsandbytes' optimizers need a GPU; leave the flag out")
    if args.n_gpu > 1:
        raise VQAError(
            f"{args.n_gpu} GPUs are visible: to train on all of them, start `torchrun --nproc_per_node {args.n_gpu} "
            "train_vqa.py` with the same flags; to train on one, put CUDA_VISIBLE_DEVICES=0 before the command"
        )


def limit_gpu_memory(gib: float | None) -> None:
    """Cap this process at `gib` GiB of GPU memory; None: no cap. VQAError without a GPU, or beyond its memory."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise VQAError("--gpu_memory_limit_gib needs a CUDA GPU; leave it out here")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    if not 0 < gib <= total:
        raise VQAError(f"--gpu_memory_limit_gib {gib}: this card has {total:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(gib / total)


def memory_limit(args: ModelArguments) -> float | None:
    """GiB of GPU memory that a run may fill: of --gpu_memory_limit_gib, else of the card. None: neither is there."""
    if args.gpu_memory_limit_gib is not None or not torch.cuda.is_available():
        return args.gpu_memory_limit_gib
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB - CUDA_CONTEXT_GIB


def check_compiler(device_type: str) -> None:
    """VQAError where torch.compile would find no compiler that works, or not the headers of Python, which what it
    compiles includes: of C on a GPU, for Triton's launchers, else of C++."""
    variable, language, names = ("CC", "c", ("gcc", "clang")) if device_type == "cuda" else ("CXX", "c++", ("g++",))
    compiler = os.environ.get(variable) or next(filter(shutil.which, names), names[0])
    with tempfile.TemporaryDirectory() as folder:
        headers = sysconfig.get_path("include", "posix_prefix")
        command = [compiler, "-x", language, "-", "-I", headers, "-o", str(Path(folder) / "trial")]
        program = "#include <Python.h>\nint main(void) { return 0; }\n"
        try:
            done = subprocess.run(command, input=program, capture_output=True, text=True, errors="replace")
            failure = (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
        except OSError as error:
            failure = str(error)
    if failure:
        raise VQAError(
            f"--compile_layers: the compiler {compiler} does not work ({failure.splitlines()[0]}); fix it (Python.h "
            f"is in the package python3-dev), name another in {variable}, or set the flag to False"
        )


def check_liger(device_type: str, needs_gpu: bool = True) -> None:
    """VQAError where Liger's kernels, which are Triton's, cannot run: they take the package and, to run, a GPU."""
    if device_type != "cuda" and needs_gpu:
        raise VQAError("--use_liger_kernel needs a CUDA GPU, since its kernels are Triton's; leave the flag out")
    module = "liger_kernel.ops" if device_type == "cuda" else "liger_kernel"  # the kernels may not load without a GPU
    check_package("--use_liger_kernel", module, LIGER, "leave the flag out")


def check_bitsandbytes(what: str) -> None:
    """VQAError, which begins with `what` asks for it, where bitsandbytes is missing or of a version not tested."""
    check_package(what, "bitsandbytes", BITSANDBYTES, "take 16-bit weights")


def check_package(what: str, module: str, requirement: str, otherwise: str) -> None:
    """VQAError where an optional package is missing, does not load or has a version not tested; `what` asks for it."""
    try:
        importlib.import_module(module)
        require_version(requirement)
    except Exception as error:  # a Triton, or native part, that does not fit raises what it likes
        reason = first_line(error).rstrip(". ")
        raise VQAError(f"{what}: {reason}; run `pip install '{requirement}'`, or {otherwise}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Reading the data: rows, frames, speech
# ----------------------------------------------------------------------------------------------------------------------


def split_digests(digests: bytes) -> list[bytes]:
    """Digests that follow each other, one by one."""
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]


@dataclass(slots=True)
class VQARow:
    """One line of a question file in the REAL-Colon-VQA schema, and where its media were found."""

    source: str  # the file
    line: int  # counted from 1
    id: str
    video_id: str
    frames: tuple[str, ...]  # frame names, such as "002-001_18743"
    question: str
    question_type: str
    answer: str  # the full sentence, which is learned; "" without gold, as is the next
    short_answer: str  # the closed answer, which is looked for in a prediction
    audio_path: Path | None = None  # set by `find_media`, as are the next
    frame_paths: tuple[Path, ...] = ()  # in order, up to the first that is missing
    speech_samples: int | None = None  # at 16 kHz, as `load_speech` gives them; set by `check_media`, as are the next
    digests: bytes = b""  # DIGEST_BYTES for each file of `media`; empty where one of them did not pass
    one_colour: tuple[Path, ...] = ()  # frames that show nothing

    @property
    def key(self) -> str:
        """`{video_id}/{id}/{question_type}`: `id` alone is not unique in the real data."""
        return f"{self.video_id}/{self.id}/{self.question_type}"

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @property
    def media(self) -> tuple[Path, ...]:
        """The files of the frames, then the speech if there is any."""
        return (*self.frame_paths, *([self.audio_path] if self.audio_path else []))

    @property
    def contents(self) -> dict[str, list[bytes]]:
        """What the row consists of, whatever its files are called: digests of its clip, frames, speech and wording. Of
        media only those that `check_media` passed. Case and punctuation of the question do not count."""
        media = split_digests(self.digests)
        frames, speech = media[: len(self.frame_paths)], media[len(self.frame_paths) :]
        clip, wording = b"".join(frames), " ".join(re.findall(r"\w+", self.question.casefold())).encode()
        clip, wording = (hashlib.sha256(content).digest()[:DIGEST_BYTES] for content in (clip, wording))
        return {"clip": [clip] if frames else [], "frame": frames, "speech": speech, "wording": [wording]}


@dataclass(slots=True)
class Problem:
    """What is wrong with a line, or with a media file that several lines need; its text is `file:line: ...`."""

    source: str
    lines: tuple[int, ...]  # all that cannot be used because of it; the first is named
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.lines[0]}: {self.text}"


def read_rows(path: str | Path, max_samples: int | None = None, needs_gold: bool = True) -> list[VQARow]:
    """The rows of a question file; VQAError where it is missing or empty, or for all its malformed lines."""
    rows, problems = scan_rows(path, max_samples, needs_gold)
    raise_problems(problems)
    return rows


def scan_rows(
    path: str | Path, max_samples: int | None = None, needs_gold: bool = True
) -> tuple[list[VQARow], list[Problem]]:
    """The rows of a question file, one JSON object a line, and its malformed lines; `max_samples` counts both. Blank
    lines are skipped. Without `needs_gold` a row may lack its answers: see `parse_row`. VQAError where the file is
    missing or empty, UTF-16 text, or a JSON array."""
    path = Path(path)
    if not path.is_file():
        raise VQAError(f"{path}: no such file")
    rows, problems, line_of = [], [], {}
    with path.open("rb") as lines:
        start = lines.peek()[:64].removeprefix(b"\xef\xbb\xbf")
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:2].count(0) == 1:
            raise VQAError(f"{path}: is UTF-16 text; save it as UTF-8")
        if start.lstrip()[:1] == b"[":
            raise VQAError(f"{path}: is a JSON array; write one object a line, as jq -c '.[]' does")
        for number, line in enumerate(lines, start=1):
            if max_samples is not None and len(rows) + len(problems) >= max_samples:
                break
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()  # the mark that Windows sets
            if not line:
                continue
            try:
                row = parse_row(line, str(path), number, needs_gold)
                if line_of.setdefault(row.key, number) != number:
                    raise VQAError(f"the same video, id and question type as line {line_of[row.key]}; remove one")
                rows.append(row)
            except VQAError as error:
                problems.append(Problem(str(path), (number,), str(error)))
    if not rows and not problems:
        raise VQAError(f"{path}: holds no rows")
    return rows, problems


def parse_row(line: bytes, source: str, number: int, needs_gold: bool = True) -> VQARow:
    """One JSONL line as a VQARow; VQAError says what is wrong with it. Without `needs_gold`, a row that lacks `answer`
    or `short_answer` (or has null there) has neither."""
    try:
        data = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise VQAError(f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise VQAError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise VQAError("not a row (lists or objects nested too deeply)") from error
    except VQAError:
        raise
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise VQAError(f"not a row ({error})") from error
    if not isinstance(data, dict):
        raise VQAError("not a JSON object")
    text_fields = ("id", "video_id", "question", "question_type", "answer", "short_answer")
    needed = text_fields
    if not needs_gold and None in (data.get("answer"), data.get("short_answer")):
        needed, data = text_fields[:4], data | {"answer": "", "short_answer": ""}
    for name in needed:
        if name not in data:
            raise VQAError(f"field {name!r} is missing")
        if not isinstance(data[name], str) or not data[name].strip():
            raise VQAError(f"field {name!r} must be text, not {data[name]!r:.80}")
        if re.search(r"[\ud800-\udfff]", data[name]):
            raise VQAError(f"field {name!r} holds half a character (a lone surrogate): {data[name]!r:.80}")
    frames = data.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(f, str) and f for f in frames):
        raise VQAError("field 'frames' must be a list of at least one frame name")
    for name in ("id", "video_id", "question_type"):
        _refuse_path(name, data[name])
    for frame in frames:
        _refuse_path("frames", frame)
        _refuse_path("frames", frame.rpartition("_")[0] or "_", frame)  # the folder that the name stands for
    return VQARow(source, number, frames=tuple(frames), **{name: data[name] for name in text_fields})


def _refuse_constant(name: str) -> None:
    raise VQAError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise VQAError(f"field {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return data


def _refuse_path(name: str, part: str, value: str | None = None) -> None:
    """These become file names, and must stay inside the folder that the flag names."""
    if re.search(r"[/\\\0\ud800-\udfff]", part) or part in (".", "..") or len(part.encode(errors="replace")) > 120:
        raise VQAError(f"field {name!r} must be a plain name, not {value or part!r:.150}")


def check_patterns(audio_pattern: str | None, frame_pattern: str | None) -> None:
    """VQAError, which names the flag, for a pattern with other fields, or one that could lead out of its folder."""
    for flag, pattern, needed, known in (
        ("--audio_pattern", audio_pattern, ROW_FIELDS, ROW_FIELDS),
        ("--frame_pattern", frame_pattern, FRAME_FIELDS[:2], FRAME_FIELDS + ROW_FIELDS),
    ):
        if pattern is None:
            continue
        named, choices = f"{flag} {pattern!r}", ", ".join(f"{{{name}}}" for name in known)
        try:
            used = [part[1:] for part in string.Formatter().parse(pattern) if part[1] is not None]
        except (ValueError, TypeError) as error:  # braces that do not close; settings changed by hand
            raise VQAError(f"{named}: {error}; write fields as {choices}") from error
        for name, form, conversion in used:
            if name not in known or form or conversion:
                raise VQAError(f"{named}: {{{name}}} is not a field; there are {choices}")
        if {"", ".", ".."} & set(pattern.split("/")) or re.search(r"[\\\0\ud800-\udfff]", pattern):
            raise VQAError(f"{named}: must be a path below the folder, without '..' or backslashes")
        if pattern.lower().endswith((*AUDIO_EXTENSIONS, *FRAME_EXTENSIONS)):
            raise VQAError(f"{named}: leave the extension out; every supported one is tried")
        if not {name for name, *_ in used} & set(needed):
            raise VQAError(f"{named}: must hold {' or '.join(f'{{{name}}}' for name in needed)}")


def fill_pattern(pattern: str, row: VQARow, frame: str = "") -> str:
    """The path of a row's speech, or of one of its frames, below its folder and without extension."""
    video, _, number = frame.rpartition("_")
    names = {"id": row.id, "video_id": row.video_id, "question_type": row.question_type}
    names |= {"frame": frame, "frame_number": number, "video": video or row.video_id}
    return pattern.format(file=os.path.splitext(os.path.basename(row.source))[0], **names)


class Listing:
    """The files below `root`, found by their path without extension. Each folder is listed once."""

    def __init__(self, root: str | Path, extensions: Sequence[str]):
        self.root, self.extensions, self.endings = root, extensions, cache(self._endings)

    @staticmethod
    def _endings(folder: str) -> dict[str, tuple[str, ...]]:
        there: dict[str, tuple[str, ...]] = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                stem, end = os.path.splitext(name)
                there[stem] = (*there.get(stem, ()), sys.intern(end))
        return there

    def named(self, stem: str) -> list[str]:
        """The files of that name with any ending, those to be read first."""
        if {"", ".", ".."} & set(stem.split("/")):  # what a frame called "v_.." makes of {frame_number}/x
            return []
        path, order = os.path.join(self.root, stem), [*self.extensions]
        folder, name = os.path.split(path)
        ends = self.endings(folder).get(name, ())
        if len(ends) > 1:  # .jpg before .JPG
            rank = {end: order.index(end.lower()) if end.lower() in order else len(order) for end in ends}
            ends = sorted(ends, key=lambda end: (rank[end], end.swapcase()))
        return [path + end for end in ends if os.path.isfile(path + end)]

    def find(self, stems: Iterable[str]) -> Path | None:
        """The first of these files that there is, with one of the extensions in any case of letters."""
        files = (file for stem in stems for file in self.named(stem)[:1])
        return next((Path(file) for file in files if file.lower().endswith(tuple(self.extensions))), None)

    def missing(self, what: str, stems: Sequence[str]) -> str:
        """`what`, and which file lies there that has the right name but is not read."""
        return what + next((f"; {file} lies there, which is not read" for s in stems for file in self.named(s)), "")

    def advise(self, problems: list[Problem], rows: Sequence[VQARow], flag: str, known: Sequence[str]) -> list[Problem]:
        """`problems`; where each row has one, a single one in their place, with the known pattern that finds most."""
        if not rows or len(problems) < len(rows):
            return problems
        most, best = 0, {}
        for pattern in known:
            found = [self.find([fill_pattern(pattern, row, row.frames[0])]) for row in rows]
            found = [path for path in found if path]
            if len(found) > most:
                most, best = len(found), {}
            if found and len(found) == most:
                best.setdefault(found[0], pattern)  # another pattern with the same files adds nothing
        text = problems[0].text
        if most:  # where in_ and out_ fit alike, only the name of the question file tells which is meant
            best = [pattern for pattern in best.values() if "{file}" in pattern] or best.values()
            text += f"; {flag} {' or '.join(map(repr, best))} would find {most} of {len(rows)}"
        elif "lies there" not in text:
            paths = (os.path.join(at, n) for at, _, names in os.walk(self.root) for n in sorted(names) if n[0] != ".")
            some = " and ".join(path for path, _ in zip(paths, range(2), strict=False))
            text += f"; there are {some}: write {flag} for such names" if some else f"; {self.root} holds no files"
        lines = tuple(row.line for row in rows)
        more = f" ({len(lines) - 1} more lines lack theirs)" if len(lines) > 1 else ""
        return [Problem(problems[0].source, lines, text + more)]


def find_media(
    rows: Iterable[VQARow],
    frames_dir: str | Path,
    audio_dir: str | Path | None,
    allow_symlinks: bool = False,
    audio_pattern: str | None = None,
    frame_pattern: str | None = None,
) -> list[Problem]:
    """Set the paths of each row's frames and, with an `audio_dir`, of its speech; returns what was not found.

    Frames are looked for below `frames_dir` as FRAME_NAMES, speech below `audio_dir` as AUDIO_NAMES, or by the patterns
    alone; `video` is the part of a frame's name before its last `_`. Without `allow_symlinks` a file that a link puts
    outside its folder is refused; the folders that the flags name may be links themselves. VQAError where one of the
    two is no folder.
    """
    for flags, folder in (("--frames_dir", frames_dir), ("--audio_dir or --eval_audio_dir", audio_dir)):
        if folder is not None and not Path(folder).is_dir():
            raise VQAError(f"{folder}: no such folder; {flags} names it")
    real_folder = cache(os.path.realpath)

    def leads_out(path: Path, root: str | Path) -> bool:
        if allow_symlinks:
            return False
        real = os.path.realpath(path) if path.is_symlink() else real_folder(os.path.dirname(path))
        return not os.path.join(real, "").startswith(os.path.join(real_folder(root), ""))

    frames, speech = Listing(frames_dir, FRAME_EXTENSIONS), Listing(audio_dir, AUDIO_EXTENSIONS)
    frame_names = FRAME_NAMES if frame_pattern is None else (frame_pattern,)
    audio_names = AUDIO_NAMES if audio_pattern is None else (audio_pattern,)
    rows, links, no_frame, no_speech = list(rows), [], [], []
    for row in rows:
        problem, found = partial(Problem, row.source, (row.line,)), []
        for frame in row.frames:
            path = frames.find(fill_pattern(name, row, frame) for name in frame_names)
            if path is None:
                stems = [fill_pattern(name, row, frame) for name in frame_names]
                what = f"frame {os.path.join(frames_dir, stems[0])}{{{','.join(FRAME_EXTENSIONS)}}} is missing"
                no_frame.append(problem(frames.missing(what, stems)))
                break
            if leads_out(path, frames_dir):
                links.append(problem(f"{row.id}: frame {path} is a link out of {frames_dir}; see --allow_symlinks"))
                break
            found.append(path)
        row.frame_paths = tuple(found)
        if audio_dir is not None:
            row.audio_path = speech.find(fill_pattern(name, row) for name in audio_names)
            if row.audio_path is None:
                stems = [fill_pattern(name, row) for name in audio_names]
                tried = f"{' or '.join(stems)} ({', '.join(AUDIO_EXTENSIONS)})"
                no_speech.append(problem(speech.missing(f"no speech in {audio_dir} as {tried}", stems)))
            elif leads_out(row.audio_path, audio_dir):
                what = f"{row.id}: speech {row.audio_path} is a link out of {audio_dir}"
                links.append(problem(f"{what}; see --allow_symlinks"))
                row.audio_path = None
    if not any(row.frame_paths for row in rows):
        no_frame = frames.advise(no_frame, rows, "--frame_pattern", FRAME_PATTERNS)
    no_speech = speech.advise(no_speech, rows, "--audio_pattern", AUDIO_PATTERNS)
    return sorted([*links, *no_frame, *no_speech], key=lambda problem: problem.lines[0])


def find_shared_media(rows: Iterable[VQARow]) -> list[Problem]:
    """Rows with different questions that share one speech file, and rows of which different frames share one file: one
    of them would play or show what is meant for the other."""
    first, shown, problems = {}, {}, []

    def shared(row: VQARow, other: VQARow, text: str) -> Problem:
        return Problem(row.source, (row.line, other.line) if row.source == other.source else (row.line,), text)

    for row in rows:
        for frame, path in zip(row.frames, row.frame_paths, strict=False):  # up to the first that is missing
            name = fill_pattern("{video}_{frame_number}", row, frame)
            other_name, other = shown.setdefault(path, (name, row))
            if other_name != name:
                text = f"needs frame {name}, and {other.where} {other_name}, but both would show {path}"
                problems.append(shared(row, other, f"{text}; put {{video}} into --frame_pattern"))
                break
        other = first.setdefault(row.audio_path, row) if row.audio_path else row
        if other.question != row.question:
            text = (
                f"asks another question than {other.where}, but both would play {row.audio_path}; name the files "
                f"{{video_id}}_{{id}}_{{question_type}}, or give each question file its own folder (--audio_pattern)"
            )
            problems.append(shared(row, other, text))
    return problems


def find_mixed_sizes(rows: Iterable[VQARow], max_image_size: int, max_frames: int | None) -> list[Problem]:
    """Rows whose frames --frame_mode video cannot pair: scaled for Qwen2-VL, they differ in size. Only the frames that
    `select_frames` takes count; their headers are read."""
    size_of, problems = cache(upright_size), []

    def scaled(path: Path) -> tuple[int, int]:
        width, height = fit_size(size_of(path), max_image_size)
        return smart_resize(height, width)

    for row in rows:
        one, *others = select_frames(row.frame_paths, max_frames)
        if other := next((path for path in others if scaled(path) != scaled(one)), None):
            both = " and ".join("{} ({} x {})".format(path, *size_of(path)) for path in (one, other))
            text = f"frames {both} differ in size; make them one size (only --frame_mode images takes both)"
            problems.append(Problem(row.source, (row.line,), text))
    return problems


def check_media(rows: Iterable[VQARow]) -> list[Problem]:
    """Decode every frame and speech file once, on all cores, except those that `read_passed` knows and that have not
    changed since; sets what rows hold of their content. What fails is decoded again each time."""
    rows, users = list(rows), {}
    for row in rows:
        for path in row.media:
            users.setdefault(path, []).append(row)
    known, state_of = read_passed(), {}
    for path in users:
        state_of[os.path.abspath(path)] = [*version_of(path)]
    passed = {name: known[name] for name, state in state_of.items() if known.get(name, [])[:4] == state}
    waiting = {path: name for path, name in zip(users, state_of, strict=True) if name not in passed}
    unchanged = len(passed)

    def check(path: Path) -> tuple[str | None, list]:
        try:
            measured = speech_length(path) if path == users[path][0].audio_path else level_spread(path)
        except VQAError as error:
            return str(error), []
        return None, [measured, sha256_of(path)[: 2 * DIGEST_BYTES]]

    problems = []
    progress = tqdm(total=len(waiting), desc="Checking media", unit="file", leave=False, disable=not waiting)
    try:  # in threads: Pillow and FFmpeg let go of the interpreter while they decode
        with progress, contextlib.closing(ahead(check, waiting, 64, os.cpu_count())) as results:
            for (path, name), (text, content) in zip(waiting.items(), results, strict=True):
                progress.update()
                if text is None:
                    passed[name] = [*state_of[name], *content]
                    continue
                lines = tuple(dict.fromkeys(row.line for row in users[path]))
                more = f" ({len(lines) - 1} more lines need it)" if len(lines) > 1 else ""
                problems.append(Problem(users[path][0].source, lines, text + more))
    finally:  # a check that a signal cuts short keeps what it has done
        if len(passed) > unchanged:
            write_passed(passed if len(known) >= MAX_REMEMBERED else known | passed)
    content_of = {path: passed[name][4:] for path, name in zip(users, state_of, strict=True) if name in passed}
    for row in rows:
        row.speech_samples, _ = content_of.get(row.audio_path, (None, None))
        row.one_colour = tuple(p for p in row.frame_paths if p in content_of and content_of[p][0] <= ONE_COLOUR)
        whole = all(path in content_of for path in row.media)
        row.digests = bytes.fromhex("".join(content_of[path][1] for path in row.media)) if whole else b""
    return problems


def version_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced; () where there is none, as decoding will say."""
    if not path.exists():
        return ()
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def level_spread(path: Path) -> int:
    """How far apart the levels of a sound frame are, in the channel where they are farthest: 0 to 255. A JPEG's grey at
    an eighth of each side, which `decode_frame` gives for a check, cannot be farther apart than its colours; so only
    what is almost one level there is decoded in full. VQAError as `decode_frame`."""

    def spread(image: Image.Image) -> int:
        return max(high - low for low, high in image.getextrema())

    rough = spread(decode_frame(path, checking=True))
    return rough if rough > ONE_COLOUR else spread(decode_frame(path))


def find_empty_frames(rows: Sequence[VQARow]) -> tuple[str | None, bool]:
    """What there is to say of frames of one colour, and of frames whose names differ and whose bytes are equal (None:
    there are none); and whether too many rows have such frames. `check_media` must have seen the rows."""
    named: dict[bytes, dict[Path, str]] = {}  # digest -> file -> the name of the frame
    for row in rows:
        for frame, path, digest in zip(row.frames, row.frame_paths, row.contents["frame"], strict=False):
            named.setdefault(digest, {})[path] = fill_pattern("{video}_{frame_number}", row, frame)
    equal = [path for found in named.values() if len(set(found.values())) > 1 for path in found]
    uniform = list(dict.fromkeys(path for row in rows for path in row.one_colour))
    empty = {*uniform, *equal}
    count = sum(not empty.isdisjoint(row.frame_paths) for row in rows)
    if not count:
        return None, False
    parts = []
    for paths, what in ((uniform, "of one colour"), (equal, "with the bytes of another name")):
        if paths:
            some = ", ".join(map(str, paths[:3])) + ", ..." * (len(paths) > 3)
            parts.append(f"{len(paths)} {what} ({some})")
    text = f"{rows[0].source}: {count} of {len(rows)} rows have frames that show nothing of their own: "
    return text + ", ".join(parts), count > max(1, MAX_EMPTY * len(rows))


def passed_file() -> Path:
    """Where the media that passed are remembered: below `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgvivqa_audio" / "media_passed.json"


def read_passed() -> dict[str, list]:
    """Absolute path -> [bytes, mtime in ns, ctime in ns, inode, samples of speech at 16 kHz or `level_spread` of a
    frame, digest in hex] of media that passed; {} where the file is missing or damaged."""
    try:
        stored = json.loads(passed_file().read_bytes())
        usable = stored["checked_by"] == CHECKED_BY and all(len(state) == 6 for state in stored["files"].values())
        return stored["files"] if usable else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def write_passed(passed: dict[str, list]) -> None:
    """Replace what `read_passed` reads; where the folder cannot be written, the next start decodes again."""
    path = passed_file()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps({"checked_by": CHECKED_BY, "files": passed}), encoding="ascii")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def check_rows(
    data_path: str | Path,
    frames_dir: str | Path,
    audio_dir: str | Path | None,
    max_samples: int | None = None,
    allow_symlinks: bool = False,
    audio_pattern: str | None = None,
    frame_pattern: str | None = None,
) -> tuple[list[VQARow], list[Problem]]:
    """The rows that can be used, their media found and decoded once; and what is wrong with the others. The arguments
    are those of `scan_rows` and `find_media`; `audio_dir` is None where the question is only read."""
    rows, problems = scan_rows(data_path, max_samples)
    problems += find_media(rows, frames_dir, audio_dir, allow_symlinks, audio_pattern, frame_pattern)
    problems += find_shared_media(rows) + check_media(rows)
    problems.sort(key=lambda problem: problem.lines[0])
    bad = {line for problem in problems for line in problem.lines}
    return [row for row in rows if row.line not in bad], problems


def load_rows(*args, **kwargs) -> list[VQARow]:
    """`check_rows`, but VQAError names every malformed line and every missing, undecodable or ambiguous file."""
    rows, problems = check_rows(*args, **kwargs)
    raise_problems(problems)
    return rows


def ahead(function: typing.Callable, items: Iterable, depth: int, workers: int = MAX_WORKERS) -> Iterator:
    """`map(function, items)`, with up to `depth` results under way in threads while the caller uses the last one."""
    pending = deque()
    with ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def fit_size(size: tuple[int, int], max_image_size: int) -> tuple[int, int]:
    """(width, height) in pixels scaled down, never up, so that the longer side is at most `max_image_size`; what
    Pillow's `thumbnail` makes, which rounds to the nearest width / height."""
    if max(size) <= max_image_size:
        return size
    aspect = size[0] / size[1]
    upright = aspect <= 1
    exact = max_image_size * aspect if upright else max_image_size / aspect

    def error(n: int) -> float:
        return abs(aspect - n / max_image_size) if upright else n and abs(aspect - max_image_size / n)

    short = max(1, min(math.floor(exact), math.ceil(exact), key=error))
    return (short, max_image_size) if upright else (max_image_size, short)


def what_is(data: bytes) -> tuple[str, str | None]:
    """What the content of a file is, and FFmpeg's reader for it where it is sound."""
    if not data:
        return "empty", None
    start = without_tag(data)[:512]
    found = (kind for begins, *kind in KINDS if re.match(begins, start, re.DOTALL | re.IGNORECASE))
    return tuple(next(found, ("in no format that is known", None)))


def decode_frame(path: Path, checking: bool = False) -> Image.Image:
    """A decoded frame in full size, RGB, upright (EXIF orientation applied). `checking` also finds damage at which
    Pillow guesses, but may give a smaller frame in grey, which takes less time. VQAError for a file that is no JPEG,
    PNG or WebP, is damaged, or is too large or too thin for the model."""

    refuse = partial(refuse_frame, path)
    with naming_frame(path):
        data = path.read_bytes()
        kind, _ = what_is(data)
        if kind not in IMAGES:
            refuse(f"is {kind}")
        if (kind == "a WebP image") != (path.suffix.lower() == ".webp"):
            refuse(f"is {kind} called {path.suffix}", "rename it")
        png = kind == "a PNG image"
        with Image.open(io.BytesIO(sound_png(data) if png else data), formats=FRAME_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_FRAME_PIXELS:
                refuse(f"has {width} x {height} pixels, more than {MAX_FRAME_PIXELS}", "scale it down")
            if max(width, height) > MAX_ASPECT * min(width, height):
                refuse(f"has {width} x {height} pixels, too long and thin")
            if checking:
                image.draft("L", (1, 1))  # an eighth of each side, and only of a JPEG
            image.load()
            if checking:
                check_pixels(path, data)
            if (turn := TURNS.get(orientation(image))) is not None:  # one of them is 0
                image = image.transpose(turn)
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut off all above 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("P", "PA", "LA", "RGBA"):  # what is transparent keeps the colour it was stored with
                image = image.convert("RGBA")
            return image.convert("RGB") if image.mode != "RGB" else image


def refuse_frame(path: Path, what: str, advice: str = "replace it or remove the row") -> typing.NoReturn:
    """VQAError: what is wrong with a frame, and what to do."""
    raise VQAError(f"frame {path} {what}; {advice}")


@contextlib.contextmanager
def naming_frame(path: Path) -> Iterator[None]:
    """VQAError that names the frame which cannot be read or decoded within."""
    try:
        yield
    except VQAError:
        raise
    except DECODE_ERRORS as error:
        refuse_frame(path, f"cannot be decoded ({error})")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where the EXIF cannot be read."""
    try:
        number = image.getexif().get(0x0112)
    except DECODE_ERRORS:
        return 1
    return number if number in TURNS else 1


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of an upright frame in pixels, from its header; `DECODE_ERRORS` where it cannot be read."""
    with path.open("rb") as file:
        png = file.read(4) == b"\x89PNG"
        file.seek(0)
        source = io.BytesIO(sound_png(file.read())) if png else file
        with Image.open(source, formats=FRAME_FORMATS) as image:
            return image.size[::-1] if orientation(image) >= 5 else image.size  # 5 to 8 lie on their side


def sound_png(data: bytes) -> bytes:
    """A PNG without the metadata whose checksums are wrong, for which Pillow would refuse the image; ValueError where
    those of pixels are wrong, at which Pillow does not look."""
    at, kept, name = 8, [data[:8]], b""
    while at + 12 <= len(data) and name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, stated = data[at + 4 : at + 8], data[end - 4 : end]
        if end <= len(data) and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(stated, "big"):
            kept.append(data[at:end])
        elif name[:1].isupper() or name == b"tRNS":
            raise ValueError(
                "it is cut off" if end > len(data) else f"the checksum of {name.decode('ascii', 'replace')} is wrong"
            )
        at = end
    if name != b"IEND":
        raise ValueError("it is cut off")
    return b"".join(kept)


def check_pixels(path: Path, data: bytes) -> None:
    """VQAError where the `data` of a frame have damage at which Pillow guesses, so that the decoded frame is wrong."""
    if what_is(data)[0] == "a JPEG image" and (found := jpeg_damage(data)):
        refuse_frame(path, f"is damaged (FFmpeg: {found})")


def jpeg_damage(data: bytes) -> str | None:
    """What FFmpeg finds damaged in the coded pixels of a JPEG, where libjpeg guesses and Pillow is silent about it.
    None also for a kind of JPEG that FFmpeg does not read."""
    at, kept = 2, [data[:2]]  # the segments before the pixels, without metadata (APP1 to 13, APP15 and comments)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not re.match(rb"\xff[\xe1-\xed\xef\xfe]", data[at:end]):
            kept.append(data[at:end])
        at = end
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count, decoder.options = 1, {"lowres": "3"}  # every code is read, an eighth of each side computed
    with av.logging.Capture() as faults:
        try:
            decoder.decode(av.Packet(b"".join(kept) + data[at:]))
        except av.error.PatchWelcomeError:
            return None
        except av.FFmpegError as error:
            faults.append((0, "", error.strerror))
    return None if not faults or "unsupported" in faults[0][2] else faults[0][2].strip()


def load_frame(path: Path, max_image_size: int) -> Image.Image:
    """A decoded RGB frame, at most `max_image_size` pixels on its longer side."""
    return shrink(decode_frame(path), max_image_size)


def shrink(image: Image.Image, max_image_size: int) -> Image.Image:
    """A frame scaled down, never up, to at most `max_image_size` pixels on its longer side."""
    size = fit_size(image.size, max_image_size)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP) if size != image.size else image


def reduction(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """By what `shrink` reduces a frame of `size` in each direction before it scales it to `wanted`."""
    return tuple(int(side / less / REDUCING_GAP) or 1 for side, less in zip(size, wanted, strict=True))


def copy_pixels(frame: Image.Image) -> torch.Tensor:
    """The pixels of an RGB frame as uint8 [height, width, 4], of which the fourth means nothing, in page-locked memory
    where there is a GPU. Pasted into memory that Pillow shares, since numpy's copy of an image keeps all other threads
    from running: for 8 frames of 1240x1080 15 ms, however many threads make them."""
    pixels = torch.empty((frame.height, frame.width, 4), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    shared = Image.frombuffer("RGBX", frame.size, pixels.numpy(), "raw", "RGBX", 0, 1)
    shared.readonly = False
    shared.paste(frame)
    return pixels


@lru_cache(64)
def bicubic_weights(side: float, pixels: int, wanted: int, device: torch.device) -> torch.Tensor | None:
    """What each of the `pixels` on a `side` of a frame counts in each of those `wanted` on the scaled one: integers,
    float64 [pixels, wanted], by 2**BICUBIC_BITS; as Pillow computes them (its src/libImaging/Resample.c). `side` is not
    `pixels` where the last one is what was left over from a reduction. None: the side stays as it is."""
    if side == pixels == wanted:
        return None
    scale = float(np.float32(side)) / wanted
    stretch, centers, at = max(scale, 1.0), (np.arange(wanted) + 0.5) * scale, np.arange(pixels)[:, None]
    first, behind = (np.trunc(centers + reach * stretch + 0.5) for reach in (-2, 2))
    x = np.abs((at - centers + 0.5) * (1 / stretch))
    # Keys' kernel with a = -0.5.
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0))
    weights *= (at >= first) & (at < behind)
    weights = weights / weights.cumsum(0)[-1] * 2**BICUBIC_BITS  # summed in Pillow's order
    return torch.from_numpy(np.trunc(weights + np.copysign(0.5, weights))).to(device)


def resize_on_device(frame: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
    """Pillow's bicubic `resize` of a frame uint8 [height, width, 3], bit for bit: products of integers, which float64
    holds exactly. A GPU takes 0.3 ms for what takes a CPU 20. `weights`: `bicubic_weights` of width and height."""
    scaled = frame.permute(2, 0, 1).double()
    for counts in weights:  # Pillow, too, scales the width first, and rounds
        if counts is not None:
            scaled = (scaled @ counts / 2**BICUBIC_BITS + 0.5).floor().clamp(0, 255)
        scaled = scaled.transpose(1, 2)
    return scaled.permute(1, 2, 0).to(torch.uint8)


def decode_audio(path: Path) -> tuple[np.ndarray, int]:
    """Speech as stored: float32 samples [n, channels] and the rate in Hz. VQAError for a file that cannot be decoded,
    is damaged or cut off, or holds nothing that the model could use as it is."""

    def refuse(what: str, advice: str = "replace it or remove the row") -> typing.NoReturn:
        raise VQAError(f"speech {path} {what}; {advice}")

    try:
        data = path.read_bytes()
    except OSError as error:
        refuse(f"cannot be decoded ({error})")
    kind, reader = what_is(data)
    if kind.startswith("in no format") and path.suffix.lower() == ".mp3":
        reader = "mp3"  # one that was cut out of a stream begins anywhere
    if reader is None:
        refuse(f"is {kind}")
    if reader in ("wav", "ogg"):
        data = without_tag(data)
    if reader == "wav" and re.search(rb"RIFF....WAVE", data[12:], re.DOTALL):
        refuse("is a WAV with another WAV behind it", "join them with ffmpeg or sox")
    cut = "is cut off", "copy it again or remove the row"
    with av.logging.Capture() as faults:
        try:
            samples, rate, complete = decode_stream(data, reader)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            told = isinstance(error, av.FFmpegError) and faults  # FFmpeg's log says more than its error
            message = faults[-1][2].strip() if told else getattr(error, "strerror", None) or str(error)
            refuse(*cut) if is_cut_off(data, reader) else refuse(f"cannot be decoded ({message})")
    seconds = len(samples) / rate
    if seconds > MAX_SPEECH_SECONDS:
        refuse(f"lasts more than the {MAX_SPEECH_SECONDS} s that the model hears", "shorten it")
    if not complete or is_cut_off(data, reader):
        refuse(*cut)
    if faults:
        refuse(f"is damaged or cut off ({faults[0][2].strip()})")
    if not np.isfinite(samples).all():
        refuse("holds samples that are not finite")
    if seconds < MIN_SPEECH_SECONDS:
        refuse(f"lasts {seconds:.3f} s, less than {MIN_SPEECH_SECONDS}")
    if (
        not SPEECH_RATES[0] <= rate <= SPEECH_RATES[1]
        or rate * SAMPLE_RATE > MAX_RATE_RATIO * math.gcd(rate, SAMPLE_RATE) ** 2
    ):
        refuse(f"has {rate} samples a second", f"resample it to {SAMPLE_RATE}")
    if np.abs(samples.mean(axis=1)).max() < SILENCE:
        if np.abs(samples).max() < SILENCE:
            refuse("is silent throughout")
        refuse("is silent once its channels are averaged, as they cancel", "keep one of them")
    return samples, rate


def decode_stream(data: bytes, reader: str) -> tuple[np.ndarray, int, bool]:
    """Samples float32 [n, channels] of a file's first sound stream, its rate, and whether all are there that the
    file states; at most a second more than the model hears. av.FFmpegError or ValueError where it cannot be decoded."""
    fifo, shape, blocks, packet = av.AudioFifo(), None, 0, b""
    # FFmpeg looks into 5 MB of a WAV for sound that is packed as PCM; nobody packs speech so.
    options = {"probesize": "2048"} if reader == "wav" else {}
    with av.open(io.BytesIO(data), format=reader, options=options, metadata_errors="replace") as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None:  # None: in a coding that FFmpeg does not know
            raise ValueError("it holds no sound that can be decoded")
        stream.codec_context.options = {"err_detect": "crccheck"}  # FLAC's own checksums
        for part in container.demux(stream):
            if reader == "mp3" and part.size:
                if is_tag(bytes(part)):
                    continue
                packet, blocks = bytes(part), blocks + 1
            for block in part.decode():
                # PyAV's queue does not look at the channels: with fewer than before it reads at address 0.
                shape = shape or (block.sample_rate, block.layout.nb_channels)
                if shape != (block.sample_rate, block.layout.nb_channels):
                    raise ValueError("its rate or its channels change on the way")
                block.pts = None  # sound is laid end to end
                fifo.write(block)
            if shape and fifo.samples > (MAX_SPEECH_SECONDS + 1) * shape[0]:
                break
        if shape is None or not shape[0]:
            raise ValueError("it holds no sound")
        rate, complete = shape[0], True  # a header may state half the rate that AAC decodes to
        if reader == "mp3":
            complete = blocks >= stated_blocks(data) and len(packet) >= block_bytes(packet)
        elif reader == "flac":
            complete = fifo.samples >= (stream.duration or 0)
        elif reader == "mov" or (reader == "matroska" and len(container.streams) == 1):  # times, not to the sample
            own = stream.duration * stream.time_base if stream.duration else 0
            complete = fifo.samples / rate + MIN_SPEECH_SECONDS > (own or (container.duration or 0) / av.time_base)
    return block_samples(fifo.read()), rate, complete


def block_samples(block: av.AudioFrame) -> np.ndarray:
    """float32 [n, channels] of decoded sound; integers become -1 to 1."""
    values = block.to_ndarray()
    values = values.T if block.format.is_planar else values.reshape(block.samples, -1)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        return values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.astype(np.float32, copy=False)


def is_cut_off(data: bytes, reader: str) -> bool:
    """Whether a WAV or an Ogg ends before it says that it does, which FFmpeg does not tell."""
    at = 12
    if reader == "wav":
        long = int.from_bytes(data[28:36], "little") if data[:4] == b"RF64" and data[12:16] == b"ds64" else 0
        while at + 8 <= len(data):
            name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
            if name == b"data":
                size = long if size == 0xFFFFFFFF and long else size  # above 4 GiB, or written as if
                return at + 8 + size > len(data) and (bool(long) or size < STREAMED_BYTES)
            at += 8 + size + size % 2
        return True
    if reader == "ogg":  # pages are counted, and the last one of a stream is marked
        at, numbers, ends = 0, {}, False
        while data[at : at + 4] == b"OggS" and len(data) >= at + 27:
            flags, stream, number, segments = struct.unpack_from("<5xB8xII4xB", data, at)
            if not flags & 2 and number != numbers.get(stream):
                return True
            numbers[stream], ends = number + 1, bool(flags & 4)
            at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
        return at > len(data) or not ends
    return False


def without_tag(data: bytes) -> bytes:
    """`data` without the ID3 tag before the sound: ten bytes, then as many as they say, seven bits a byte."""
    if data[:3] != b"ID3":
        return data
    return data[10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False)) :]


def is_tag(packet: bytes) -> bool:
    """Whether what the MP3 reader hands over is a title, or padding, between or behind the blocks of sound."""
    return packet[:3] in (b"ID3", b"TAG", b"APE", b"LYR") or not packet.strip(b"\0")


def stated_blocks(data: bytes) -> int:
    """The number of blocks that an MP3's first block states; 0 if it does not."""
    header = re.search(rb"(?:Xing|Info)\0\0\0[\x01-\x0f](.{4})", without_tag(data)[:192], re.DOTALL)
    return int.from_bytes(header[1], "big") if header and header[0][7] & 1 else 0


def block_bytes(packet: bytes) -> int:
    """How long the header of an MP3's block says that the block is; 0 if it does not."""
    head = int.from_bytes(packet[:4], "big")
    version, layer, bitrate, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return 0
    full = version == 3  # MPEG 1; MPEG 2 and 2.5 have half and a quarter of the rate, and half the block
    hertz = (44100, 48000, 32000)[rate] >> (0, 1, 2)[(3, 2, 0).index(version)]
    return (144 if full else 72) * MP3_KBPS[full][bitrate - 1] * 1000 // hertz + (head >> 9 & 1)


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz that `load_speech` makes of `samples` at `rate` Hz; torchaudio rounds up in float32."""
    common = math.gcd(rate, SAMPLE_RATE)
    return math.ceil(np.float32(SAMPLE_RATE // common * samples / (rate // common)))


def speech_length(path: Path) -> int:
    """Samples that `load_speech` gives. Only decoding tells: headers are missing, or mean the coder's padding too."""
    samples, rate = decode_audio(path)
    return resampled_length(len(samples), rate)


def load_speech(path: Path) -> np.ndarray:
    """Speech as the encoder wants it: float32 [n] at 16 kHz, channels averaged."""
    samples, rate = decode_audio(path)
    mono = torch.from_numpy(samples.mean(axis=1))
    return resampler(rate)(mono).numpy()


@lru_cache(8)
def resampler(rate: int) -> torchaudio.transforms.Resample:
    """From `rate` Hz to 16 kHz; kept, as its filter takes longer to make than to use."""
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE, **RESAMPLING)


# ----------------------------------------------------------------------------------------------------------------------
# Prompt and labels
# ----------------------------------------------------------------------------------------------------------------------


TOKENIZING = threading.Lock()  # a fast tokenizer keeps the settings of a call in itself


class VQAProcessor:
    """Turns a row's frames, speech and words into model inputs, the same way for training and evaluation. `tokenizer`
    is from `load_tokenizer`; the geometry in `config` says how many tokens frames and speech take. The other arguments
    are as the flags of their names."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Qwen2VLConfig,
        max_image_size: int = 384,
        input_mode: str = "audio",
        audio_tokens: str = "full",
        frame_mode: str = "images",
        prompt_layout: str = "plain",
    ):
        self.tokenizer, self.max_image_size, self.input_mode = tokenizer, max_image_size, input_mode
        self.audio_tokens, self.frame_mode, self.prompt_layout = audio_tokens, frame_mode, prompt_layout
        choices = {"input_mode": INPUT_MODES, "audio_tokens": AUDIO_TOKENS, "frame_mode": FRAME_MODES}
        for name, known in (choices | {"prompt_layout": tuple(PROMPT_LAYOUTS)}).items():
            if getattr(self, name) not in known:
                raise VQAError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        self.layout = PROMPT_LAYOUTS[prompt_layout]
        audio, vision = audio_config_of(config), config.vision_config
        self.encoder_tokens = audio.max_source_positions
        self.context = config.text_config.max_position_embeddings
        self.merge_size = vision.spatial_merge_size
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=self.merge_size
        )
        mel_frames = self.encoder_tokens * MEL_FRAMES_PER_TOKEN
        self.max_samples = mel_frames * HOP_LENGTH
        self.feature_extractor = WhisperFeatureExtractor(
            feature_size=audio.num_mel_bins, sampling_rate=SAMPLE_RATE, hop_length=HOP_LENGTH, chunk_length=1
        )
        self.feature_extractor.n_samples = self.max_samples
        self.feature_extractor.nb_max_frames = mel_frames
        self.known_texts: dict[tuple[str, bool], list[int]] = {}
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO_PAD)
        video = frame_mode == "video"
        self.vision_id, self.vision_type = (config.video_token_id, 2) if video else (config.image_token_id, 1)
        self.vision_ids = (config.vision_start_token_id, config.vision_end_token_id)

    def with_mode(self, input_mode: str) -> "VQAProcessor":
        """The same for another of `INPUT_MODES`."""
        other = copy.copy(self)
        other.input_mode = input_mode
        return other

    def speech_tokens(self, samples: int, silence: int = 0) -> int:
        """Tokens that speech of `samples` at 16 kHz takes in the prompt, with `silence` more behind it."""
        if self.audio_tokens == "full":
            return self.encoder_tokens
        return min(self.encoder_tokens, max(1, math.ceil(samples / SAMPLES_PER_TOKEN)) + silence)

    def tokenize(self, text: str, split_special_tokens: bool = False) -> list[int]:
        """Ids of a piece of a prompt, not to be changed; what many rows share is tokenised once."""
        key = text, split_special_tokens
        if key not in self.known_texts:
            with TOKENIZING:
                ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
            if len(self.known_texts) >= MAX_KNOWN_TEXTS:
                return ids
            self.known_texts[key] = ids
        return self.known_texts[key]

    def text_ids(self, question: str, answer: str | None) -> tuple[list[int], ...]:
        """Ids of the text before the speech, between speech and frames, and after the frames; and those learned."""
        words = self.tokenize
        layout, asked = self.layout, []
        if self.input_mode != "audio":
            asked = words(layout.question.format(question), split_special_tokens=True)
        before, between = layout.opening, ""
        if self.input_mode != "text":
            before, between = USER_TURN + AUDIO_BOS, f"{AUDIO_EOS}\n{layout.before_frames}"
        stop = f"<|im_end|>{layout.after_answer}"
        return (
            words(before),
            words(between),
            asked + words(f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"),
            [] if answer is None else words(answer, split_special_tokens=True) + words(stop),
        )

    def build(
        self, question: str, vision_tokens: Sequence[int], audio_tokens: int, answer: str | None
    ) -> dict[str, torch.Tensor]:
        """Token ids of one sample: `vision_tokens` of each frame, or of the one video, `audio_tokens` of the speech.
        Only the text modes use `question`; `answer` None is the prompt alone. Returns `input_ids`, `mm_token_type_ids`
        (0 text and speech, 1 image, 2 video) and `labels` (the answer, its stop token and the layout's `after_answer`;
        -100 elsewhere), each int64 [T]; `vision_at` and `speech_at`, int64 [n], where they go."""
        before, between, after, learned = self.text_ids(question, answer)
        speech = [self.audio_id] * audio_tokens if self.input_mode != "text" else []
        ids = before + speech + between
        vision_at = []
        for count in vision_tokens:
            vision_at += range(len(ids) + 1, len(ids) + 1 + count)
            ids += [self.vision_ids[0], *[self.vision_id] * count, self.vision_ids[1]]
        labels = [IGNORE_INDEX] * (len(ids) + len(after)) + learned
        ids += after + learned
        vision_at = torch.tensor(vision_at, dtype=torch.long)
        types = torch.zeros(len(ids), dtype=torch.long)
        types[vision_at] = self.vision_type
        return {
            "input_ids": torch.tensor(ids),
            "mm_token_type_ids": types,
            "labels": torch.tensor(labels),
            "vision_at": vision_at,
            "speech_at": torch.arange(len(before), len(before) + len(speech)),
        }

    def length(self, question: str, vision_tokens: Sequence[int], audio_tokens: int, answer: str | None) -> int:
        """Tokens of the sample that `build` makes of these."""
        speech = audio_tokens if self.input_mode != "text" else 0
        return sum(map(len, self.text_ids(question, answer))) + speech + sum(vision_tokens) + 2 * len(vision_tokens)

    def make_sample(
        self,
        row: VQARow,
        frames: Sequence[Image.Image],
        speech: np.ndarray | tuple[torch.Tensor, torch.Tensor] | None,
        with_answer: bool,
        vision_features: tuple[torch.Tensor, torch.Tensor] | None = None,
        speech_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One sample as model inputs, without a batch dimension; with the answer if `with_answer`.

        `frames` are RGB, from `load_frame`; `speech` is float32 [n] at 16 kHz or from `log_mel`, None in text mode.
        `vision_features` (features and grid of the clip) and `speech_features` stand in for them. Returns the tensors
        of `build`, `patches_of` and `log_mel`, or the features given, and with the answer `position_ids` int64 [T, 3].
        VQAError for speech longer than the encoder's window, or frames that cannot be paired.
        """
        media = {}
        audio_tokens = 0
        if vision_features is None:
            media["pixel_values"], grid = self.patches_of(frames, f"of {row.where}")
        else:
            media["vision_features"], grid = vision_features
        if speech_features is not None:
            media["speech_features"], audio_tokens = speech_features, len(speech_features)
        elif self.input_mode != "text":
            mel, lengths = speech if isinstance(speech, tuple) else self.log_mel(speech, f"of {row.where}")
            media |= {"input_features": mel, "audio_lengths": lengths}
            audio_tokens = int(lengths)
        counts = (grid.prod(-1) // self.merge_size**2).tolist()
        sample = self.build(row.question, counts, audio_tokens, row.answer if with_answer else None) | media
        sample["video_grid_thw" if self.frame_mode == "video" else "image_grid_thw"] = grid
        if with_answer:
            # Here, in the loader's workers, and not by the model, which would do it sample by sample on the GPU.
            sample["position_ids"] = mrope_positions(sample["mm_token_type_ids"], grid, self.merge_size)
        return sample

    def patches_of(
        self, frames: Sequence[Image.Image | tuple[torch.Tensor, tuple[int, int, int]]], source: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches, uint8 [patches, 3 * patch * patch], and their grid int64 [frames, 3], of frames or of what
        `cut_patches` made of them; in video mode those of `pair_frames`, or VQAError, which names `source`, where the
        frames differ in size. The model scales the patches: see `scale_pixels`."""
        cut = [frame if isinstance(frame, tuple) else self.cut_patches(frame) for frame in frames]
        pixels = torch.cat([patches for patches, _ in cut])
        grid = torch.tensor([g for _, g in cut])
        if self.frame_mode == "video":
            if (grid != grid[0]).any():
                raise VQAError(f"the frames {source} differ in size; --frame_mode video cannot pair them")
            pixels, grid = pair_frames(pixels, grid)
        return pixels, grid

    def patched_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that a frame of `size` is scaled to, so that it consists of whole patches."""
        library = self.image_processor
        limits, factor = library.size, library.patch_size * self.merge_size
        height, width = smart_resize(size[1], size[0], factor, limits["shortest_edge"], limits["longest_edge"])
        return width, height

    def cut_patches(self, frame: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """A frame as patches and their grid: see `lay_out`."""
        size = self.patched_size(frame.size)
        if frame.size != size:
            frame = frame.resize(size, Image.Resampling.BICUBIC)
        return self.lay_out(torch.from_numpy(np.array(frame)))

    def lay_out(self, frame: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches uint8 [patches, 3 * patch * patch] of a frame uint8 [height, width, 3] of `patched_size`, and its
        grid, both as the library lays them out."""
        merge, patch = self.merge_size, self.image_processor.patch_size
        rows, columns = (side // patch for side in frame.shape[:2])
        values = frame.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        values = values.permute(0, 3, 1, 4, 6, 2, 5)  # [rows..., columns..., 3, y, x]
        return values.reshape(rows * columns, -1), (1, rows, columns)

    def log_mel(
        self, speech: np.ndarray, source: Path | str, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel of float32 [n] at 16 kHz, float32 [1, mel bins, frames] on the CPU, computed on `device`, and its tokens,
        int64 [1]; VQAError, which names `source`, where the encoder's window is too short for it."""
        if len(speech) > self.max_samples:
            raise VQAError(
                f"speech {source} lasts {len(speech) / SAMPLE_RATE:.1f} s, this model's "
                f"encoder hears {self.max_samples / SAMPLE_RATE:.1f}; shorten it"
            )
        mel = self.feature_extractor(
            speech, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding="max_length", device=device
        )
        return mel["input_features"], torch.tensor([self.speech_tokens(len(speech))])

    def count_tokens(self, row: VQARow, frame_paths: Sequence[Path], with_answer: bool = True, silence: int = 0) -> int:
        """Length of the sample of `row`, with `silence` tokens behind its speech, from the headers of its frames;
        speech is decoded only if `check_media` did not."""
        vision_tokens, audio_tokens = [], 0
        for path in frame_paths:
            width, height = fit_size(upright_size(path), self.max_image_size)
            patches = self.image_processor.get_number_of_image_patches(height, width, {})
            vision_tokens.append(patches // self.merge_size**2)
        if self.frame_mode == "video":
            vision_tokens = [vision_tokens[0] * math.ceil(len(vision_tokens) / 2)]
        if self.input_mode != "text":
            audio_tokens = self.speech_tokens(row.speech_samples or speech_length(row.audio_path), silence)
        return self.length(row.question, vision_tokens, audio_tokens, row.answer if with_answer else None)


def pair_frames(pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames as Qwen2-VL's video: two neighbours share a temporal patch; a last one without neighbour is doubled.
    `pixels` [frames * patches, 3 * patch * patch] and `grid` int64 [frames, 3], all of one size, become pixels
    [ceil(frames / 2) * patches, 3 * 2 * patch * patch] and grid int64 [1, 3]."""
    frames, _, height, width = len(grid), *grid[0].tolist()
    if frames % 2:
        pixels, frames = torch.cat([pixels, pixels[-height * width :]]), frames + 1
    pairs = pixels.view(frames // 2, 2, height * width, 3, -1).permute(0, 2, 3, 1, 4)
    return pairs.reshape(-1, 2 * pixels.shape[1]), torch.tensor([[frames // 2, height, width]])


@cache
def pixel_levels(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What Qwen2-VL's image processor makes of the 256 values of red, green and blue, [768]."""
    library = Qwen2VLImageProcessorPil()
    every = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[..., None]
    scaled = library.normalize(library.rescale(every, library.rescale_factor), library.image_mean, library.image_std)
    return torch.from_numpy(scaled.astype(np.float32).flatten()).to(device, dtype)


def scale_pixels(pixels: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Patches [patches, width] in `dtype`, bit for bit as `Qwen2VLImageProcessorPil` gives them, of uint8 patches. On
    the device, since they take 8 times (in pairs 4 times) the room of what they are made of. `width` is what the
    encoder takes, 3 * temporal patch * patch * patch; a frame that is no pair stands in both temporal places."""
    channels = pixels.view(len(pixels), 3, 1, -1).int()
    channels += torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
    # On the CPU index_select takes a third of the time of indexing.
    values = torch.index_select(pixel_levels(pixels.device, dtype), 0, channels.flatten()).view(channels.shape)
    return values.expand(-1, -1, width // pixels.shape[1], -1).reshape(len(pixels), width)


def mrope_positions(types: torch.Tensor, grid: torch.Tensor, merge_size: int) -> torch.Tensor:
    """M-RoPE positions of one sample, int64 [T, 3] (time, row, column), as Qwen2-VL's `get_rope_index` gives them. That
    one takes a model, which loader workers lack, and 2.3 ms a sample in place of 0.2; reading the features of a sample
    from the cache takes 2. `types` are `mm_token_type_ids` [T], `grid` int64 [frames or clips, 3] the patches in time,
    rows and columns."""
    positions = np.empty((len(types), 3), np.int64)
    vision = np.flatnonzero(types.numpy())
    position = end = done = 0  # the next position, the next token, and the vision tokens that have theirs
    for t, h, w in grid.tolist():
        sides = t, h // merge_size, w // merge_size
        start, done = int(vision[done]), done + math.prod(sides)
        positions[end:start] = np.arange(position, position + start - end)[:, None]
        position += start - end
        end = start + math.prod(sides)
        positions[start:end] = np.indices(sides).reshape(3, -1).T + position
        position += max(sides[1:])
    positions[end:] = np.arange(position, position + len(types) - end)[:, None]
    return torch.from_numpy(positions)


# ----------------------------------------------------------------------------------------------------------------------
# Dataset and collator
# ----------------------------------------------------------------------------------------------------------------------


@lru_cache(SPEECH_KEPT)
def mel_of(processor: VQAProcessor, path: Path, version: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """What `log_mel` makes of a speech file, which many rows and epochs share; it is decoded once a process. `version`
    is from `version_of`, so that a file that was replaced is decoded anew."""
    return processor.log_mel(load_speech(path), path)


def read_media(
    processor: VQAProcessor, frames: Sequence, speech: np.ndarray | str | Path | None, device: torch.device
) -> Iterator:
    """What `log_mel` makes of the speech of one question, where there is any, then of each frame what `cut_patches`
    makes of it or, for a GPU, what `OneQuestion.cut` does: `copy_pixels` of the frame, reduced, and its size. At last
    None for each file of a frame in which no damage was found at which Pillow guesses; before that, a frame may be
    wrong. All is read side by side. `frames` and `speech` are as `SpeechMixin.answer` takes them."""

    def hear() -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(speech, str | Path):
            return processor.log_mel(load_speech(Path(speech)), speech, device)
        return processor.log_mel(speech, "given to answer()", device)

    def cut(frame) -> tuple[torch.Tensor, tuple[int, ...]]:
        if isinstance(frame, tuple):
            return frame
        frame = decode_frame(Path(frame)) if isinstance(frame, str | Path) else frame
        if device.type != "cuda":
            return processor.cut_patches(shrink(frame, processor.max_image_size))
        by = reduction(frame.size, fit_size(frame.size, processor.max_image_size))
        return copy_pixels(frame.reduce(by) if max(by) > 1 else frame), frame.size

    def check(path: Path) -> None:
        # Not a second decoding: the memory that Pillow keeps would get the size of small frames, and then grow again.
        with naming_frame(path):
            check_pixels(path, path.read_bytes())

    jobs = [*([] if speech is None else [hear]), *(partial(cut, frame) for frame in frames)]
    jobs += [partial(check, Path(frame)) for frame in frames if isinstance(frame, str | Path)]
    return ahead(lambda job: job(), jobs, len(jobs), MAX_WORKERS + 1)


def select_frames(frames: Sequence, limit: int | None) -> Sequence:
    """`limit` evenly spaced frames in order, the first among them; all of them where there are no more, or for None."""
    if limit is None or len(frames) <= limit:
        return frames
    stride = len(frames) / limit
    return [frames[int(i * stride)] for i in range(limit)]


class SurgicalVQADataset(torch.utils.data.Dataset):
    """Spoken questions about clips, as model inputs.

    `rows` are from `load_rows`, or the path of a question file, which is then read and checked here; that needs
    `frames_dir` and, outside text mode, `audio_dir`. A clip has at most `max_eval_frames` frames with `is_eval`, else
    `max_train_frames`; None: all. `with_answer` False is for generation; `with_index` adds `row_indices`, so that the
    Trainer can name a sample. Up to `speech_token_jitter` tokens of silence follow the speech, drawn by `seed`, the
    epoch and the row. `epoch` is in shared memory, so that loader workers which outlive an epoch see it change. The
    index ~i is row i with nothing to learn, of which `Filled` has use.
    """

    def __init__(
        self,
        rows: Sequence[VQARow] | str | Path,
        processor: VQAProcessor,
        frames_dir: str | Path | None = None,
        audio_dir: str | Path | None = None,
        max_train_frames: int | None = None,
        max_eval_frames: int | None = None,
        is_eval: bool = False,
        with_answer: bool = True,
        with_index: bool = False,
        speech_token_jitter: int = 0,
        seed: int = 0,
    ):
        if isinstance(rows, str | Path):
            rows = load_rows(rows, frames_dir, audio_dir if processor.input_mode != "text" else None)
        self.rows, self.processor = rows, processor
        self.max_train_frames, self.max_eval_frames = max_train_frames, max_eval_frames
        self.is_eval, self.with_answer, self.with_index = is_eval, with_answer, with_index
        self.speech_token_jitter, self.seed = speech_token_jitter, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.feature_store: FeatureStore | None = None  # once it is filled

    def silence_behind(self, index: int) -> int:
        """Tokens of silence that follow the speech of a row in this epoch."""
        return random.Random(f"{self.seed}/{self.epoch}/{self.rows[index].key}").randint(0, self.speech_token_jitter)

    def _select_frames(self, frames: Sequence) -> Sequence:
        """Those of a clip's frames that this dataset gives."""
        return select_frames(frames, self.max_eval_frames if self.is_eval else self.max_train_frames)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < 0:
            sample = self[~index]
            return sample | {"labels": torch.full_like(sample["labels"], IGNORE_INDEX), "row_indices": []}
        row, (clip, speech_path) = self.rows[index], self.media_of(index)
        silence = self.silence_behind(index)
        if self.feature_store:
            speech_features = None
            if speech_path:
                speech_features, tokens = self.feature_store.read(speech_path)
                speech_features = speech_features[: tokens + silence]
            vision_features = self.feature_store.read(clip)
            sample = self.processor.make_sample(row, (), None, self.with_answer, vision_features, speech_features)
        else:
            frames = [load_frame(path, self.processor.max_image_size) for path in clip]
            speech = None
            if speech_path:
                mel, tokens = mel_of(self.processor, speech_path, version_of(speech_path))
                speech = mel, (tokens + silence).clamp(max=self.processor.encoder_tokens)
            sample = self.processor.make_sample(row, frames, speech, self.with_answer)
        return {**sample, "row_indices": [index]} if self.with_index else sample

    def media_of(self, index: int) -> tuple[tuple[Path, ...], Path | None]:
        """The clip of a row, that is, the selected frames in order; and its speech, None in text mode."""
        row = self.rows[index]
        speech = row.audio_path if self.processor.input_mode != "text" else None
        return tuple(self._select_frames(row.frame_paths)), speech

    cacheable_media = media_of  # for `FeatureStore.fill`: a dataset changes neither

    def find_too_long(self) -> list[Problem]:
        """The rows whose samples take more tokens than the model has positions. Headers of frames are read only where
        the largest frames could bring that about."""
        processor = self.processor
        problems = []
        context = self.processor.context
        unit = processor.image_processor.patch_size * processor.merge_size
        largest = max(16, math.ceil(processor.max_image_size / unit) ** 2)  # tiny frames are scaled up to 4 x 4 tokens
        for row in self.rows:
            frames = self._select_frames(row.frame_paths)
            most = processor.length(row.question, [largest] * len(frames), processor.encoder_tokens, row.answer)
            if most > context and (tokens := self.most_tokens(row)) > context:
                text = f"{row.key} takes {tokens} tokens, more than the model's {context}; lower --max_image_size or "
                part = "eval" if self.is_eval else "train"
                problems.append(Problem(row.source, (row.line,), f"{text}--max_{part}_frames"))
        return problems

    def most_tokens(self, row: VQARow) -> int:
        """Tokens of the sample of `row` with the most silence behind its speech, without decoding any frame."""
        frames = self._select_frames(row.frame_paths)
        return self.processor.count_tokens(row, frames, silence=self.speech_token_jitter)

    def token_counts(self, indices: Iterable[int] | None = None) -> list[int]:
        """`most_tokens` of each sample, or of those at `indices`."""
        rows = self.rows if indices is None else map(self.rows.__getitem__, indices)
        return [self.most_tokens(row) for row in rows]


class VQACollator:
    """Batches samples: text is padded, frames are concatenated, speech is stacked. Padding is filled with
    `pad_token_id`, and never recognised by it. `padding_side` is `left` for generation, `right` for training: there
    causal attention never reaches the padding, and without a mask sdpa takes its flash kernel. Batches are padded to a
    multiple of `multiple` tokens, the rest on the right."""

    FILL = {"labels": IGNORE_INDEX, "mm_token_type_ids": 0, "attention_mask": 0, "position_ids": 0}  # noqa: RUF012
    JOINED = ("pixel_values", "image_grid_thw", "video_grid_thw", "vision_features")
    JOINED += ("input_features", "audio_lengths", "speech_features")

    def __init__(self, pad_token_id: int, padding_side: str = "right", multiple: int = 1):
        self.pad_token_id, self.padding_side, self.multiple = pad_token_id, padding_side, multiple

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The samples of `VQAProcessor.make_sample` as one batch. `input_ids`, `labels`, `mm_token_type_ids` and,
        padded on the left, `attention_mask` are int64 [B, T], `position_ids` int64 [3, B, T]; the tensors of frames and
        speech follow each other along their first dimension; `vision_at`, `speech_at` and `answer_at` (see
        `answer_indices`) are indices into the flattened batch."""
        names = ("input_ids", "labels", "mm_token_type_ids", "position_ids")
        padded = {name: [s[name] for s in samples] for name in names if name in samples[0]}
        if self.padding_side == "left":
            padded["attention_mask"] = [torch.ones_like(ids) for ids in padded["input_ids"]]
        lengths = [len(ids) for ids in padded["input_ids"]]
        longest = max(lengths)
        width = math.ceil(longest / self.multiple) * self.multiple
        batch = {}
        left = self.padding_side == "left"
        for name, values in padded.items():
            fill = self.FILL.get(name, self.pad_token_id)
            joined = nn.utils.rnn.pad_sequence(values, True, fill, self.padding_side)
            joined = joined.permute(2, 0, 1) if name == "position_ids" else joined
            batch[name] = F.pad(joined, (0, width - longest), value=fill)
        batch |= {name: torch.cat([s[name] for s in samples]) for name in self.JOINED if name in samples[0]}
        if "row_indices" in samples[0]:
            batch["row_indices"] = [index for s in samples for index in s["row_indices"]]
        starts = [width * row + (longest - n if left else 0) for row, n in enumerate(lengths)]
        for name in ("vision_at", "speech_at"):
            batch[name] = torch.cat([s[name] + start for s, start in zip(samples, starts, strict=True)])
        batch["answer_at"] = answer_indices(batch["labels"])
        return batch


# ----------------------------------------------------------------------------------------------------------------------
# The grafted model
# ----------------------------------------------------------------------------------------------------------------------


def audio_config_of(config: Qwen2VLConfig) -> WhisperConfig:
    """Geometry of the grafted encoder, from a config of `load_config`."""
    return WhisperConfig(**config.audio_config)


def attend_within_frames(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The vision encoder's attention within each frame, in one sdpa call where all frames have one size.

    Registered with transformers as FRAME_ATTENTION. Its own sdpa path makes a call a frame and layer: 56 ms in place of
    34 for 8 frames on an H100, 283 in place of 201 for 56.

    `query`, `key` and `value` are [1, heads, patches, head size], the frames one behind the other; `cu_seq_lens_q`
    int32 [frames + 1] says where they begin, `max_length_q` how large the largest is. Returns [1, patches, heads, head
    size], and no weights.
    """
    frames, parts = len(cu_seq_lens_q) - 1, (query, key, value)
    if frames * max_length_q == query.shape[2]:
        parts = [x[0].unflatten(1, (frames, max_length_q)).transpose(0, 1) for x in parts]
        mixed = F.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(0, 1)[None]
        return mixed, None
    parts = zip(*(x.split(cu_seq_lens_q.diff().tolist(), dim=2) for x in parts), strict=True)
    mixed = torch.cat([F.scaled_dot_product_attention(*frame, scale=scaling) for frame in parts], dim=2)
    return mixed.transpose(1, 2), None


AttentionInterface.register(FRAME_ATTENTION, attend_within_frames)


@dataclass
class Answer:
    """What `SpeechMixin.answer` returns."""

    text: str
    n_tokens: int  # the stop token included
    stopped: bool  # by a stop token; False: cut off at the limit
    log_probs: dict[str, float] = field(default_factory=dict)  # natural logarithms, of the candidates asked for
    ids: list[int] = field(default_factory=list)  # of the tokens, the stop token included
    # ms, one part after the other: `media` until the last frame is decoded and cut, `first_token` from then on,
    # `decode` of the others (by then all frames are checked too), `candidates`; and the `total`
    ms: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def shares(self) -> dict[str, float]:
        """The probability of each candidate, divided by that of all of them."""
        shares = torch.tensor(list(self.log_probs.values()), dtype=torch.float64).softmax(0)
        return dict(zip(self.log_probs, shares.tolist(), strict=True))


class SpeechMixin:
    """Hearing for a vision-language model of transformers: `audio_encoder.*` and `audio_projector.weight`.
    `<|audio_pad|>` ids stand where the speech goes, as `<|image_pad|>` ids do for the frames, so that ids, token types,
    positions and embeddings have one length and M-RoPE positions come out right. Vision encoder, positions and decoder
    are those of the parent class, which has `model.visual`, `model.language_model` and `lm_head`."""

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch, and accumulation weighs tokens alike
    processor: "VQAProcessor | None" = None  # `load_trained` sets it, and `answer` needs it
    one_question: "OneQuestion | None" = None  # made by the first `answer`

    def __init__(self, config: Qwen2VLConfig):
        super().__init__(config)
        audio = audio_config_of(config)
        audio._attn_implementation = config._attn_implementation
        audio.use_cache = False  # an encoder has none, and transformers warns of it beside checkpointing
        self.audio_encoder = WhisperEncoder(audio)
        self.audio_projector = nn.Linear(audio.d_model, config.text_config.hidden_size, bias=False)
        # `grow_embeddings` may add rows, which no file holds.
        self.stored_vocab_size = config.text_config.vocab_size
        self.before_quantising: dict[str, torch.Tensor] = {}  # `samples_of` weights that are now in 4 bits
        self.trains_vision, self.trains_audio = False, False  # whether the encoders are trained: see `add_lora`
        self.post_init()

    def train(self, mode: bool = True) -> "SpeechMixin":
        """That of torch, but frozen encoders stay in evaluation mode. A model in training mode is left as it is: the
        Trainer asks at each batch, and setting all 3,027 modules of the full size takes 15 ms, for which the GPU would
        wait."""
        if mode and self.training:
            return self
        super().train(mode)
        self.model.visual.train(mode and self.trains_vision)
        self.audio_encoder.train(mode and self.trains_audio)
        return self

    def encode_vision(self, pixel_values: torch.Tensor, grid: torch.Tensor | None, **layout) -> torch.Tensor:
        """What the vision encoder makes of patches, uint8 or scaled, and their grid int64 [n, 3]: [tokens, hidden]. The
        `layout` (`position_ids`, `cu_seqlens`, `max_seqlen`) is computed from the grid, unless it is given."""
        visual = self.model.visual
        vision = self.config.vision_config
        if pixel_values.dtype == torch.uint8:
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixel_values = scale_pixels(pixel_values, width, visual.dtype)
        if not layout and (grid == grid[0]).all():  # transformers would lay out one frame after the other
            positions = get_vision_position_ids(grid[:1], vision.spatial_merge_size).repeat(len(grid), 1)
            layout = {"position_ids": positions}
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            return visual(pixel_values.to(visual.dtype), grid_thw=grid, **layout).pooler_output

    def encode_audio(self, input_features: torch.Tensor, audio_lengths: torch.Tensor | None) -> torch.Tensor:
        """What the speech encoder makes of speech [B, mel, frames]: the first `audio_lengths` int64 [B] outputs of
        each (None: all), one speech after the other, [tokens, d_audio]."""
        encoder = self.audio_encoder
        with torch.set_grad_enabled(self.trains_audio and torch.is_grad_enabled()):
            outputs = encoder(input_features.to(encoder.dtype)).last_hidden_state
        if audio_lengths is None:
            return outputs.flatten(0, 1)
        return outputs[torch.arange(outputs.shape[1], device=outputs.device) < audio_lengths[:, None]]

    def offload_encoders(self) -> None:
        """Take both encoders off the GPU (2.4 GiB at full size), for when all that comes are features."""
        self.model.visual.to("cpu")
        self.audio_encoder.to("cpu")
        torch.cuda.empty_cache()  # which does nothing without a GPU

    def embed(
        self,
        input_ids: torch.Tensor,
        vision: torch.Tensor | None,
        speech: torch.Tensor | None,
        vision_at: torch.Tensor | None = None,
        speech_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, T, hidden] of `input_ids` [B, T] with the encoders' outputs on their placeholders. `vision`
        [tokens, hidden] and `speech` [tokens, d_audio] go to `vision_at` and `speech_at` int64 [tokens], indices into
        the flattened batch from `VQACollator`. None: looked for, for which the CPU waits until the GPU has done all
        that it was given. ValueError where placeholders and outputs differ in number."""
        embeds = self.get_input_embeddings()(input_ids)
        config = self.config
        media = []
        if vision is not None:
            media.append(("vision", vision, vision_at, [config.image_token_id, config.video_token_id]))
        if speech is not None:
            projector = self.audio_projector
            media.append(("speech", projector(speech.to(projector.weight.dtype)), speech_at, [config.audio_token_id]))
        width = input_ids.shape[1]
        for kind, features, indices, ids in media:
            if indices is None:
                indices = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).flatten().nonzero()[:, 0]
            if len(indices) != len(features):
                raise ValueError(f"{len(indices)} {kind} placeholders but {len(features)} {kind} features")
            # Not into a flattened view, whose base torch.compile would guard: the first layer would be compiled twice.
            embeds = embeds.index_put((indices // width, indices % width), features.to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        speech_features: torch.Tensor | None = None,
        vision_at: torch.Tensor | None = None,
        speech_at: torch.Tensor | None = None,
        answer_at: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        inputs_embeds: None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """With `labels`: the loss alone, its logits built at answer positions only. Without: logits for generation.

        What `VQACollator` makes comes in as it is. `vision_features` and `speech_features` are outputs of
        `encode_vision` and `encode_audio` along the batch, in place of pixels and mel. `logits_to_keep` is as in
        `pick_positions`, `num_items_in_batch` the labels in the accumulated batch, which the loss is divided by (None:
        those of this one). `inputs_embeds` is always None (PEFT passes it). `generate` looks for names in this
        signature.
        """
        if pixel_values is not None:
            grid = image_grid_thw if video_grid_thw is None else video_grid_thw
            vision_features = self.encode_vision(pixel_values, grid)
        if input_features is not None:
            speech_features = self.encode_audio(input_features, audio_lengths)
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=self.embed(input_ids, vision_features, speech_features, vision_at, speech_at),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is None:
            logits = self.lm_head(pick_positions(hidden, logits_to_keep))
            return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
        if answer_at is None:
            answer_at = answer_indices(labels)
        logits = self.lm_head(hidden.flatten(0, 1)[answer_at]).float()
        total = F.cross_entropy(logits, labels.flatten()[answer_at + 1], reduction="sum")
        count = len(answer_at) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    @torch.inference_mode()
    def answer(
        self,
        frames: Sequence[Image.Image | str | Path | tuple],
        speech: np.ndarray | str | Path | None = None,
        question: str | None = None,
        max_new_tokens: int = 64,
        candidates: Sequence[str] = (),
    ) -> Answer:
        """Answer one question about a clip, spoken or in words, greedily.

        All `frames` (in order in time: files, RGB images, or what `read_media` gives) are shown, scaled down to the
        size that training had. `speech` is a file, or float32 [n] at 16 kHz from `load_speech`; without it the
        `question` in words is asked; with both, both. Answers are cut off at `max_new_tokens` (evaluate_checkpoint.py:
        32). Of `candidates` the log-probability, stop token included, is computed as well. VQAError for neither speech
        nor question, no frame, files that cannot be decoded, and speech longer than the encoder's window.

        Files are decoded in threads, and the speech is encoded meanwhile. On a GPU everything runs as CUDA graphs (see
        `OneQuestion`), so that the weights must stay where they are after the first question.
        """
        if speech is None and question is None:
            raise VQAError("answer() needs speech, a question in words, or both")
        if not frames:
            raise VQAError("answer() needs at least one frame")
        times = [time.perf_counter()]
        processor = self.processor.with_mode(
            "text" if speech is None else "audio" if question is None else "audio_text"
        )
        single = self.one_question = self.one_question or OneQuestion(self)

        on_gpu, heard, tokens = self.device.type == "cuda", None, 0
        media = read_media(processor, frames, speech, self.device)
        if speech is not None:
            mel, tokens = next(media)
            heard = single.hear(mel)[:tokens]
        cut = [single.cut(*frame) if on_gpu else frame for frame in itertools.islice(media, len(frames))]
        pixels, grid = processor.patches_of(cut, "given to answer()")
        times.append(time.perf_counter())
        seen = single.see(pixels, grid)
        counts = (grid.prod(-1) // processor.merge_size**2).tolist()
        sample = processor.build(question or "", counts, int(tokens), None)
        sample["position_ids"] = mrope_positions(sample["mm_token_type_ids"], grid, processor.merge_size)
        spoken = [processor.text_ids("", candidate)[-1] for candidate in candidates]
        if behind := len(processor.tokenize(processor.layout.after_answer)):  # the stop token ends an answer
            spoken = [ids[:-behind] for ids in spoken]
        ids = [single.read(sample, seen, heard, max(max_new_tokens, sum(map(len, spoken))))]
        times.append(time.perf_counter())
        stops = stop_token_ids(processor.tokenizer)
        while len(ids) < max_new_tokens and ids[-1] not in stops:
            ids.append(single.next())
        list(media)  # a damaged frame is an error
        times.append(time.perf_counter())
        log_probs = dict(zip(candidates, single.score(spoken), strict=True)) if candidates else {}
        times.append(time.perf_counter())
        ms = [1000 * (after - before) for before, after in itertools.pairwise(times)]
        parts = dict(zip(("media", "first_token", "decode", "candidates"), ms, strict=True), total=sum(ms))
        text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, len(ids), ids[-1] in stops, log_probs, ids, parts)

    def warm_up(self, frames: Sequence, max_new_tokens: int = 64, compile_layers: bool = True) -> None:
        """Ask about `frames` with speech of each length that makes another prompt, so that no later question about
        frames of this size and number waits for a CUDA graph; says so in a line. `compile_layers`: an answer takes a
        fifth less time, this half a minute more; it needs what `check_compiler` looks for. Without a GPU there are no
        graphs."""
        if self.device.type != "cuda":
            return
        start, processor = time.perf_counter(), self.processor
        self.one_question = self.one_question or OneQuestion(self)
        if compile_layers:
            self.one_question.compile()
        Image.core.set_blocks_max(4 * MAX_WORKERS)  # Pillow keeps the memory of decoded frames for the next ones
        longest, words = processor.encoder_tokens, None if processor.input_mode == "audio" else "?"
        tokens = [longest] if processor.audio_tokens == "full" else range(1, longest + PROMPT_BUCKET, PROMPT_BUCKET)
        spoken = [np.ones(min(n, longest) * SAMPLES_PER_TOKEN, np.float32) for n in tokens]
        spoken = [None] if processor.input_mode == "text" else spoken
        print(f"   Warming up for {len(spoken)} lengths of prompts ...", end="", flush=True)
        for speech in spoken:
            self.answer(frames, speech, words, max_new_tokens)
        print(f" {time.perf_counter() - start:.0f} s", flush=True)


def attend_to_one_question(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    places: torch.Tensor,
    seen: int = 0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The decoder's attention for `OneQuestion`, whatever kernel the model has otherwise. Registered with transformers
    as QUESTION_ATTENTION. Keeps keys and values [1, key heads, n, head size] of new tokens at `places`, int64 [n], of
    the module's float32 `question_keys` and `question_values`. A prompt attends to itself, causally; under a mask bool
    [1, 1, n, seen] new tokens attend to the first `seen` that are kept, a multiple of KEYS_BLOCK. A flash kernel would
    go through the keys of a head on one of the GPU's processors; so these are products, in float32, and the query heads
    that share a key head are further queries of one head.

    `query` is [1, heads, n, head size]. Returns [1, n, heads, head size], and no weights.
    """
    module.question_keys.index_copy_(2, places, key.float())
    module.question_values.index_copy_(2, places, value.float())
    if attention_mask is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None
    keys, values = (kept[:, :, :seen] for kept in (module.question_keys, module.question_values))
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).float()  # [1, key heads, shared * n, head size]
    scores = (grouped @ keys.transpose(2, 3) * scaling).unflatten(2, (-1, query.shape[2]))
    weights = scores.masked_fill(~attention_mask[:, :, None], -math.inf).softmax(-1).flatten(2, 3)
    blocks = weights.unflatten(3, (-1, KEYS_BLOCK)).transpose(2, 3), values.unflatten(2, (-1, KEYS_BLOCK))
    mixed = torch.matmul(*blocks).sum(2)  # a sum of products, each of which has a block of the keys
    return mixed.reshape(query.shape).transpose(1, 2).to(query.dtype), None


AttentionInterface.register(QUESTION_ATTENTION, attend_to_one_question)


class OneQuestion:
    """The parts of `SpeechMixin.answer` that a GPU computes, on buffers that stay where they are, so that each can be a
    CUDA graph: one launch in place of some thousand, for which a GPU that works on one question would wait. After
    `compile`, the layers of decoder and vision encoder are compiled in these graphs."""

    def __init__(self, model: SpeechMixin):
        self.model, self.graphs, self.compiled = model, {}, {}
        self.length = self.position = self.width = 0  # of the prompt; behind it; the keys that a token may attend to
        self.state = self.logits = None  # see `step`; behind the prompt, [vocabulary]

    def reserve(self) -> None:
        """Have room for `width` keys and values, and for those of the longest speech, so that it need not grow."""
        # They are on the modules: so one compiled form serves all layers.
        modules = [layer.self_attn for layer in self.model.model.language_model.layers]
        if hasattr(modules[0], "question_keys") and modules[0].question_keys.shape[2] >= self.width:
            return
        text = self.model.config.text_config
        room = self.width + self.model.processor.encoder_tokens
        shape = 1, text.num_key_value_heads, room, text.hidden_size // text.num_attention_heads
        self.graphs.clear()
        for module in modules:
            module.question_keys = torch.zeros(shape, device=self.model.device)
            module.question_values = torch.zeros_like(module.question_keys)

    def compile(self) -> None:
        """Let graphs that are captured from now on have compiled layers, which fuse what lies between the products of
        matrices. Frames have one form, prompts of all lengths one, and a token one."""
        if not self.compiled:
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # it advises a coarser float32
            self.graphs.clear()
            layers = *self.model.model.visual.blocks, *self.model.model.language_model.layers
            self.compiled = {layer: compiled_forward(layer) for layer in layers}

    def replay(self, function: typing.Callable, *args):
        """`function(*args)`, on a GPU as a CUDA graph, captured for each shape of the tensors and each value of other
        `args`. The next replay, of whatever function, may write over the result: all share one pool of memory."""
        if self.model.device.type != "cuda":
            with layers_as(self.model, self.compiled):
                return function(*args)
        key = function, *((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        if key not in self.graphs:
            fixed = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            graph, pool = torch.cuda.CUDAGraph(), next((kept[0].pool() for kept in self.graphs.values()), None)
            with layers_as(self.model, self.compiled):
                function(*fixed)  # kernels are loaded and chosen at their first use
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    result = function(*fixed)
            self.graphs[key] = graph, fixed, result
        graph, fixed, result = self.graphs[key]
        for buffer, given in zip(fixed, args, strict=True):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(given, non_blocking=True)
        graph.replay()
        return result

    def hear(self, mel: torch.Tensor) -> torch.Tensor:
        """All outputs of the speech encoder, [tokens, d_audio], of a mel [1, bins, frames]."""
        heard = self.replay(self.model.encode_audio, *on_device({"mel": mel}, self.model.device).values(), None)
        return heard.clone()  # the frames' replay comes before it is read

    def cut(self, pixels: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """`VQAProcessor.cut_patches` of a frame of `size` (width, height) that `read_media` read for a GPU."""
        processor, device = self.model.processor, self.model.device
        once = fit_size(size, processor.max_image_size)
        whole = processor.patched_size(once)
        sides = [side / by for side, by in zip(size, reduction(size, once), strict=True)]
        weights = [bicubic_weights(*at, device) for at in zip(sides, pixels.shape[1::-1], once, strict=True)]
        weights += [bicubic_weights(*at, device) for at in zip(once, once, whole, strict=True)]
        patches, grid = self.replay(self.scale, pixels.to(device, non_blocking=True), *weights)
        return patches.clone(), grid

    def scale(self, pixels: torch.Tensor, *weights: torch.Tensor | None) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches and grid of what `copy_pixels` gave, scaled twice: to the size of training, then to whole patches."""
        frame = resize_on_device(pixels[..., :3], *weights[:2])
        return self.model.processor.lay_out(resize_on_device(frame, *weights[2:]))

    def see(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """What the vision encoder makes of patches and their grid. Frames of several sizes take no graph, nor do
        attention kernels that read the grid."""
        model, device = self.model, self.model.device
        config = model.model.visual.config
        if config._attn_implementation != FRAME_ATTENTION or (grid != grid[0]).any():
            return model.encode_vision(pixels.to(device), grid.to(device))
        positions = get_vision_position_ids(grid[:1], config.spatial_merge_size).repeat(len(grid), 1)
        seqlens, longest = get_vision_attention_seqlens(grid, config)
        layout = on_device({"positions": positions, "seqlens": seqlens}, device)
        return self.replay(self.encode, pixels.to(device), *layout.values(), longest)

    def encode(
        self, pixels: torch.Tensor, positions: torch.Tensor, seqlens: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """`encode_vision`, which need not look at the grid."""
        return self.model.encode_vision(pixels, None, position_ids=positions, cu_seqlens=seqlens, max_seqlen=longest)

    def decode(self, embeds: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, seen=0, mask=None):
        """The decoder's outputs [1, n, hidden] of new tokens: see `attend_to_one_question`."""
        decoder = self.model.model.language_model
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation(QUESTION_ATTENTION)
        try:
            return decoder(
                inputs_embeds=embeds,
                attention_mask={"full_attention": mask},
                position_ids=positions,
                use_cache=False,
                places=places,
                seen=seen,
            ).last_hidden_state
        finally:
            decoder.set_attn_implementation(before)

    def prefill(self, embeds: torch.Tensor, positions: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Read a prompt, padded on the right, where causal attention never meets the padding. `state`: see `step`.
        Returns it with the first token, and the logits of that."""
        hidden = self.decode(embeds, positions, torch.arange(embeds.shape[1], device=embeds.device))
        logits = self.model.lm_head(hidden[:, state[1:2] - 1])[0]
        return torch.cat([logits.argmax(-1), state[1:]]), logits[0]

    def step(self, state: torch.Tensor, seen: int) -> torch.Tensor:
        """Read a token. `state` int64 [3] is the token, its place among the keys, its position. Returns the next."""
        token, place, position = state.split(1)
        mask = (torch.arange(seen, device=state.device) <= place).view(1, 1, 1, seen)
        embeds = self.model.get_input_embeddings()(token[None])
        hidden = self.decode(embeds, position.expand(3, 1, 1), place, seen, mask)
        return torch.cat([self.model.lm_head(hidden)[0].argmax(-1), place + 1, position + 1])

    def read(self, sample: dict, vision: torch.Tensor, speech: torch.Tensor | None, room: int) -> int:
        """Read the prompt of `sample` (`build`, with `position_ids`) with the encoders' outputs, and have room for the
        keys of `room` tokens behind it. Returns the first token of the answer."""
        model, pad_token_id = self.model, self.model.processor.tokenizer.pad_token_id
        self.length, self.position = len(sample["input_ids"]), int(sample["position_ids"][-1, 0]) + 1
        self.width = math.ceil((self.length + room) / KEYS_BUCKET) * KEYS_BUCKET
        self.reserve()
        batch = VQACollator(pad_token_id, multiple=PROMPT_BUCKET)([sample])
        batch["state"] = torch.tensor([0, self.length, self.position])
        batch = on_device(batch, model.device)
        embeds = model.embed(batch["input_ids"], vision, speech, batch["vision_at"], batch["speech_at"])
        self.state, logits = self.replay(self.prefill, embeds, batch["position_ids"], batch["state"])
        self.logits = logits.clone()  # `score` reads it after the replays of `next`
        return int(self.state[0])

    def next(self) -> int:
        """Read the last token; returns the next one."""
        self.state = self.replay(self.step, self.state, self.width)
        return int(self.state[0])

    def score(self, candidates: Sequence[list[int]]) -> list[float]:
        """Log-probability of each of `candidates` behind the prompt that was read last; all in one pass, each of whose
        tokens attends to the prompt and to its own candidate."""
        lengths, device = [len(ids) for ids in candidates], self.model.device
        ids = torch.tensor([token for ids in candidates for token in ids], device=device)
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        own = (owner[:, None] == owner).tril()
        mask = F.pad(F.pad(own, (self.length, 0), value=True), (0, self.width - self.length - len(ids))).to(device)
        places, positions = torch.arange(len(ids)) + self.length, own.sum(-1) - 1 + self.position
        embeds = self.model.get_input_embeddings()(ids[None])
        positions = positions.expand(3, 1, -1).to(device)
        hidden = self.decode(embeds, positions, places.to(device), self.width, mask[None, None])[0]
        logits = torch.cat([self.logits[None], self.model.lm_head(hidden)]).float().log_softmax(-1)
        starts = [end - length for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
        before = torch.arange(len(ids))  # row i + 1 of `logits` is behind token i; the first token is behind the prompt
        before[starts] = 0
        found = logits[before.to(device), ids].split(lengths)
        return [part.sum().item() for part in found]


class SurgicalVQAModel(SpeechMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with the encoder of a Whisper."""


# `model_type` of a config.json -> the class that computes it: a sister of Qwen2-VL takes a class of one line and a row.
MODEL_CLASSES = {"qwen2_vl": SurgicalVQAModel}


def pick_positions(hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """[B, n, hidden] of [B, T, hidden]: the last `keep` positions (0: all), those [n], or those of each row [B, n]."""
    if isinstance(keep, int):
        return hidden[:, -keep:]
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], keep] if keep.ndim == 2 else hidden[:, keep]


def answer_indices(labels: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the indices into the flattened batch of `labels` [B, T] whose next token is learned."""
    return (F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX).flatten().nonzero()[:, 0]


def set_recomputation(model: SpeechMixin, every_n: int) -> None:
    """Recompute every `every_n`-th layer of the decoder and of trained encoders in the backward pass; 0: none. Layers
    of frozen encoders take the setting without effect: they are in evaluation mode. transformers 5.17 knows no
    `every_n_layers` yet."""
    for layers in (model.model.language_model.layers, model.model.visual.blocks, model.audio_encoder.layers):
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = every_n > 0 and index % every_n == 0
            layer._gradient_checkpointing_func = RECOMPUTE


def compiled_forward(layer: nn.Module) -> typing.Callable:
    """The `forward` of a layer, compiled: all layers of a model have one form, so that one compilation serves them, and
    all lengths (a batch of one sample, a single token, and evaluation take one more each). What cannot be compiled is
    an error. In place of `layer.compile()`, which would take checkpointing around the layer into the graph."""
    torch._dynamo.config.specialize_float = True  # else a layer is traced twice, and the trace not kept on disk
    # The plain forward: some versions of transformers wrap their own checkpointing around it.
    plain = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
    return torch.compile(plain.__get__(layer), dynamic=True, fullgraph=True)


def compile_decoder(model: SpeechMixin) -> None:
    """Compile the decoder's layers for training; after `set_recomputation`. Gain at full size: 1.38 x, and 0.7 x the
    memory (docs/PERFORMANCE.md)."""
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
    torch._dynamo.config.optimize_ddp = False  # it would cut a layer at DDP's buckets, and then keep more activations
    for layer in model.model.language_model.layers:
        layer.forward = compiled_forward(layer)
        if layer.gradient_checkpointing:
            layer.forward = partial(RECOMPUTE, layer.forward)
            layer.gradient_checkpointing = False


@contextlib.contextmanager
def layers_as(model: SpeechMixin, forwards: dict[nn.Module, typing.Callable] | None = None) -> Iterator[None]:
    """Let layers run these in place of their `forward`. The decoder's others run uncompiled: with a cache of
    transformers each of them would have to be compiled by itself."""
    forwards = forwards or {}
    layers = *model.model.language_model.layers, *forwards
    before = {layer: vars(layer).pop("forward", None) for layer in layers}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def use_liger(model: SpeechMixin) -> None:
    """Let Liger's kernels compute the decoder's RMSNorm and SwiGLU, of this model alone; no weight changes. Replaced on
    the modules: Liger's own patch replaces the model's `forward`, and with it the speech. Gain at full size: a step
    takes 10 % less time (docs/PERFORMANCE.md). Only for hidden_act `silu`."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction

    decoder = model.model.language_model

    # No offset; rounded where Qwen2-VL's own norm is; only linear layers read its output, so gradients go in place.
    def norm(module, x):
        return LigerRMSNormFunction.apply(x, module.weight, module.variance_epsilon, 0.0, "llama", True, None)

    def mlp(module, x):
        return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x), 1.0, 1.0))

    decoder.norm.forward = norm.__get__(decoder.norm)
    for layer in decoder.layers:
        layer.mlp.forward = mlp.__get__(layer.mlp)
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.forward = norm.__get__(module)


def answer_batch(
    model: SpeechMixin, samples: Iterable[dict], pad_token_id: int, stop_ids: Sequence[int], max_new_tokens: int
) -> list[tuple[list[int], str]]:
    """Greedy answers of any number of samples: per row the new ids, stop token included, and `eos` or `length`. Prefill
    goes by groups (`prefill`), then all rows decode together, one token a step. Written out because `generate` prefills
    all rows at once, under a mask that keeps sdpa from its fast kernels: 5.74 answers/s in place of 7.87 on one H100,
    and 4 GiB more (docs/PERFORMANCE.md)."""
    with torch.inference_mode():
        lengths, ids, positions, layers = prefill(model, samples, pad_token_id)
        if not lengths:
            return []
        cache = DynamicCache()
        for index in range(len(layers)):
            cache.update(*layers[index], index)
            layers[index] = None  # freed, so that one layer at a time is there twice
        width = max(lengths)
        mask = None
        if min(lengths) < width:
            starts = width - torch.tensor(lengths, device=ids.device)
            mask = (torch.arange(width, device=ids.device) >= starts[:, None]).long()
        stops = torch.tensor(list(stop_ids), dtype=ids.dtype, device=ids.device)
        ended = torch.isin(ids, stops)
        produced = [ids]
        while len(produced) < max_new_tokens and not ended.all():
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                input_ids=ids[:, None],
                attention_mask=mask,
                position_ids=positions.expand(3, -1)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            ids = output.logits[:, -1].argmax(-1)
            positions = positions + 1
            ended |= torch.isin(ids, stops)
            produced.append(ids)
    answers = []
    for ids in torch.stack(produced, dim=1).tolist():
        end = next((index for index, token in enumerate(ids) if token in stop_ids), None)
        answers.append((ids, "length") if end is None else (ids[: end + 1], "eos"))
    return answers


def prefill(
    model: SpeechMixin, samples: Iterable[dict], pad_token_id: int
) -> tuple[list[int], torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Compute the keys and values of prompts, in groups of at most PREFILL_TOKENS with their padding. Padding is on the
    right, where causal attention never meets it, so that no mask is needed; then the keys and values of each row are
    moved to end where those of the longest end. Returns the tokens of each prompt; the first token of each answer and
    its position, int64 [B]; per layer keys and values [B, heads, longest prompt, head size], 0 in front."""
    collate = VQACollator(pad_token_id)
    device = model.get_input_embeddings().weight.device  # with cached features the encoders are elsewhere
    lengths, first, positions, caches = [], [], [], []
    for group in grouped(samples):
        batch = collate(group)
        last = torch.tensor([[len(sample["input_ids"]) - 1] for sample in group])
        grids = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch}
        # On the CPU, where reading the ids does not wait for the group before.
        rope, _ = model.model.get_rope_index(batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], **grids)
        inputs = on_device({**batch, "position_ids": rope, "logits_to_keep": last}, device)
        output = model(**inputs, past_key_values=DynamicCache(), use_cache=True)
        lengths += (last[:, 0] + 1).tolist()
        first.append(output.logits[:, 0].argmax(-1))
        positions.append(rope[0].gather(1, last)[:, 0] + 1)  # a prompt ends in words: its three positions are one
        caches.append([(layer.keys, layer.values) for layer in output.past_key_values.layers])
        del output
    if not lengths:
        return [], None, None, []

    def aligned(layer: int, side: int) -> torch.Tensor:
        parts = [group[layer][side] for group in caches]
        width = max(lengths)
        if min(lengths) == width:
            return torch.cat(parts)
        rows = zip(lengths, (row for part in parts for row in part), strict=True)
        return torch.stack([F.pad(row[:, :length], (0, 0, width - length, 0)) for length, row in rows])

    layers = []
    for layer in range(len(caches[0])):
        layers.append((aligned(layer, 0), aligned(layer, 1)))
        for group in caches:
            group[layer] = None  # freed, so that one layer at a time is there twice
    return lengths, torch.cat(first), torch.cat(positions).to(device), layers


def grouped(samples: Iterable[dict]) -> Iterator[list[dict]]:
    """Samples in lists, in order, each of at most PREFILL_TOKENS when padded to its longest, or of one sample."""
    group: list[dict] = []
    for sample in samples:
        longest = max(len(other["input_ids"]) for other in (*group, sample))
        if group and longest * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def on_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a collated batch that the model takes, on `device`."""
    tensors = {name: tensor for name, tensor in batch.items() if name not in ("labels", "row_indices")}
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def answer_with_halving(
    samples: Iterator[dict], size: int, may_halve: bool, answer: typing.Callable[[Iterable[dict]], list]
) -> tuple[list, int]:
    """Answers of `samples`, `size` at a time; with `may_halve` in halves where torch is out of memory. Returns the
    answers, and the size that fitted. Raises torch.OutOfMemoryError where halving is over or not wanted."""
    answers = []
    while True:
        samples, attempt = itertools.tee(samples)  # what fails is gone through again
        try:
            batch = answer(itertools.islice(attempt, size))
        except torch.OutOfMemoryError:
            if not may_halve or size == 1:
                raise
            batch = None
        if batch is None:  # out of the handler, which holds on to the tensors of the failed batch
            size = math.ceil(size / 2)
            torch.cuda.empty_cache()
            print(f"   The GPU memory is full: continuing with batches of {size}", flush=True)
        elif batch:
            answers += batch
            next(itertools.islice(samples, len(batch) - 1, None))  # goes past the samples of the batch
        else:
            return answers, size


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer, model and LoRA loaders
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSettings:
    """The section `model` of SETTINGS_FILE: which base was trained, and how it came about."""

    model_name_or_path: str
    init: str = "pretrained"
    init_seed: int = 42
    init_device: str | None = None  # device type that random weights are drawn on. None: any
    dtype: str = "bfloat16"  # of the computation in training
    attn_implementation: str = "sdpa"
    audio_encoder: str | None = None
    load_in_4bit: bool = False
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class InputSettings:
    """The section `input` of SETTINGS_FILE: what the model gets of a row."""

    input_mode: str = "audio"
    max_train_frames: int | None = None
    max_eval_frames: int | None = 6
    max_image_size: int = 384
    audio_tokens: str = "full"
    encoder_tokens: int | None = None  # outputs of the speech encoder for a full window
    frame_mode: str = "images"
    instruction: str = INSTRUCTION
    prompt_layout: str = "plain"


def from_stored(kind: type, stored: dict):
    """A settings dataclass from its section of SETTINGS_FILE; fields that it does not have are ignored."""
    return kind(**{f.name: stored[f.name] for f in fields(kind) if f.name in stored})


def read_config(path: Path, kind: str = "config", advice: str = "name a folder with a model") -> dict:
    """A JSON file of a model folder; VQAError where it cannot be read, or asks for code to be fetched and run."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise VQAError(f"{path}: no readable {kind} ({error}); {advice}") from error
    if stored.get("auto_map"):
        raise VQAError(
            f"{path}: its field auto_map asks for Python code from the model's author ({stored['auto_map']}), and this "
            "script runs none; remove the field if the model is a plain Qwen2-VL"
        )
    return stored


def load_settings(checkpoint: str | Path) -> dict:
    """The settings saved beside an adapter; VQAError where there are none, or of another kind."""
    path = Path(checkpoint) / SETTINGS_FILE
    advice = "name a folder that train_vqa.py wrote"
    settings = read_config(path, "settings", advice)
    needed = {"model": {"model_name_or_path", "init", "init_seed"}, "input": {"input_mode"}}
    for part in ("model", "input", "trained", "lora", "training", "data"):
        section = settings.get(part, {})
        if not isinstance(section, dict) or needed.get(part, set()) - section.keys():
            raise VQAError(f"{path}: no readable settings (section {part}); {advice}")
    for part, kind in (("model", ModelSettings), ("input", InputSettings)):
        for name, wanted in typing.get_type_hints(kind).items():
            if not isinstance(settings[part].get(name, getattr(kind, name, "")), wanted):
                raise VQAError(f"{path}: {part}.{name} is {settings[part][name]!r:.80}; {advice}")
    return settings


def resolve_model_dir(name: str | Path, weights: bool = False, flag_name: str = "--model_name_or_path") -> Path:
    """The folder of a model or adapter: `name` itself, or the snapshot of a hub id, which may end in @REVISION (config
    and tokenizer; `weights` if asked), from the cache without a network. VQAError, which names `flag_name`, where it
    is neither a folder nor a hub id that can be fetched."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.jinja", DIGESTS_FILE]
    patterns += ["model.safetensors", "model-*.safetensors", "adapter_model.safetensors"] * weights
    repo, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*"))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise VQAError(
            f"{flag_name} {name}: no such folder, and not to be had from the hub ({first_line(error)}); "
            "name a folder with the model, or connect to the hub"
        ) from error


def hub_origin(folder: str | Path) -> dict[str, str]:
    """`hub_id` and `revision` (a commit) of a folder of the cache of downloads; {} for any other folder."""
    *_, repo, kind, revision = ("", "", *Path(folder).absolute().parts)
    if kind != "snapshots" or not repo.startswith("models--"):
        return {}
    return {"hub_id": repo.removeprefix("models--").replace("--", "/"), "revision": revision}


def load_config(model_name_or_path: str | Path) -> Qwen2VLConfig:
    """The model's config, with an `audio_config`; VQAError where there is none or its model is not supported."""
    path = resolve_model_dir(model_name_or_path) / "config.json"
    stored = read_config(path)
    if stored.get("model_type") not in list(MODEL_CLASSES):
        known = ", ".join(map(repr, MODEL_CLASSES))
        raise VQAError(f"{path}: model_type is {stored.get('model_type')!r}, this script trains {known}")
    quantization = stored.get("quantization_config") or {}
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes":
        raise VQAError(f"{path}: quantization_config says {method!r}; this script reads 16 bits and bitsandbytes' 4")
    try:
        config = MODEL_CLASSES[stored["model_type"]].config_class.from_pretrained(path.parent)
    except Exception as error:  # whatever a value of the wrong kind runs into in there
        reason = " ".join(str(error).split())
        raise VQAError(f"{path}: a field has a value that Qwen2-VL does not take ({reason}); copy it again") from error
    config.audio_config = getattr(config, "audio_config", None) or WHISPER_LARGE_V3_TURBO
    config.__dict__.pop("quantization_config", None)  # the keys say which weights are in 4 bits: `read_model`
    return config


def load_tokenizer(model_name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token apart from EOS and with `<|audio_pad|>`; says so where it sets a pad token. With
    PAD equal to EOS a mask by id hides the end of the answer, and a model is never taught to stop."""
    path = resolve_model_dir(model_name_or_path)
    if (path / "tokenizer_config.json").is_file():
        read_config(path / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise VQAError(f"{path}: no readable tokenizer ({reason}); its tokenizer.json belongs there") from error
    if AUDIO_PAD not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_PAD]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        print("🔧 Setting dedicated pad token (was same as EOS)" if tokenizer.pad_token_id is not None else
              "🔧 Setting dedicated pad token (there was none)")  # fmt: skip
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        print(f"   PAD token: {tokenizer.pad_token!r} (ID: {tokenizer.pad_token_id})")
        print(f"   EOS token: {tokenizer.eos_token!r} (ID: {tokenizer.eos_token_id})")
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer, sorted: `<|im_end|>`, `<|endoftext|>` and the tokenizer's EOS."""
    vocab = tokenizer.get_vocab()
    return sorted({vocab[token] for token in (*STOP_TOKENS, tokenizer.eos_token) if token in vocab})


def grow_embeddings(model: SpeechMixin, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add embedding and head rows for ids that have none; never shrink. New rows are the mean of the old ones, and are
    never trained, so that every load makes the same ones."""
    rows = model.get_input_embeddings().num_embeddings
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix.data[rows:] = matrix.data[:rows].mean(dim=0)


def load_model(
    model_name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    init: str = "pretrained",
    seed: int = 42,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    audio_encoder: str | Path | None = None,
    load_in_4bit: bool = False,
    allow_pickle: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> SpeechMixin:
    """The base model of a folder or hub id, frozen, in evaluation mode, with a row for every token id of `tokenizer`.

    `init` is `pretrained`, or `random` for weights drawn from `seed` on `device` in `dtype` (other devices and dtypes
    draw other numbers, which `fingerprint` shows); `seed` also draws the projector beside a newly grafted Whisper
    encoder. The device `meta` allocates nothing, and checks names and shapes of the 16-bit weights of a folder.
    `allow_pickle` reads pickled weights where there are no safetensors. `compute_dtype` is that of autocast (None:
    `dtype`). VQAError for no weights, or missing, unexpected or mis-shaped tensors.
    """
    check_attention(attn_implementation, compute_dtype or dtype)
    config = load_config(model_name_or_path)
    device = torch.device(device)
    audio_id = tokenizer.convert_tokens_to_ids(AUDIO_PAD)
    if (getattr(config, "audio_token_id", None) or audio_id) != audio_id:
        raise VQAError(
            f"{model_name_or_path}: config.json says audio_token_id {config.audio_token_id}, the tokenizer has "
            f"{AUDIO_PAD} as {audio_id}; tokenizer and config must belong together"
        )
    config.audio_token_id = audio_id
    if audio_encoder:
        config.audio_config = whisper_geometry(audio_encoder)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    random_weights = init == "random"
    on_meta = device.type == "meta"
    folder = resolve_model_dir(model_name_or_path, weights=not (random_weights or on_meta))
    if not random_weights and (not on_meta or Path(model_name_or_path).is_dir()):  # a hub id's may be still to fetch
        model = read_model(folder, config, device, audio_encoder, load_in_4bit, allow_pickle, **options)
    else:
        model = draw_model(config, seed, device, load_in_4bit, **options)
    if audio_encoder and not (random_weights or on_meta):
        graft_encoder(model, audio_encoder, allow_pickle, seed)
    if attn_implementation == "sdpa":
        model.set_attn_implementation({"vision_config": FRAME_ATTENTION})
    grow_embeddings(model, tokenizer)
    # Nothing of the folder's own, such as a penalty of repetition: answers are greedy.
    model.generation_config = GenerationConfig(
        eos_token_id=stop_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    return model.requires_grad_(False).eval()


def draw_model(config: Qwen2VLConfig, seed: int, device: torch.device, load_in_4bit: bool, **options) -> SpeechMixin:
    """A model with random weights; in 4 bits it goes through a temporary folder, as large as the model."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:  # of no other GPU
        torch.manual_seed(seed)
        model = MODEL_CLASSES[config.model_type]._from_config(config, **options)
    if not load_in_4bit or device.type == "meta":
        return model
    with tempfile.TemporaryDirectory() as drawn:
        write_weights(model, Path(drawn))
        model.config.save_pretrained(drawn)
        model.to("meta")  # two models at a time may not fit
        return read_model(Path(drawn), config, device, None, True, False, **options)


def check_attention(name: str, dtype: torch.dtype) -> None:
    """VQAError where the attention kernel `name` is not supported, or cannot run here in `dtype`."""
    if name not in ATTENTION_KERNELS:  # transformers would fetch other names from the hub, and run them
        raise VQAError(f"--attn_implementation must be one of {', '.join(ATTENTION_KERNELS)}, not {name!r}")
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise VQAError(
            "--attn_implementation flash_attention_2 needs a CUDA GPU and the flash-attn package: run `pip install "
            "flash-attn --no-build-isolation`, or leave the flag out (sdpa needs nothing and is as exact)"
        )
    if name == "flash_attention_2" and dtype == torch.float32:
        raise VQAError("--attn_implementation flash_attention_2 computes in 16 bits only: add --bf16 True")


def whisper_geometry(audio_encoder: str | Path, flag_name: str = "--audio_encoder") -> dict:
    """The geometry of the encoder of a Whisper, for `config.audio_config`; VQAError where it is another model."""
    path = resolve_model_dir(audio_encoder, flag_name=flag_name) / "config.json"
    whisper = read_config(path)
    if whisper.get("model_type") != "whisper":
        raise VQAError(f"{flag_name} {path}: model_type is {whisper.get('model_type')!r}, not 'whisper'")
    return {"model_type": "whisper", **{k: whisper[k] for k in AUDIO_CONFIG_FIELDS if k in whisper}}


def refuse_pickle(file: Path, base: str | Path, adapter: str | Path = "") -> None:
    """VQAError that says how to convert a pickle, of the model `base` or of an `adapter` on it."""
    adapter_flag = f" --stage2_adapter_path {adapter}" if adapter else ""
    raise VQAError(
        f"{file}: a pickle, which can run code when it is read; convert it with `python merge_stage2_to_bf16.py "
        f"--stage1_model_path {base}{adapter_flag} --output_path OUT --allow_pickle`"
    )


def stored_keys(folder: Path, allow_pickle: bool = False) -> list[str]:
    """The keys of all tensors of a model folder, from the headers of its safetensors; none where pickles are read.
    VQAError for pickles without `allow_pickle`, missing or truncated files, or two tensors for one parameter."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("model*.safetensors"))
    if not files and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        return [] if allow_pickle else refuse_pickle(pickles[0], folder)
    stored = read_config(index) if index.is_file() else {"metadata": {}, "weight_map": {"": "model.safetensors"}}
    if not isinstance(stored.get("weight_map"), dict) or "metadata" not in stored:
        raise VQAError(f"{index}: holds no weight_map, or no metadata; copy it again")
    absent = [name for name in sorted(set(stored["weight_map"].values())) if not (folder / name).is_file()]
    raise_problems(
        [f"{folder / name}: no such file; the model's weights, or their index, belong there" for name in absent]
    )
    keys = []
    for file in files:
        with open_safetensors(file) as stored:
            keys += stored.keys()
    refuse_twice(folder, keys)
    return keys


def refuse_twice(where: Path, keys: Iterable[str]) -> None:
    """VQAError for keys that stand for one parameter, under transformers 4 and 5 names or in two files."""
    names: dict[str, list[str]] = {}
    for key in keys:
        names.setdefault(current_name(key), []).append(key)
    raise_problems([f"{where}: {' and '.join(n)} are one tensor; remove one" for n in names.values() if len(n) > 1])


@contextlib.contextmanager
def open_safetensors(file: Path):
    """A safetensors file, opened; VQAError where it is truncated."""
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise VQAError(f"{file}: not a readable safetensors file ({error}); copy it again") from error


def current_name(key: str) -> str:
    """The name in this model of a stored tensor, of a model or an adapter. transformers 4 had no
    `model.language_model.` and a bare `visual.`; PEFT's names begin with `base_model.model.`, and those of a live
    adapter have `.default` or `.modules_to_save`."""
    key = re.sub(r"\.modules_to_save(?:\.default)?(?=\.)|\.default(?=\.weight$)", "", key)
    key = key.removeprefix("base_model.model.")
    for pattern, name in KEY_MAPPING.items():
        key = re.sub(pattern, name, key)
    return key


def name_on_disk(name: str, keys: Iterable[str]) -> str:
    """The key that `name`, a name in this model, would have beside `keys`: the name that people find in their files."""
    if any("model.language_model." in key for key in keys):
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def load_with_report(model_class: type, folder: Path, **options) -> tuple[nn.Module, dict]:
    """`from_pretrained` with its report, which it only prints: tensors missing, unexpected or mis-shaped. VQAError
    where the files cannot be read."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    transformers_logging.disable_default_handler()
    transformers_logging.add_handler(handler)
    transformers_logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # whatever a damaged file runs into in there
        if accelerate.utils.memory.should_reduce_batch_size(error):
            raise VQAError(f"{folder}: its weights do not fit into memory ({first_line(error)})") from error
        failed = [line.split("|")[0].strip() for line in printed.getvalue().splitlines() if "| CONV" in line]
        reason = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))
        raise VQAError(
            f"{folder}: {', '.join(failed) or 'its weights'} cannot be read ({reason}); copy it again"
        ) from error
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.enable_default_handler()
        transformers_logging.enable_progress_bar()


def check_speech_encoder(folder: Path, keys: Sequence[str], audio_encoder: str | Path | None) -> None:
    """VQAError for a folder without speech encoder where none is named, or with its own beside one that is named."""
    own_encoder = not keys or any(key.startswith("audio_encoder.") for key in keys)
    if own_encoder and audio_encoder:
        raise VQAError(f"{folder}: brings its own speech encoder (audio_encoder.*); leave --audio_encoder out")
    if not own_encoder and not audio_encoder:
        raise VQAError(
            f"{folder}: holds no audio_encoder.* tensors, so it is a plain Qwen2-VL that cannot hear; name a Whisper "
            "whose encoder it gets: --audio_encoder openai/whisper-large-v3-turbo (the projector then starts untrained)"
        )


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Quantise the decoder's linear layers as they load: NF4, double quantisation, computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(SIXTEEN_BIT_PARTS),
    )


def read_model(
    folder: Path,
    config: Qwen2VLConfig,
    device: torch.device,
    audio_encoder: str | Path | None,
    load_in_4bit: bool,
    allow_pickle: bool,
    **options,
) -> SpeechMixin:
    """`from_pretrained` under transformers 4 or 5 names, every tensor accounted for; prints how many.

    Weights that are stored in bitsandbytes' 4 bits are dequantised, but the decoder's with `load_in_4bit`, which has
    16-bit ones of the decoder's layers quantised, where none are in 4 bits. Arguments as in `load_model`; `options`
    are `dtype` and `attn_implementation`. VQAError for no speech encoder, or two, a missing bitsandbytes, or tensors
    that do not fit.
    """
    keys = stored_keys(folder, allow_pickle)
    check_speech_encoder(folder, keys, audio_encoder)
    packed: dict[str, set[str]] = {}
    for match in filter(None, map(FOUR_BIT_KEY.fullmatch, keys)):
        packed.setdefault(match[1], set()).add(match[2])
    quantised = load_in_4bit and not packed and device.type != "meta"
    if load_in_4bit and not keys:
        raise VQAError(f"{folder}: --load_in_4bit reads safetensors alone; convert it with merge_stage2_to_bf16.py")
    if (packed or quantised) and device.type != "meta":
        check_bitsandbytes(f"{folder}: weights in bitsandbytes' 4 bits" if packed else "--load_in_4bit")
    model_class = MODEL_CLASSES[config.model_type]
    if packed and device.type == "meta":
        with device:
            return model_class(config).to(options["dtype"])
    if quantised:
        options["quantization_config"] = nf4_config(options["dtype"])
    if packed:
        config.quantization_config = quantization_of(folder, keys, packed, options["dtype"])
    options |= {"config": config, "key_mapping": KEY_MAPPING, "use_safetensors": bool(keys), "device_map": {"": device}}
    model, report = load_with_report(model_class, folder, **options)
    missing = report["missing_keys"]
    if audio_encoder:  # which `graft_encoder` fills
        missing = [key for key in missing if not key.startswith(("audio_encoder.", PROJECTOR))]
    refuse_misfits(folder, keys, missing, report["unexpected_keys"], report["mismatched_keys"])
    if config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise VQAError(f"{folder}: lm_head.weight is not embed_tokens.weight, but config.json ties them; untie them")
    if packed:
        dequantise(model, options["dtype"], keep=LORA_TARGETS if load_in_4bit else None)
    if quantised:
        model.before_quantising = stored_samples(folder)
        found = sum(getattr(weight, "quant_state", None) is not None for weight in model.parameters())
        if not found == len(model.before_quantising) == LORA_MODULES_PER_LAYER * config.text_config.num_hidden_layers:
            raise RuntimeError(f"{found} layers in 4 bits are not the decoder's linear ones")
    for layer in model.modules():
        # bitsandbytes 0.49 and later would pack the weights anew in the first evaluation on a CPU with AVX512-BF16, in
        # a form through which no gradient flows.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if device.type != "meta":
        files = len(list(folder.glob("model*.safetensors"))) or 1
        note = f" ({files} file{'s' * (files > 1)})" + f", {len(packed)} weights in 4 bits" * bool(packed)
        note += f", {len(model.before_quantising)} quantised to 4 bits" * quantised
        print(f"   Weights: {len(keys)} tensors from {folder}{note}")
    return model


def quantization_of(folder: Path, keys: Sequence[str], packed: dict[str, set[str]], dtype: torch.dtype) -> dict:
    """How the weights of `folder` are stored in 4 bits, as transformers wants it; `packed` are their keys, each with
    the names of its statistics. VQAError where a tensor is missing that bitsandbytes would not always miss."""
    every = {"absmax", "quant_map"}.union(*packed.values())
    every |= {"nested_absmax"} if "nested_quant_map" in every else set()
    lacking = [key for key in packed if key not in keys]
    lacking += [f"{key}.{part}" for key, parts in packed.items() for part in sorted(every - parts)]
    raise_problems([f"{folder}: tensor {key} of a 4-bit weight is missing; copy the model again" for key in lacking])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if any(part.endswith("fp4") for part in every) else "nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[current_name(key).removesuffix(".weight") for key in keys if key not in packed],
    ).to_dict()


def refuse_misfits(
    folder: Path,
    keys: Sequence[str],
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """VQAError naming and counting the tensors of `folder`, a model's or an adapter's, that do not fit, and what that
    most likely means. `keys` are those stored; `mismatched` are names with the shape stored and the shape wanted."""
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    problems = [f"{folder}: tensor {name_on_disk(name, keys)} is missing" for name in missing]
    problems += [f"{folder}: unexpected tensor {name_on_disk(name, keys)}" for name in unexpected]
    problems += [
        f"{folder}: {name_on_disk(name, keys)} has shape {tuple(stored)}, the model wants {tuple(wanted)}"
        for name, stored, wanted in mismatched
    ]
    meanings = {
        "some adapt an encoder: target_modules like 'q_proj' match there too, and here both encoders stay as they "
        "are; train the adapter with train_vqa.py, or merge it where it was trained": any(
            "lora_" in key and (".visual." in key or ".audio_encoder." in key) for key in unexpected
        ),
        "an adapter of another size or layout, or an adapter among a model's weights: see merge_stage2_to_bf16.py": any(
            "lora_" in key or key.startswith("base_model.") for key in (*missing, *unexpected)
        ),
        "the weights are quantised in another way than bitsandbytes' 4 bits; get the 16-bit copy": any(
            key.endswith((".SCB", ".qweight", ".qzeros", ".g_idx")) for key in unexpected
        ),
        "config.json and the weights are of different models; take both from one place": mismatched or unexpected,
        "the copy is not complete; fetch all of its files again": True,
    }
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} mis-shaped"
    meaning = next(text for text, fits in meanings.items() if fits)
    raise_problems(problems, f"{counts} of {len(keys)} tensors: {meaning}")


def dequantise(model: SpeechMixin, dtype: torch.dtype, keep: str | None = None) -> None:
    """Replace the layers in 4 bits by plain ones in `dtype`, but those whose names match `keep`. transformers'
    `dequantize()` takes all of them, or none."""
    from bitsandbytes import functional
    from bitsandbytes import nn as quantised

    for name, layer in list(model.named_modules()):
        if isinstance(layer, quantised.Linear4bit) and not (keep and re.fullmatch(keep, name)):
            try:
                weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            except RuntimeError as error:
                raise VQAError(f"{name}.weight: its 4-bit tensors are of wrong sizes; copy the model again") from error
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight, plain.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, plain)
    for name, weight in model.named_parameters():  # transformers leaves those beside in the dtype they were stored in
        if getattr(weight, "quant_state", None) is None and "lora_" not in name and "modules_to_save" not in name:
            weight.data = weight.data.to(dtype)
    model.is_loaded_in_4bit = bool(keep)
    model.before_quantising = {}
    if not keep:
        model.hf_quantizer.remove_quantization_config(model)


def samples_of(tensor: torch.Tensor) -> torch.Tensor:
    """Up to 16 evenly spaced values of a weight, rounded to bf16; float32 on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).float().cpu()


def stored_samples(folder: Path) -> dict[str, torch.Tensor]:
    """`samples_of` each weight of the decoder's linear layers in a folder, by its name in this model: what they were
    before they were quantised, by which `fingerprint` knows the base in 4 bits and in 16."""
    samples = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with open_safetensors(file) as stored:
            for key in stored.keys():  # noqa: SIM118
                name = current_name(key)
                if re.fullmatch(LORA_TARGETS + r"\.weight", name):
                    samples[name] = samples_of(stored.get_tensor(key))
    return samples


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`, but those in 4 bits. `module.to(dtype)` would round the rotary frequencies as well."""
    for weight in module.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    for layer in module.modules():
        if hasattr(layer, "compute_type_is_set"):  # of bitsandbytes: it computes in the dtype that it was loaded with
            layer.compute_dtype = dtype


def graft_encoder(model: SpeechMixin, audio_encoder: str | Path, allow_pickle: bool, seed: int) -> None:
    """Give `model` the encoder of a Whisper, every tensor accounted for, and a projector drawn from `seed` on the CPU
    with the config's `initializer_range`: the same on every device."""
    folder = resolve_model_dir(audio_encoder, weights=True, flag_name="--audio_encoder")
    keys = stored_keys(folder, allow_pickle)
    prefix = next((match[0] for key in keys if (match := re.match(r"(?:model\.)?encoder\.", key))), "encoder.")
    encoder, report = load_with_report(
        WhisperEncoder,
        folder,
        config=audio_config_of(model.config),
        key_mapping={rf"^{re.escape(prefix)}": ""},
        use_safetensors=bool(keys),
        dtype=model.dtype,
    )
    missing = [prefix + name for name in report["missing_keys"]]
    unexpected = [prefix + name for name in report["unexpected_keys"] if prefix + name in keys]  # not the decoder's
    mismatched = [(prefix + name, *shapes) for name, *shapes in report["mismatched_keys"]]
    refuse_misfits(folder, keys, missing, unexpected, mismatched)
    model.audio_encoder.load_state_dict(encoder.state_dict())
    weight = torch.empty(model.audio_projector.weight.shape)
    generator = torch.Generator().manual_seed(seed)
    weight.normal_(0.0, model.config.text_config.initializer_range, generator=generator)
    model.audio_projector.weight.data.copy_(weight)
    print(f"   The speech encoder is that of {audio_encoder}")
    print(f"   audio_projector is UNTRAINED: drawn from seed {seed}; the model hears nothing before training")


def fingerprint(model: nn.Module) -> str:
    """Identity of the base, taken in memory: sha256 over what its config computes with, and over the name, shape and
    16 evenly spaced values, rounded to bf16, of every parameter. Of weights quantised at load those before.

    Adapters, LoRA layers and rows added for new tokens are left out. In memory, and not from the files, so that the
    same weights are one base under old and new names, in one file or many, in float32 or bf16, kept in 4 bits or
    dequantised, and drawn at random.
    """
    text, vision, audio = model.config.text_config, model.config.vision_config, audio_config_of(model.config)
    numbers = [text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps, vision.num_heads]
    numbers += [text.rope_parameters["rope_theta"], *text.rope_parameters["mrope_section"]]
    numbers += [vision.spatial_merge_size, audio.encoder_attention_heads]
    digest = hashlib.sha256(repr([float(number) for number in numbers]).encode())
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        shape, samples = tuple(tensor.shape), model.before_quantising.get(name)
        if getattr(tensor, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            shape = tuple(tensor.quant_state.shape)
            if samples is None:
                tensor = dequantize_4bit(tensor.data, tensor.quant_state)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[: model.stored_vocab_size]
            shape = tuple(tensor.shape)
        samples = samples_of(tensor) if samples is None else samples
        digest.update(f"{name}{shape}".encode())
        digest.update(samples.numpy().tobytes())
    return digest.hexdigest()


def add_lora(
    model: SpeechMixin,
    r: int = 64,
    alpha: int = 16,
    dropout: float = 0.05,
    *,
    vision_tower: bool = False,
    audio_encoder: bool = False,
) -> PeftModel:
    """LoRA on the seven linear layers of every decoder layer; the projector, and the encoders asked for, are trained
    in full, in float32 copies beside the frozen originals. RuntimeError where the adapters landed on other layers."""
    encoders = [ENCODERS["vision_tower"]] * vision_tower + [ENCODERS["audio_encoder"]] * audio_encoder
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=LORA_TARGETS,
        modules_to_save=[PROJECTOR, *encoders],
    )
    peft_model = get_peft_model(model, config)
    adapted = [name for name, _ in peft_model.named_parameters() if name.endswith("lora_A.default.weight")]
    expected = LORA_MODULES_PER_LAYER * model.config.text_config.num_hidden_layers
    if len(adapted) != expected or not all(".language_model.layers." in name for name in adapted):
        raise RuntimeError(f"LoRA on {len(adapted)} layers, expected {expected} in the decoder alone")
    # A step of 2e-4 is lost in bf16's 8 bits; PEFT keeps its own layers in float32, but not the copies it saves.
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    model.trains_vision, model.trains_audio = vision_tower, audio_encoder
    model.audio_encoder.embed_positions.requires_grad_(False)  # Whisper's fixed sinusoids
    return peft_model.eval()


def train_fully(
    model: SpeechMixin, dtype: torch.dtype, *, vision_tower: bool = False, audio_encoder: bool = False
) -> SpeechMixin:
    """`model`, loaded in float32, with decoder, embeddings, head and projector trainable, and the encoders asked for;
    frozen encoders are rounded to `dtype`."""
    model.requires_grad_(True)
    model.trains_vision, model.trains_audio = vision_tower, audio_encoder
    for encoder, trained in ((model.model.visual, vision_tower), (model.audio_encoder, audio_encoder)):
        if not trained:
            round_weights(encoder.requires_grad_(False), dtype)
    model.audio_encoder.embed_positions.requires_grad_(False)  # as in `add_lora`
    return model


def shard(model: SpeechMixin, args: VQATrainingArguments) -> None:
    """Spread what `train_fully` trains over all ranks (FSDP2): weights, gradients and the optimizer's states. A part is
    gathered while it computes, in the dtype of the computation; gradients are summed in float32, after each batch.
    Frozen encoders stay whole on every rank. By torch itself and before the Trainer has the model: accelerate knows no
    FSDP on a CPU, and holds the whole model beside its parts until all are made."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if args.compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(args.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {
        "mesh": init_device_mesh(args.device.type, (args.world_size,)),
        "mp_policy": policy,
        "ignored_params": {weight for weight in model.parameters() if not weight.requires_grad},
    }
    parts = [*model.model.language_model.layers]
    parts += [*model.model.visual.blocks] * model.trains_vision + [*model.audio_encoder.layers] * model.trains_audio
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is not ends[1].weight:
        parts.append(ends[1])
        # In float32, and what layers add to it: as on one GPU, where autocast leaves the embeddings alone.
        fully_shard(ends[0], **options | {"mp_policy": MixedPrecisionPolicy()})
    for part in [*parts, model]:
        fully_shard(part, **options)
    weights = dict(model.named_parameters())

    def split(_, state_dict, *args):
        for name in state_dict:
            state_dict[name] = part_of(state_dict[name], weights.get(name))

    model.register_load_state_dict_pre_hook(split)


class Sharded(nn.Module):
    """A model after `shard`, as the Trainer's `model_wrapped`: of a model that is wrapped already it makes no DDP."""

    def __init__(self, model: SpeechMixin):
        super().__init__()
        self.module = model

    def forward(self, **inputs) -> CausalLMOutputWithPast:
        """That of the model."""
        return self.module(**inputs)


def part_of(whole: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The part of `whole` that this rank holds of a sharded `weight`, of the same shape; all of it for another."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Let each rank hold all weights of a sharded model, in the dtype of the computation, so that it computes without
    the others; of another model nothing changes."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]  # the model itself is the first
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)
            part.reshard()


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor`, of which each rank may hold a part; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def count_trainable(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def print_trainable_parameters(model: SpeechMixin | PeftModel) -> None:
    """Print how many parameters are trained, of how many, in PEFT's words also where there is no adapter."""
    if isinstance(model, PeftModel):
        return model.print_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    trainable = count_trainable(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")


def skip_input_casts(model: nn.Module) -> None:
    """Stop PEFT from casting each LoRA input to float32: under autocast, as in training, it is cast back at once."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def read_adapter_config(path: Path) -> dict:
    """An adapter's config; VQAError where it asks for another computation than plain LoRA."""
    config = read_config(path)
    plain = LoraConfig()
    for name, value in config.items():
        if name not in ADAPTER_FIELDS_READ and value and value != getattr(plain, name, None):
            raise VQAError(f"{path}: {name} is {value!r}, which this script does not compute; it reads plain LoRA")
    numbers = [config.get("r"), config.get("lora_alpha")]
    if config.get("peft_type") != "LORA" or not all(isinstance(number, int | float) for number in numbers):
        raise VQAError(f"{path}: peft_type {config.get('peft_type')!r}, r and lora_alpha {numbers}; this reads LoRA")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise VQAError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changed the base as well; merge the adapter "
            "where it was trained, and take the merged model"
        )
    known = (PROJECTOR, *ENCODERS.values())
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not saved_modules(config) <= {*known}:
        raise VQAError(f"{path}: modules_to_save is {saved!r:.80}; this reads adapters that saved {', '.join(known)}")
    return config


def saved_modules(config: dict) -> set[str]:
    """The modules that an adapter holds in full, by the last part of their names in its config."""
    return {str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()}


def trained_encoders(config: dict) -> dict[str, bool]:
    """Which of ENCODERS an adapter has trained, from its config."""
    saved = saved_modules(config)
    return {encoder: name in saved for encoder, name in ENCODERS.items()}


def read_adapter(path: Path, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter folder, by its stored key. VQAError for no adapter, a truncated file, a pickle without
    `allow_pickle`, values that are not finite, or LoRA that was never trained."""
    file = path / "adapter_model.safetensors"
    pickled = path / "adapter_model.bin"
    if not file.is_file() and pickled.is_file() and not allow_pickle:
        refuse_pickle(pickled, "BASE", path)
    if not (path / "adapter_config.json").is_file() or not (file.is_file() or pickled.is_file()):
        raise VQAError(f"{path}: holds no adapter (adapter_config.json, adapter_model.safetensors)")
    if file.is_file():
        with open_safetensors(file) as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    else:
        try:
            file, tensors = pickled, torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a pickle that would call something runs into
            raise VQAError(f"{pickled}: holds more than plain tensors, and was not read") from error
    refuse_twice(file, tensors)
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    advice = "holds values that are not finite; the training diverged, take an earlier one"
    raise_problems([f"{file}: {key} {advice}" for key in bad])
    if not any(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key):
        raise VQAError(f"{file}: every lora_B is zero, so the adapter does nothing: it was saved before its first step")
    return tensors


def check_base(model: SpeechMixin, adapter: Path) -> None:
    """VQAError where the adapter's settings name another base than `model`; says so where nothing can be compared."""
    settings = load_settings(adapter)["model"] if (adapter / SETTINGS_FILE).is_file() else {}
    wanted = settings.get("base_fingerprint")
    if wanted is None:
        print(f"   {adapter}: no {SETTINGS_FILE} there names the base it was trained on, so none was compared")
    elif wanted != (found := fingerprint(model)):
        advice = f"its base was {settings['model_name_or_path']}, name that one"
        if settings["init"] == "random":
            advice = (
                f"its base was drawn from seed {settings['init_seed']} in {settings.get('dtype')} on "
                f"{settings.get('init_device')}; another seed, kind of device or torch version draws other weights"
            )
        raise VQAError(
            f"{adapter}: was trained on another base than the one loaded (fingerprint {wanted[:12]}, not "
            f"{found[:12]}); {advice}"
        )


def load_adapter(
    model: SpeechMixin, path: str | Path, *, allow_pickle: bool = False, dropout: float | None = None
) -> PeftModel:
    """`model`, changed in place, with the adapter of `path`, under transformers 4 or 5 names, and its dropout or
    another. Every tensor is accounted for: PEFT's own loader only warns of what is missing, and not of a missing
    projector. VQAError as `read_adapter` and `check_base`, and for tensors that do not fit."""
    path = Path(path)
    tensors = read_adapter(path, allow_pickle)
    config = read_adapter_config(path / "adapter_config.json")
    check_base(model, path)
    encoders = trained_encoders(config)
    dropout = config.get("lora_dropout", 0.0) if dropout is None else dropout
    peft_model = add_lora(model, config["r"], config["lora_alpha"], dropout, **encoders)
    stored = {f"base_model.model.{current_name(key)}": tensor for key, tensor in tensors.items()}
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    shapes = [(name, stored[name].shape, tensor.shape) for name, tensor in wanted.items() if name in stored]
    mismatched = [(name, *both) for name, *both in shapes if both[0] != both[1]]
    refuse_misfits(path, list(tensors), wanted.keys() - stored.keys(), stored.keys() - wanted.keys(), mismatched)
    set_peft_model_state_dict(peft_model, stored)
    landed = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    if lost := [name for name, tensor in stored.items() if not torch.equal(landed[name], tensor.to(landed[name]))]:
        raise RuntimeError(f"{path}: {lost[0]} and {len(lost) - 1} more tensors did not reach the model")
    return peft_model


def merge_adapter(model: nn.Module) -> SpeechMixin:
    """The base with the adapter merged into its weights, changed in place, one layer at a time. `model` is a PeftModel,
    or its base with the adapter inside. W + alpha / r * B A is summed in float32 and rounded once, to the dtype of W;
    PEFT's `merge_and_unload` adds the update in the dtype of the weight. What was trained in full keeps the dtype that
    it was trained in, float32."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        for name, layer in list(base.named_modules()):
            if isinstance(layer, LoraLayer):
                update = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
                weight = layer.base_layer.weight
                weight.copy_(weight.float() + layer.scaling["default"] * update)
                base.set_submodule(name, layer.base_layer)
            elif isinstance(layer, ModulesToSaveWrapper):
                base.set_submodule(name, layer.modules_to_save["default"])
    base.one_question = None  # its CUDA graphs hold the adapter
    return base.requires_grad_(False).eval()


@dataclass
class Trained:
    """A model that answers, from `load_trained`."""

    model: SpeechMixin  # with `processor` set, so that it can `answer`
    processor: VQAProcessor
    settings: dict  # what training saved; {} for a base model
    base_fingerprint: str  # of the base, before the adapter
    merged: bool  # the adapter is merged into the weights


def trained_settings(path: str | Path, device_type: str, changes: dict) -> tuple[dict, ModelSettings, InputSettings]:
    """What training saved in `path` ({} for a base), and the settings to answer with, `changes` applied. An adapter of
    other code, which has no settings, needs `prompt_layout` and `max_eval_frames` among the `changes`. VQAError for
    unreadable settings, another instruction or layout, or an adapter whose layout or base nobody says."""
    if unknown := changes.keys() - {f.name for kind in (ModelSettings, InputSettings) for f in fields(kind)}:
        raise TypeError(f"no fields of ModelSettings or InputSettings: {', '.join(sorted(unknown))}")
    folder = resolve_model_dir(path)
    settings = load_settings(folder) if (folder / SETTINGS_FILE).is_file() else {}
    model = settings.get("model", {})
    inputs = settings.get("input", {})
    if not (folder / "adapter_config.json").is_file():  # weights of its own, however the base came about
        kept = ("dtype", "attn_implementation") if settings.get("trained", {}).get("decoder") == "full" else ()
        model = {name: model[name] for name in kept if name in model} | {"model_name_or_path": str(path)}
    if inputs.get("instruction", INSTRUCTION) != INSTRUCTION:
        raise VQAError(
            f"{path}: trained with the instruction {inputs['instruction']!r}, this train_vqa.py asks {INSTRUCTION!r}; "
            "use the train_vqa.py that trained it"
        )
    layout = inputs.get("prompt_layout", "plain")
    if settings and changes.get("prompt_layout", layout) != layout:
        raise VQAError(f"--prompt_layout {changes['prompt_layout']}: {path} was trained with {layout}; leave it out")
    if (folder / "adapter_config.json").is_file() and not settings:
        refuse_unsaid_layout(path, changes)
        base = read_config(folder / "adapter_config.json").get("base_model_name_or_path") or DEFAULT_MODEL
        if not changes.get("model_name_or_path") and base != DEFAULT_MODEL and not Path(base).is_dir():
            raise VQAError(f"{folder}: its base was {base}, no folder here; name the base with --model_name_or_path")
        model = {"model_name_or_path": base}
    model = {"model_name_or_path": DEFAULT_MODEL, "dtype": "float32" if device_type == "cpu" else "bfloat16"} | model
    return settings, from_stored(ModelSettings, model | changes), from_stored(InputSettings, inputs | changes)


def refuse_unsaid_layout(path: str | Path, said: Iterable[str]) -> None:
    """VQAError where the prompt of a trained model without SETTINGS_FILE is not among the settings that are `said`."""
    if lacking := [f"--{name}" for name in ("prompt_layout", "max_eval_frames") if name not in said]:
        raise VQAError(
            f"{path}: has no {SETTINGS_FILE} to tell the prompt that it was trained on, so {' and '.join(lacking)} "
            "must be given: chat and 8 for what the public SurgViVQA-Audio scripts trained, plain for the layout of "
            "the published stage-2 model"
        )


def drawing_device(path: str | Path, model_settings: ModelSettings, device_type: str) -> str:
    """The device type on which the base is read, or drawn as in training; VQAError where that one is not here."""
    drawn_on = (model_settings.init == "random" and model_settings.init_device) or device_type
    if drawn_on not in ("cpu", device_type):
        raise VQAError(
            f"{path}: its random base was drawn on {drawn_on}, and {device_type} draws other numbers; evaluate it on a "
            f"machine with {drawn_on}"
        )
    return drawn_on


def load_trained(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    base_dtype: torch.dtype | None = None,
    merge: bool = True,
    allow_pickle: bool = False,
    **changes,
) -> Trained:
    """Load a trained model: an adapter on its base, a fully trained or merged model, or a base alone.

    `path` is folder or hub id (also user/repo@revision) of what was trained, or of a base. `dtype` is that of inference
    (None: what training computed in; without settings float32 on a CPU, else bfloat16), `base_dtype` that of the base
    when the adapter is loaded (None: what training computed in, without adapter `dtype`). `merge` merges the adapter
    into the weights (summed in float32 and rounded once), unless the base is in 4 bits. `changes` are fields of
    ModelSettings and InputSettings that differ from the stored ones, such as `model_name_or_path`, where the base lies
    now.

    VQAError as the loaders, for random weights that were drawn on a device which is not here, files that are not as
    they were saved, or a base whose speech encoder makes another number of tokens than in training.
    """
    device = torch.device(device)
    snapshot = resolve_model_dir(path)
    adapter = (snapshot / "adapter_config.json").is_file()
    if adapter or (snapshot / SETTINGS_FILE).is_file():  # else `load_model` fetches what a base needs
        path = resolve_model_dir(path, weights=True)
    settings, model_settings, input_settings = trained_settings(path, device.type, changes)
    refuse_damage(path)
    drawn_on = drawing_device(path, model_settings, device.type)
    dtype = dtype or getattr(torch, model_settings.dtype)
    base_dtype = base_dtype or (getattr(torch, model_settings.dtype) if adapter else dtype)
    own_tokenizer = not adapter or (Path(path) / "tokenizer.json").is_file()
    base = model_settings.model_name_or_path
    tokenizer = load_tokenizer(path if own_tokenizer else base)
    options = {name: getattr(model_settings, name) for name in BASE_FIELDS}
    drawn_on = device if drawn_on == device.type else drawn_on
    options |= {"seed": model_settings.init_seed, "dtype": base_dtype, "device": drawn_on}
    model = load_model(base, tokenizer, allow_pickle=allow_pickle, **options)
    identity = fingerprint(model)
    merged = adapter and merge and not model_settings.load_in_4bit
    if adapter:
        load_adapter(model, path, allow_pickle=allow_pickle)
    model = model.to(device).eval()
    if merged and dtype != torch.float32:
        model = merge_adapter(model)
    for part in [model] if dtype != base_dtype else [model.model.visual, model.audio_encoder]:
        round_weights(part, dtype)
    if merged and dtype == torch.float32:  # after widening, so that nothing is rounded
        model = merge_adapter(model)
    inputs = {name: getattr(input_settings, name) for name in PROCESSOR_FIELDS}
    model.processor = VQAProcessor(tokenizer, model.config, **inputs)
    if input_settings.encoder_tokens not in (None, model.processor.encoder_tokens):
        raise VQAError(
            f"{path}: trained with {input_settings.encoder_tokens} audio tokens a question, this base makes "
            f"{model.processor.encoder_tokens}; name the base of the training run with --model_name_or_path"
        )
    return Trained(model, model.processor, settings, identity, merged)


def write_weights(model: SpeechMixin, folder: Path | None) -> None:
    """Write safetensors shards and their index; one shard at a time lies in RAM. All ranks of a sharded model call
    this, one of them with a `folder`. Not by `save_pretrained`, which after `key_mapping` gives the tensors
    transformers 4's names back."""
    weights = dict(model.named_parameters())  # a tied head is listed once
    shapes = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}
    files = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    for name, keys in files.filename_to_tensors.items():
        tensors = {}
        for key in keys:
            tensors[key] = whole_of(weights[key].detach())
            tensors[key] = tensors[key].cpu().contiguous() if folder else None
        if folder:
            (folder / name).unlink(missing_ok=True)  # of an earlier save, which others may share
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(folder.stat().st_mode & 0o666)  # else only their owner may read them
    if folder and files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config_and_tokenizer(
    model: SpeechMixin, tokenizer: PreTrainedTokenizerBase, base_folder: Path, folder: Path
) -> None:
    """Write config, generation config, tokenizer and processor files; those of `base_folder` where it has them."""
    model.config.architectures = ["Qwen2VLForConditionalGeneration"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VQAProcessor(tokenizer, model.config).image_processor.save_pretrained(folder)
    for name in COPIED_FILES:
        if (base_folder / name).is_file():
            if name.endswith(".json"):
                read_config(base_folder / name)  # refuses one that asks for code
            shutil.copyfile(base_folder / name, folder / name)


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks: the processes that torchrun starts, one for each GPU
# ----------------------------------------------------------------------------------------------------------------------

ALONE = SimpleNamespace(world_size=1, process_index=0)  # in place of TrainingArguments, for a process by itself


def rank() -> int:
    """The number of this process among those that torchrun started, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started, on all hosts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_other_rank() -> bool:
    """Whether torchrun started this process as another than rank 0, which speaks for all."""
    return "LOCAL_RANK" in os.environ and rank() > 0


@cache
def cpu_group() -> dist.ProcessGroup:
    """The ranks' group for flags and objects, for which no GPU has to stop. It waits for days: rank 0 may decode data
    or write a model. Where a rank ends, torchrun ends the others."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def gather(args: TrainingArguments, value) -> list:
    """`value` of each rank, in order, on all of them; all wait for the last one."""
    values = [value] * args.world_size
    if args.world_size > 1:
        dist.all_gather_object(values, value, group=cpu_group())
    return values


def by_first(args: TrainingArguments, function: typing.Callable, *rest):
    """What `function(*rest)` returns on rank 0, on all ranks, which wait for it."""
    result = [function(*rest) if args.process_index == 0 else None]
    if args.world_size > 1:
        dist.broadcast_object_list(result, src=0, group=cpu_group())
    return result[0]


@cache
def ranks_store() -> dist.Store:
    """torchrun's key-value store, which outlives every rank."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"vqa/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


MEETINGS = itertools.count()


def meet(stop: "StopSignal | None" = None) -> bool:
    """Wait, without a group and without a limit of time, until every rank has called this as often as this one; False
    where a signal to `stop` ended the wait. Where a rank ends, torchrun ends the others. VQAError where the store is
    gone."""
    if world_size() == 1:
        return True
    number = next(MEETINGS)
    names = [f"{number}/{other}" for other in range(world_size())]
    try:
        ranks_store().set(names[rank()], "here")
        while not ranks_store().check(names):
            if stop and stop.signum:
                return False
            time.sleep(0.05)
    except dist.DistError as error:
        raise VQAError(f"torchrun's store is gone ({first_line(error)}); run the same command again") from error
    return True


@cache
def is_first_to_fail() -> bool:
    """Whether this rank is the first to end with an error, which is the one to say so. Before the ranks have met, all
    end with the same error, since all have the same flags."""
    if not (dist.is_initialized() or ranks_store.cache_info().currsize):
        return not is_other_rank()
    try:
        return ranks_store().add("failed", 1) == 1
    except dist.DistError:  # whoever held the store has ended before
        return False


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Let nothing appear of what this process prints while the `with` lasts, nor of what C++ prints in it."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        end_bars()
        sys.stdout.flush(), sys.stderr.flush()
        for stream, copied in zip((1, 2), kept, strict=True):
            os.dup2(copied, stream)


def own_device() -> torch.device:
    """The GPU of this process, by its LOCAL_RANK, now the current one; else the CPU. VQAError where the launcher
    started more processes here than there are GPUs."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
        if here > gpus:
            raise VQAError(f"{here} processes were started here, where {gpus} GPUs are: use --nproc_per_node {gpus}")
        # With its index, because the threads that load weights have GPU 0 as the current one.
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    return device


class Filled(torch.utils.data.Sampler):
    """`sampler` and, up to a multiple of `multiple` indices, its last index i as ~i, from which nothing is learned. The
    ranks need as many batches each; left to itself, accelerate fills them with rows that then count twice."""

    def __init__(self, sampler: torch.utils.data.Sampler, multiple: int):
        self.sampler, self.multiple = sampler, multiple

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        for index in self.sampler:
            yield index
        yield from [~index] * (len(self) - len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


# ----------------------------------------------------------------------------------------------------------------------
# Feature cache
# ----------------------------------------------------------------------------------------------------------------------


def encoder_digest(encoder: nn.Module) -> str:
    """sha256 over the name, dtype, shape and every byte of an encoder's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*encoder.named_parameters(), *encoder.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_recipes(model: SpeechMixin, processor: VQAProcessor, silence: int = 0) -> dict[str, str]:
    """All that the features of a clip (`vision`) and of a recording (`speech`, with `silence` tokens behind it) depend
    on but their files, as text."""
    kind = model.device.type
    version = importlib.metadata.version
    shared = {
        "schema": FEATURE_SCHEMA,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "float32_products": [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision],
        "device": torch.cuda.get_device_name(model.device) if kind == "cuda" else kind,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    vision = {"image_processor": processor.image_processor.to_dict(), "pillow": PIL_VERSION}
    vision |= {"max_image_size": processor.max_image_size, "frame_mode": processor.frame_mode}
    speech = {"av": av.__version__, "torchaudio": version("torchaudio")}
    speech |= {"audio_tokens": processor.audio_tokens, "encoder_tokens": processor.encoder_tokens}
    speech |= {"silence": silence}
    encoders = model.model.visual, model.audio_encoder
    with ThreadPoolExecutor(2) as pool:  # hashlib lets go of the interpreter
        digests = pool.map(encoder_digest, encoders)
    configs = model.config.vision_config, audio_config_of(model.config)
    return {
        name: json.dumps([shared, own, config.to_dict(), digest], sort_keys=True, default=str)
        for name, own, config, digest in zip(("vision", "speech"), (vision, speech), configs, digests, strict=True)
    }


class FeatureStore:
    """Outputs of the two frozen encoders in a folder, a file a clip and a file a recording; several runs may share it.

    A medium is a clip, the tuple of its selected frames' paths in order, or a recording, a path. Each goes through its
    encoder alone, so that what is read is the same, bit for bit, whatever batch it is in. A file is named by what it
    depends on (`feature_recipes` and the bytes of its media), written aside and then renamed.

    `model` is on the device that computes, and its encoders stay as they are from here on; `silence` is how many tokens
    behind the speech are kept too. VQAError where `folder`, made where it is missing, cannot be written.
    """

    def __init__(self, folder: str | Path, model: SpeechMixin, processor: VQAProcessor, silence: int = 0):
        self.folder, self.model, self.processor, self.silence = Path(folder), model, processor, silence
        self.files: dict[tuple[Path, ...] | Path, Path] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise VQAError(f"--cache_features {folder}: cannot be written ({error.strerror}); name another") from error

    def __getstate__(self) -> dict:
        """What loader workers get: the names of the files; they read, and never encode."""
        return {**self.__dict__, "model": None}

    def read(self, medium: tuple[Path, ...] | Path | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `read_features` gives; None: not kept. VQAError where the file is damaged or gone."""
        file = self.files.get(medium)
        return file and read_features(file)

    def fill(self, sources: Sequence, allow_errors: bool = False) -> None:
        """Encode what the clips and speech of `sources` lack here, and print how many that were. `sources` are
        SurgicalVQADatasets, or have their `rows` and `cacheable_media`; None in these is not kept. VQAError for media
        that cannot be read, which `allow_errors` skips (`read` then gives None for them), and for a full disk. Several
        ranks, which have the same sources, share the work."""
        start, depth = time.monotonic(), 2 * MAX_WORKERS
        recipes = feature_recipes(self.model, self.processor, self.silence)
        digest_of = cache(sha256_of)

        def attempt(step: typing.Callable, medium):
            try:
                return step(medium)
            except (OSError, VQAError) as error:
                if allow_errors:
                    return None
                if isinstance(error, OSError):
                    raise VQAError(f"{error.filename}: cannot be read ({error.strerror})") from error
                raise

        def name(medium) -> Path:
            kind, paths = ("speech", (medium,)) if isinstance(medium, Path) else ("vision", medium)
            content = json.dumps([recipes[kind], [digest_of(path) for path in paths]])
            return self.folder / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()}.safetensors"

        def decode(medium) -> tuple[torch.Tensor, ...]:
            if isinstance(medium, Path):
                return self.processor.log_mel(load_speech(medium), medium)
            frames = [load_frame(path, self.processor.max_image_size) for path in medium]
            return self.processor.patches_of(frames, f"beside {medium[0]}")

        every = (source.cacheable_media(index) for source in sources for index in range(len(source.rows)))
        media = list(dict.fromkeys(medium for both in every for medium in both if medium))
        file_of = dict(zip(media, ahead(partial(attempt, name), media, depth), strict=True))
        unique = {file: medium for medium, file in file_of.items() if file}  # media of one content are one file
        lacking = [medium for file, medium in unique.items() if not file.exists()]
        meet()  # every rank has seen the same files lacking
        own = lacking[rank() :: world_size()]
        bar = tqdm(total=len(own), desc="Caching features", unit="file", disable=not own)
        try:
            with bar, contextlib.closing(ahead(partial(attempt, decode), own, depth)) as decoded:
                for medium, inputs in zip(own, decoded, strict=True):
                    bar.update()
                    if inputs is not None:
                        self.encode(medium, inputs, file_of[medium])
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free
            raise VQAError(
                f"--cache_features {self.folder}: could not be written ({first_line(error)}), {free:,} bytes are free; "
                "make room and start again: what is written is kept"
            ) from error
        meet()
        self.files |= {medium: file for medium, file in file_of.items() if file and file.exists()}
        speech, new = (sum(isinstance(medium, Path) for medium in part) for part in (unique.values(), lacking))
        print(
            f"   Features in {self.folder}: {len(unique) - speech} clips and {speech} speech files, "
            f"{len(lacking) - new} and {new} of them encoded now; {time.monotonic() - start:.1f} s"
        )

    def encode(self, medium, inputs: tuple[torch.Tensor, torch.Tensor], file: Path) -> None:
        """Write to `file` what its encoder makes of a medium's `inputs`."""
        values, shape = (tensor.to(self.model.device) for tensor in inputs)
        with torch.no_grad():  # an adapter may bring an encoder that was trained
            if isinstance(medium, Path):
                features = self.model.encode_audio(values, shape + self.silence)  # no more than the encoder's window
            else:
                features = self.model.encode_vision(values, shape)
        write_features(file, features.cpu(), inputs[1])


def read_features(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What `write_features` stored, the features mapped from the file; VQAError where it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor("features"), torch.tensor(json.loads(stored.metadata()["shape"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise VQAError(f"{file}: damaged or gone ({error}); remove it and start again") from error


def write_features(file: Path, features: torch.Tensor, shape: torch.Tensor) -> None:
    """Store features [tokens, width] with the grid of a clip, int64 [n, 3], or the tokens of speech without the silence
    behind it, int64 [1]; the file is named once it is complete."""
    part = file.with_name(f"tmp-{os.urandom(8).hex()}")
    try:
        save_file({"features": features}, part, metadata={"shape": json.dumps(shape.tolist())})
        sync(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Stopping, saving and resuming
# ----------------------------------------------------------------------------------------------------------------------


def resolved_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: VQATrainingArguments,
    processor: VQAProcessor,
    base_fingerprint: str,
    skipped: Sequence[str] = (),
) -> dict:
    """All that training chose, as JSON: `model` and `input` are what evaluation repeats, the rest is for the record."""
    given = {**vars(model_args), **vars(data_args)}
    model = given | {"init_seed": training_args.seed if model_args.base_seed is None else model_args.base_seed}
    model |= {"init_device": training_args.device.type}
    model |= {"dtype": str(training_args.compute_dtype).removeprefix("torch."), "base_fingerprint": base_fingerprint}
    trained_parts = {"decoder": model_args.train_decoder, **{name: given[f"train_{name}"] for name in ENCODERS}}
    # Compiled layers draw dropout from other random numbers, and Liger's round otherwise.
    trained_parts |= {name: given[name] for name in ("compile_layers", "use_liger_kernel", "speech_token_jitter")}
    lora = {name: given[f"lora_{name}"] for name in ("r", "alpha", "dropout")}
    packages = ["torch", "transformers", "peft", "accelerate", "pillow", "torchaudio", "av"]
    packages += ["bitsandbytes"] * model_args.load_in_4bit
    origin = {}
    if adapter := model_args.adapter_path:
        digest = sha256_of(Path(adapter) / "adapter_model.safetensors")
        origin = {"started_from": {"adapter_path": adapter, "sha256": digest}}
    return {
        "model": asdict(from_stored(ModelSettings, model)),
        "base": hub_origin(resolve_model_dir(model_args.model_name_or_path)),
        "input": asdict(from_stored(InputSettings, given | {"encoder_tokens": processor.encoder_tokens})),
        "trained": trained_parts,
        "lora": lora if model_args.train_decoder == "lora" else {},
        **origin,
        "tokens": {
            "pad": processor.tokenizer.pad_token_id,
            "audio": processor.audio_id,
            "turn_ends": stop_token_ids(processor.tokenizer),
        },
        "data": {k: v for k, v in asdict(data_args).items() if k.endswith(RECORDED)},
        "skipped": list(skipped),
        "training": json.loads(training_args.to_json_string()) | {"ranks": training_args.world_size},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def refuse_other_batch(checkpoint: Path, stored: dict, training: dict) -> None:
    """VQAError where a step of a run on another number of ranks would not have as many rows as before; with the flags
    that make it so."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
    before, now = ([1 if of.get(name) is None else of[name] for name in names] for of in (stored, training))
    rows, ranks = math.prod(before), now[2]
    if rows == math.prod(now):
        return
    advice = f"take a number of GPUs by which {rows} can be divided"
    if rows % ranks == 0:
        each = rows // ranks
        size = next(size for size in range(min(before[0], each), 0, -1) if each % size == 0)
        advice = f"set --{names[0]} {size} --{names[1]} {each // size}"
    said = " x ".join(map(str, before))
    raise VQAError(
        f"{checkpoint}: was trained with {rows} rows a step ({said}: batch, accumulation, GPUs), and this run would "
        f"have {math.prod(now)} on {ranks} GPU{'s' * (ranks > 1)}; {advice}"
    )


class Interrupted(BaseException):
    """The run was asked to stop by the signal `signum`; its text says what is saved."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(f"Stopped by {signal.Signals(signum).name}: {text}")
        self.signum = signum


class StopSignal:
    """Takes SIGTERM, SIGINT and SIGHUP while the `with` lasts, but those that the caller ignores (as nohup does). Until
    `deferred` is set, a signal raises Interrupted at once, with `idle_message`. After that it only sets `signum` and
    prints `deferred_message`; the caller stops after its step or batch. With several ranks in `args` it only sets
    `received`, and `signum` follows from `agree`."""

    def __init__(
        self,
        deferred_message: str = "finishing the step and saving",
        idle_message: str = "nothing had been trained yet",
        args: TrainingArguments = ALONE,
    ):
        self.deferred_message = deferred_message
        self.idle_message = idle_message
        self.args = args
        self.deferred = False
        self.signum: int | None = None  # at which to stop
        self.received: int | None = None
        self.before = {}  # signal -> the handler that was there

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        # The launcher's SIGTERM, which may come while a rank that stops ends, must not change its status.
        ending = self.received and world_size() > 1
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)

    def _handle(self, signum: int, _frame) -> None:
        self.received = self.received or signum
        if not self.deferred:
            raise Interrupted(signum, self.idle_message)
        if self.args.world_size == 1:
            self.signum = self.received
            self.announce(signum)

    def announce(self, signum: int) -> None:
        """Print what follows from a signal; print itself is not safe in a handler."""
        os.write(2, f"\n{signal.Signals(signum).name}: {self.deferred_message}\n".encode())

    def agree(self) -> int | None:
        """`signum`, for which one signal to any rank is enough. All ranks call this at the same points of their way,
        and so all stop at the same one."""
        if self.args.world_size > 1 and not self.signum:
            highest = torch.tensor(self.received or 0)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=cpu_group())
            self.signum = int(highest) or None
            if self.signum and self.args.process_index == 0:
                self.announce(self.signum)
        return self.signum

    def follow(self, error: Exception) -> None:
        """After an error: where another rank failed before, wait for the SIGTERM that torchrun then sends, and end
        without a word (SystemExit). A rank that was killed says nothing itself, but breaks the operation that the
        others share, which raises a RuntimeError; torchrun's signal comes within seconds."""
        if self.args.world_size == 1:
            return
        self.deferred = True
        if self.signum:  # torchrun's signal is a second one
            self.received = None
        shared = isinstance(error, RuntimeError) and not accelerate.utils.memory.should_reduce_batch_size(error)
        patience = FOLLOW_SECONDS if not is_first_to_fail() else BROKEN_SECONDS if shared else 0
        deadline = time.monotonic() + patience
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.1)
        if patience and (self.received or not is_first_to_fail()):
            raise SystemExit(128 + (self.received or signal.SIGTERM))


@contextlib.contextmanager
def lock_folder(folder: str | Path):
    """Hold `folder`, made if need be, for this process; VQAError where it cannot be, or where another run holds it. The
    lock is one of lockf, which dies with the process: flock's would live on in loader workers of a killed run."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        opened = (Path(folder) / ".lock").open("w")
    except OSError as error:
        reason = f"cannot be written to ({error.strerror}); name another folder"
        raise VQAError(f"--output_dir {folder}: {reason}") from error
    with opened as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = "another run is writing there; wait for it or name another"
            raise VQAError(f"--output_dir {folder}: {reason}") from error
        yield


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def share_files(files: Iterable[Path], folder: Path) -> None:
    """Have `files` in `folder` too, without a copy where the disk can do that."""
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_digests(*folders: str | Path | None) -> set[bytes] | None:
    """All that the models in `folders` were trained on (`VQARow.contents`); None where none of them tells."""
    files = [Path(folder) / DIGESTS_FILE for folder in folders if folder]
    told = [(file, file.read_bytes()) for file in files if file.is_file()]
    if damaged := next((file for file, stored in told if not stored or len(stored) % DIGEST_BYTES), None):
        raise VQAError(f"{damaged}: is damaged; copy it again, or remove it to do without")
    return {digest for _, stored in told for digest in split_digests(stored)} if told else None


def write_digests(folder: Path, digests: Iterable[bytes] | None) -> None:
    """Write what `read_digests` reads, in no order that tells anything; nothing for None."""
    if digests:
        (folder / DIGESTS_FILE).write_bytes(b"".join(sorted(digests)))


def write_manifest(folder: Path) -> None:
    """Write the sizes and hashes of the files of `folder` beside them, once all of them have reached the disk."""
    for path in folder.iterdir():
        sync(path)
    paths = sorted(path for path in folder.iterdir() if path.name != CARD_FILE)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, ahead(sha256_of, paths, MAX_WORKERS), strict=True)
    }
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST_FILE)
    sync(folder)


def find_damage(folder: str | Path, needed: Sequence[str] = ()) -> str | None:
    """What is wrong with a saved folder: a file of its manifest, or of those `needed`, that is missing or differs."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        stated = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except OSError:
        return f"{MANIFEST_FILE} is missing: the save did not end"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} is damaged"
    if absent := [name for name in needed if name not in stated]:
        return f"{absent[0]} was not saved"
    if needed:  # the Trainer would read weights of another kind in place of those that were saved
        weights = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors")}
        if weights - stated.keys():
            return f"{min(weights - stated.keys())} is not of this checkpoint; remove it"
    for name, (size, _) in stated.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    found = ahead(sha256_of, [folder / name for name in stated], MAX_WORKERS)
    changed = [name for name, digest in zip(stated, found, strict=True) if digest != stated[name][1]]
    return f"{changed[0]} has changed since it was saved" if changed else None


def refuse_damage(folder: str | Path) -> None:
    """VQAError where a folder with a manifest is not as it was saved."""
    if (Path(folder) / MANIFEST_FILE).is_file() and (damage := find_damage(folder)):
        raise VQAError(f"{folder}: {damage}; take a complete checkpoint-N")


def check_room(model: nn.Module, args: VQATrainingArguments, state: TrainerState, kept: int) -> None:
    """Print what a checkpoint of a run takes on disk; VQAError where all that it will write from `state` on does not
    fit. `kept` checkpoints stay until the next one is complete, those that are there included."""
    weights = sum(weight.nbytes for weight in model.parameters())
    states = round(optimizer_bytes(args.optim.value) * count_trainable(model)) * (not args.save_only_model)
    steps = state.max_steps - state.global_step
    saves = {"no": 0, "steps": math.ceil(steps / state.save_steps)}.get(args.save_strategy.value, math.inf)
    count = max(0, min(saves, kept + 1 - len(checkpoints_of(args.output_dir))))
    last = weights * (args.save_strategy in ("no", "best"))  # else it shares the weights of a checkpoint
    needed, free = count * (weights + states) + last, shutil.disk_usage(args.output_dir).free
    what = f"a checkpoint takes {(weights + states) / 1e9:.1f} GB, a model alone {weights / 1e9:.1f} GB"
    print(f"   On disk {what}; {free / 1e9:.1f} GB are free")
    if needed > free:
        raise VQAError(
            f"--output_dir {args.output_dir}: {what}, and a new checkpoint is complete before an old one is removed: "
            f"that takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room, or save less often "
            "(--save_strategy no: the final model alone)"
        )


def checkpoints_of(folder: str | Path) -> dict[int, Path]:
    """The `checkpoint-N` folders of a run by N, newest first, complete or not."""
    found = {int(p.name[11:]): p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"\d+", p.name[11:])}
    return dict(sorted(found.items(), reverse=True))


def find_checkpoint(args: VQATrainingArguments) -> Path | None:
    """The checkpoint that --resume_from_checkpoint asks for; None: start at the beginning. True takes the newest one
    that is complete, and names those skipped. VQAError where the named one is not complete, none is, or the run would
    write among later checkpoints of another."""
    wanted = args.resume_from_checkpoint
    existing = checkpoints_of(args.output_dir)
    if isinstance(wanted, str):
        wanted = {"true": True, "false": None}.get(wanted.lower(), wanted)
    chosen, damaged = None, []
    for folder in existing.values() if wanted is True else [Path(wanted)] if wanted else []:
        damage = find_damage(folder, RESUME_FILES)
        if damage is None:
            chosen = folder
            break
        damaged.append(f"{folder}: {damage}")
    if damaged and not chosen and wanted is True:
        advice = "no checkpoint is complete; move them away to start from the beginning"
        raise VQAError("\n".join([*damaged, advice]))
    if damaged and not chosen:
        raise VQAError(f"--resume_from_checkpoint {damaged[0]}; name another, or True for the newest complete one")
    print("".join(f"Skipping {text}\n" for text in damaged), end="")
    if wanted is True:
        if not chosen and (marker := Path(args.output_dir) / STARTED_FILE).is_file():
            raise VQAError(
                f"{args.output_dir}: holds no checkpoint yet of the run from {marker.read_text().strip()}; start it "
                "again with --adapter_path, without --resume_from_checkpoint"
            )
        if not chosen:
            print("No checkpoint to resume from; starting from the beginning.")
        return chosen
    step = int(chosen.name[11:]) if chosen and re.fullmatch(r"checkpoint-\d+", chosen.name) else -1
    if later := [folder for number, folder in existing.items() if number > step]:
        raise VQAError(
            f"{later[0]} is there from an earlier run; --resume_from_checkpoint True continues from it, or move it "
            "away, or name another --output_dir"
        )
    return chosen


def refuse_other_settings(checkpoint: Path, settings: dict) -> None:
    """VQAError where a run would resume from a checkpoint of another model, input, LoRA shape, schedule or data; takes
    over into `settings` which adapter the run started from. The optimizer's state brings its learning rate along, so
    that another --learning_rate would be ignored."""
    stored = load_settings(checkpoint)
    # Defaults for settings files without these keys.
    once = dict.fromkeys((*ENCODERS, "compile_layers", "use_liger_kernel"), False)
    once |= {"decoder": "lora", "speech_token_jitter": 0}
    stored["trained"] = once | stored.get("trained", {})
    stored["input"] = {"prompt_layout": "plain"} | stored["input"]
    fixed = {part: settings[part].keys() - {"max_eval_frames"} for part in ("model", "input", "trained", "lora")}
    fixed["training"] = {"learning_rate", "lr_scheduler_type", "optim", "weight_decay", "seed"}
    if stored.get("training", {}).get("ranks", 1) == settings["training"]["ranks"]:
        fixed["training"] |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
    else:
        refuse_other_batch(checkpoint, stored.get("training", {}), settings["training"])
    fixed["data"] = {"train_data_path", "max_train_samples", "audio_pattern", "frame_pattern"}
    if stored.get("training", {}).get("metric_for_best_model"):  # the best value so far is one of this metric
        fixed["training"] |= {"metric_for_best_model", "greater_is_better"}
    raise_problems(
        [
            f"{checkpoint}: was trained with {name} {stored.get(part, {}).get(name)!r}, this run has "
            f"{settings[part][name]!r}; continue with the same flags, or start another run"
            for part, names in fixed.items()
            for name in sorted(names)
            if stored.get(part, {}).get(name) != settings[part][name]
        ]
    )
    if "started_from" in stored:
        settings["started_from"] = stored["started_from"]


# ----------------------------------------------------------------------------------------------------------------------
# Sharing: model card and upload
# ----------------------------------------------------------------------------------------------------------------------

CARD_REPO = "USER/REPO"  # in a card until the model is uploaded
BASE_TO_FILL = "FILL-IN/HUB-ID-OF-THE-BASE"
CARD_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed", "load_best_model_at_end"),
)
CARD = """---
{front}
---

# {repo}

Answers questions about frames of surgical videos. The question comes as {how}.

**For research only.** Not a medical device: not for diagnosis, treatment, or guidance during a procedure. It can be
wrong, and sound sure when it is.

## To fill in

- Licence of this model (also `license`, above): (fill in)
- Licence of the training data, and whether it lets a model be shared: (fill in; REAL-Colon's is CC BY-NC-SA 4.0)
- Licence of the base: (fill in)

## Load it

With `train_vqa.py` and what its `requirements.txt` lists:

```python
import train_vqa as vqa

trained = vqa.load_trained("{repo}", device="cuda"{where})
frames = [vqa.decode_frame(path) for path in frame_paths]
print(trained.model.answer(frames, {asked}).text)
```

## Training

- Base: {base}
{training}

{results}

None here yet; `evaluate_checkpoint.py --push_results` adds them.
"""
CARD_RESULTS = "## Results"  # below it stand those that evaluation adds


def describe_data(args: DataArguments, train_rows: Sequence[VQARow], eval_rows: Sequence[VQARow]) -> dict:
    """Of the files that a run reads: hash, number of rows, rows of each question type; for settings and card."""
    described = {}
    for part, path, rows in (("train", args.train_data_path, train_rows), ("eval", args.eval_data_path, eval_rows)):
        if path:
            types = Counter(row.question_type for row in rows)
            described[f"{part}_data_sha256"] = sha256_of(Path(path))
            described |= {f"{part}_rows": len(rows), f"{part}_types": dict(sorted(types.items()))}
    return described


def model_card(settings: dict) -> str:
    """The README.md of a model with these settings (of SETTINGS_FILE). What only people can say is left to be filled
    in: licences, and the hub id of a base that lay in a folder of its own."""
    data, training, inputs = (settings.get(name, {}) for name in ("data", "training", "input"))
    origin, parts = settings.get("base"), settings.get("trained", {})
    merged = "merged_from" in settings["model"]
    adapter = bool(settings.get("lora")) and not merged
    front = ModelCardData(
        base_model=origin["hub_id"] if origin else BASE_TO_FILL,
        base_model_relation="adapter" if adapter else "finetune",
        language="en",
        license="unknown",
        pipeline_tag="visual-question-answering",
        tags=[*["lora"] * adapter, "surgery", "endoscopy", "speech"],
    )
    how, asked = {
        "audio": ("speech", 'vqa.load_speech("question.mp3")'),
        "audio_text": ("speech and text", 'vqa.load_speech("question.mp3"), "the question"'),
        "text": ("text", 'question="the question"'),
    }[inputs.get("input_mode", "audio")]
    base, where = "a local folder, its hub id not known: fill it in wherever this card has FILL-IN", ""
    if origin:
        base = f"`{origin['hub_id']}`, revision `{origin['revision']}`"
    elif adapter:
        where = f', model_name_or_path="{BASE_TO_FILL}"'
    sections = {}
    for part, title in (("train", "Trained on"), ("eval", "Evaluated in training on")):
        if f"{part}_rows" in data:
            told = {name: data[f"{part}_{name}"] for name in ("rows", "types", "data_sha256")}
            sections[title] = {"file": Path(data[f"{part}_data_path"]).name} | told
    sections["Trained parts"] = {name: value for name, value in parts.items() if value}
    sections["LoRA"] = settings.get("lora")
    sections["Input"] = {name: value for name, value in inputs.items() if value is not None}
    sections["Training"] = {name: training[name] for name in CARD_TRAINING if name in training}
    sections["Versions"] = settings.get("versions")
    return CARD.format(
        front=front.to_yaml(),
        repo=CARD_REPO if merged else training.get("hub_model_id") or CARD_REPO,
        how=how,
        asked=asked,
        base=base,
        where=where,
        training="\n".join(f"- {title}: `{json.dumps(values)}`" for title, values in sections.items() if values),
        results=CARD_RESULTS,
    )


@contextlib.contextmanager
def naming_hub_errors(what: str, advice: str):
    """VQAError `what` (reason); `advice` where the hub, or the way there, fails within."""
    try:
        yield
    except VQAError:
        raise
    except Exception as error:  # of the network, the hub, or the libraries that speak with it
        both = ": ".join(first_line(e).strip(". ") for e in (error, error.__cause__) if e)
        raise VQAError(f"{what} ({getattr(error, 'server_message', None) or both}); {advice}") from error


def open_repo(name: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None) -> str:
    """The full id of a repo that this machine may write to, made, with its branch, if need be. VQAError for no token,
    no network, or a repo or branch that refuses."""
    api = HfApi(token=token)
    advice = "check the name, the network, and that the token (HF_TOKEN, or `hf auth login`) may write there"
    with naming_hub_errors(f"{name}: cannot be uploaded to", advice):
        api.whoami()
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # Asks how a file would be sent, which takes the right to write, and sends nothing.
        api.preupload_lfs_files(repo, [CommitOperationAdd(CARD_FILE, b"-")], revision=revision)
    return repo


def upload(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Model",
    resumable: bool = False,
) -> str:
    """Upload, in one commit, what evaluation needs of a complete folder of training or merging, and its card; returns
    the commit's address. `resumable`: also all of that checkpoint, in place of what is below LAST_CHECKPOINT. Weights
    and configs that the repo holds of another model are deleted. VQAError where the folder is not complete, or not all
    of it arrives."""
    folder, api = Path(folder), HfApi(token=token)
    advice = f'it is complete in {folder}; upload it by python -c "import train_vqa; train_vqa.upload({str(folder)!r}, '
    advice += f'{repo!r}{f", revision={revision!r}" if revision else ""})"'
    if damage := find_damage(folder):
        raise VQAError(f"{folder}: {damage}; nothing was uploaded")
    stated = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    needed = {k: v for k, v in stated.items() if k.endswith(UPLOADED) and k not in NOT_UPLOADED}
    sent = {name: folder / name for name in needed}
    sent[MANIFEST_FILE] = json.dumps({"files": needed}, indent=2).encode()
    sent[CARD_FILE] = (folder / CARD_FILE).read_text(encoding="utf-8").replace(CARD_REPO, repo).encode()
    if resumable:
        sent |= {f"{LAST_CHECKPOINT}/{name}": folder / name for name in (*stated, MANIFEST_FILE)}
    with naming_hub_errors(f"{repo}: {folder} was not uploaded", advice):
        api.create_repo(repo, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in sent.items()]
        for name in set(api.list_repo_files(repo, revision=revision)) - sent.keys():
            if MODEL_FILES.fullmatch(name) or (resumable and name.startswith(f"{LAST_CHECKPOINT}/")):
                operations.append(CommitOperationDelete(name))
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
        if lacking := sent.keys() - set(api.list_repo_files(repo, revision=commit.oid)):
            raise OSError(f"{min(lacking)} did not arrive: does a .gitignore there leave it out?")
    return commit.commit_url


class Uploader(TrainerCallback):
    """Uploads what a run completes, by rank 0, for which the others wait. It has to come after `RunGuard`, which
    completes checkpoints. `failed` counts uploads that failed: each is told in a line, and training goes on."""

    def __init__(self, trainer: "VQATrainer"):
        self.trainer, self.failed = trainer, 0

    def on_save(self, args, state, control, **kwargs):
        """With --hub_strategy every_save and checkpoint; after a signal there is no time for it."""
        if args.hub_strategy != "end" and not self.trainer.stop_signal.signum:
            by_first(args, self.send, f"checkpoint-{state.global_step}", args.hub_strategy == "checkpoint")
            self.trainer.guard.since = time.monotonic()

    def send(self, name: str, resumable: bool = False) -> None:
        """Upload a folder of --output_dir, or that itself; says what came of it."""
        args, folder = self.trainer.args, Path(self.trainer.args.output_dir) / name
        options = {"revision": args.hub_revision, "token": args.hub_token, "resumable": resumable}
        try:
            print(f"Uploaded {folder}: {upload(folder, args.hub_model_id, message=name or 'Final model', **options)}")
        except VQAError as error:
            self.failed += 1
            end_bars()
            print(f"error: {error}", file=sys.stderr)

    def send_final(self) -> None:
        """Upload the model that training ended with; a signal ends that at once."""
        args, stop_signal = self.trainer.args, self.trainer.stop_signal
        stop_signal.idle_message = f"{args.output_dir} is complete, but not its upload to {args.hub_model_id}"
        stop_signal.deferred = False
        by_first(args, self.send, "")


# ----------------------------------------------------------------------------------------------------------------------
# Trainer and callbacks
# ----------------------------------------------------------------------------------------------------------------------


class VQATrainer(Trainer):
    """Trainer whose checkpoints hold the adapter (or without one the full model), the tokenizer and the settings.

    `RunGuard`, its callback, completes them. A run that ended early and resumed from its last checkpoint has the same
    weights, bit for bit on the CPU, as one that did not. Of the Trainer's private parts five are used, each where no
    public one serves: `_save_checkpoint`, after a step that a signal or full memory cut off, for which no hook is left;
    `_tr_loss` and `_globalstep_last_logged`, so that the logged loss continues where the checkpoint left it;
    `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler`, which know no model after `shard`: accelerate's
    way to one, which does not work on a CPU, writes a second copy of the weights, and a pickle beside the states.

    `settings` are from `resolved_settings`, `stop_signal` says when to stop. The tokenizer is saved with every
    checkpoint; as `processing_class` it would overwrite the model's stop tokens.
    """

    def __init__(
        self, *args, tokenizer: PreTrainedTokenizerBase, settings: dict, stop_signal: StopSignal | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.tokenizer, self.settings, self.stop_signal = tokenizer, settings, stop_signal or StopSignal(args=self.args)
        self.args.about = {"vqa": {name: settings[name] for name in settings.keys() - {"training", "skipped"}}}
        # The Trainer would delete old checkpoints before the new one is complete.
        self.total_limit = self.args.save_total_limit
        self.args.save_total_limit = None
        # It would decode every row to measure it.
        self.grouped = self.args.train_sampling_strategy == "group_by_length"
        if self.grouped:
            self.args.train_sampling_strategy = "random"
        rows = self.train_dataset.rows if self.train_dataset else ()
        self.digests = {digest for row in rows for part in row.contents.values() for digest in part}
        self.saving = False  # a checkpoint is being written
        self.parameter_count: int | None = None
        # Of this step: indices of the rows, tokens and loss of each batch.
        self.batches: list[tuple[list[int], int, torch.Tensor | None]] = []
        patience = self.args.early_stopping_patience or sys.maxsize  # which no run reaches
        self.early_stopping = EarlyStoppingCallback(patience, self.args.early_stopping_threshold)
        if self.args.early_stopping_patience:
            self.add_callback(self.early_stopping)
        self.answers_at_once = ANSWERS_AT_ONCE
        self.sharded = isinstance(self.model, FSDPModule)
        if self.sharded:
            self.model_wrapped = Sharded(self.model)
            self.total_limit = self.total_limit or 1
        self.guard, self.uploader = RunGuard(self), Uploader(self)
        self.add_callback(self.guard)
        if self.args.upload:
            self.add_callback(self.uploader)

    def train_safely(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` if given. Interrupted: a signal stopped it, after a save. VQAError: memory or disk
        ran out, a loss or gradient was not finite, or a checkpoint cannot be read."""
        self.guard.resume(checkpoint)
        self.stop_signal.deferred = True
        message = None
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Interrupted:  # in an evaluation
            self.guard.evaluation_due = True
        except VQAError:
            raise
        except Exception as error:
            self.stop_signal.follow(error)
            message = self.explain(error, checkpoint)
        if message and "out of memory" in message:  # outside of `except`, so that the failed step's tensors are gone
            accelerate.utils.memory.clear_device_cache(garbage_collection=True)
            if self.sharded:  # what the other ranks hold cannot be had any more
                raise VQAError(f"{message}; {self.guard.last_checkpoint()}")
            self.args.distributed_state = None  # other ranks wait for this one, which has what they have, and saves it
            message += "; " + self.save_last_step()
        if message:
            raise VQAError(message)
        if self.stop_signal.signum:
            raise Interrupted(self.stop_signal.signum, self.save_last_step())

    def save_last_step(self) -> str:
        """Save the state after the last finished step, unless that is done; returns what there is to resume from."""
        guard = self.guard
        step = self.state.global_step
        if not step:
            return "no step was finished, so nothing is saved"
        if guard.stepping:
            return f"its weights were half changed, so they are not saved; {guard.last_checkpoint()}"
        with self.naming_failed_saves():
            if guard.saved_step != step:
                self._save_checkpoint(self.model, None)
                guard.on_save(self.args, self.state, self.control)
            elif guard.evaluation_due and self.args.should_save:  # what is saved stays as it is
                (guard.saved / EVALUATION_DUE).touch()
        advice = "continue with --resume_from_checkpoint True"
        if self.args.save_only_model:
            advice = "it holds no optimizer"
        return f"{guard.saved} is complete; {advice}"

    def explain(self, error: Exception, checkpoint: Path | None) -> str:
        """One line for memory or disk that ran out, or a checkpoint that cannot be read; other errors are raised."""
        reason = first_line(error)
        if accelerate.utils.memory.should_reduce_batch_size(error):
            indices, tokens, _ = self.batches[-1] if self.batches else ([], 0, None)
            part, dataset = "train", self.train_dataset
            if not self.model.training:
                part, dataset = "eval", self.eval_dataset or self.train_dataset
            lengths = dataset.token_counts(indices)
            key = dataset.rows[indices[lengths.index(max(lengths))]].key if indices else "none"
            asked = re.search(r"[Tt]ried to allocate [^.]*(?:\.\d+[^.]*)?\.?", str(error))
            return (
                f"out of memory ({(asked[0] if asked else reason).strip('. ')}) at step {self.state.global_step + 1} "
                f"with {len(indices)} samples of {tokens} tokens, the longest {key}; lower "
                f"--per_device_{part}_batch_size, --max_{part}_frames or --max_image_size, or set "
                "--checkpoint_every_n 1"
            )
        if self.saving:
            return self.explain_save(error)
        if checkpoint and not self.guard.began:
            files = "optimizer.pt, scheduler.pt or rng_state.pth"
            return f"{checkpoint}: {files} is damaged or no plain data; name another checkpoint"
        if isinstance(error, SafetensorError):
            file = self.state.best_model_checkpoint or checkpoint
            return f"{file}: its weights cannot be read ({reason}); name another"
        raise error

    def explain_save(self, error: Exception) -> str:
        """One line for a save that failed."""
        root = self.args.output_dir
        return (
            f"{root}: step {self.state.global_step} could not be saved ({first_line(error)}): "
            f"{shutil.disk_usage(root).free:,} bytes are free there; {self.guard.last_checkpoint()}; make room and "
            "continue with --resume_from_checkpoint True"
        )

    @contextlib.contextmanager
    def naming_failed_saves(self):
        """VQAError by `explain_save` where a save within fails."""
        try:
            yield
        except (RuntimeError, OSError, SafetensorError) as error:
            self.stop_signal.follow(error)
            raise VQAError(self.explain_save(error)) from error

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False, source: Path | None = None
    ) -> None:
        """Write weights, tokenizer and settings: all that evaluation needs. Of a full model whose weights are in the
        folder `source`, these are shared. Not the Trainer's own: PEFT's `auto` would save 152,000 rows of embeddings
        with an adapter once a row was added, and `training_args.bin` is a pickle that holds the hub's token."""
        self.saving = True
        if not self.args.should_save:
            return write_weights(self.model, None) if self.sharded and not source else None
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = (folder / MANIFEST_FILE, folder / EVALUATION_DUE, *folder.glob("optimizer_*.pt"))
        for file in earlier:  # of an earlier save of this step, maybe by more ranks
            file.unlink(missing_ok=True)
        if isinstance(self.model, PeftModel):
            if origin := self.settings.get("base"):
                config = self.model.active_peft_config
                config.base_model_name_or_path, config.revision = origin["hub_id"], origin["revision"]
            self.model.save_pretrained(folder, save_embedding_layers=False)
            self.tokenizer.save_pretrained(folder)
        else:
            if source:
                share_files(source.glob("model*.safetensors*"), folder)
            else:
                write_weights(self.model, folder)
            base = resolve_model_dir(self.settings["model"]["model_name_or_path"])
            write_config_and_tokenizer(self.model, self.tokenizer, base, folder)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(model_card(self.settings), encoding="utf-8")  # in place of PEFT's empty one
        write_digests(folder, self.digests)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's; of a sharded model each rank writes its own part of the optimizer's state."""
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = self.optimizer.state_dict()
        for index, values in state["state"].items():  # not changed themselves: they are the optimizer's own
            own = {name: v.to_local() for name, v in values.items() if isinstance(v, DTensor)}
            state["state"][index] = values | own
        rank = self.args.process_index
        torch.save(state, Path(output_dir) / (f"optimizer_{rank}.pt" if rank else "optimizer.pt"))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's; what ranks wrote in parts is put together, however many they were, and of a sharded model this
        one takes its part."""
        more = sorted(Path(checkpoint or "").glob("optimizer_*.pt"), key=lambda path: int(path.stem[10:]))
        if not checkpoint or not (more or self.sharded):
            return super()._load_optimizer_and_scheduler(checkpoint)
        files = [Path(checkpoint) / "optimizer.pt", *more]
        parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
        state = parts[0]
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for index, values in state["state"].items():
            for name in [name for name, value in values.items() if value.ndim]:
                whole = torch.cat([part["state"][index][name] for part in parts])
                values[name] = part_of(whole, weights[index])
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def save_final(self) -> None:
        """Save the model that training ends with: aside, then moved in, its config and manifest last."""
        root = Path(self.args.output_dir)
        part = Path(self.args.output_dir) / "tmp-final"
        last = ("adapter_config.json", "config.json", MANIFEST_FILE)  # without these it is not taken for a model
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = Path(best) if best else self.guard.saved if self.guard.saved_step == self.state.global_step else None
        source = source if source and source.parent == root else None  # others may be on another disk, or change
        if not self.args.should_save:
            return self.save_model(source=source)
        shutil.rmtree(part, ignore_errors=True)
        try:
            with self.naming_failed_saves():
                self.save_model(str(part), source=source)
                self.state.save_to_json(str(part / "trainer_state.json"))
                write_manifest(part)
                stale = [path.name for path in root.glob("model*.safetensors*")]
                for name in (*last, "adapter_model.safetensors", *stale):
                    (root / name).unlink(missing_ok=True)
                for path in sorted(part.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
                    os.replace(path, root / path.name)
                sync(root)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed and memory to a loss. Omit `train_loss` after a resume: the Trainer would average over the steps
        since then only."""
        if self.guard.resumed:
            logs.pop("train_loss", None)
        if "loss" in logs:
            logs |= self.guard.pace()
        super().log(logs, start_time)

    def get_batch_samples(self, *args, **kwargs):
        """No batches where nothing is left to train: the Trainer would add a step to the last one."""
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """The Trainer's; keeps the row indices, the token count and the loss of the batch."""
        self.batches.append((inputs.pop("row_indices", []), inputs["input_ids"].shape[1], None))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.batches[-1] = (*self.batches[-1][:2], loss)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """The mean loss of the batch; keeps its row indices and token count. Not the Trainer's, which divides by the
        labels of all ranks: several would log another mean than one."""
        self.batches = [(inputs.pop("row_indices", []), inputs["input_ids"].shape[1], None)]
        with torch.no_grad():
            return model(**inputs).loss, None, None

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The Trainer's; leaves the random states of training as they are, because it may be interrupted. Free memory
        goes back before and after: the blocks of one phase do not fit the other, and would stay beside its."""
        begin_phase()
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            metrics = super().evaluate(*args, **kwargs)
        begin_phase()
        self.batches = []
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The Trainer's; with --eval_answers adds what the answers are worth to its metrics."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        shares = self.score_answers() if self.args.eval_answers else {}
        output.metrics.update({f"{metric_key_prefix}_{name}": share for name, share in shares.items()})
        return output

    def score_answers(self) -> dict[str, float]:
        """Answer --eval_answers rows with the current weights, write them to ANSWERS_DIR, and let SCORER judge them by
        the rules of evaluation; returns the shares that ANSWER_METRICS names. Interrupted after a signal."""
        indices = spread_over_types(self.eval_dataset.rows, self.args.eval_answers)
        ranks = self.args.world_size
        share, dealt = indices[self.args.process_index :: ranks], []
        with contextlib.suppress(Interrupted), gathered_weights(self.model):
            dealt = self.answer_rows(share) if share else []
        self.guard.heed_signal()
        dealt = gather(self.args, dealt)
        answers = [dealt[place % ranks][place // ranks] for place in range(len(indices))]
        return by_first(self.args, self.score, indices, answers)

    def score(self, indices: Sequence[int], answers: Sequence[dict]) -> dict[str, float]:
        """Write the answers to the rows at `indices`, and judge them: see `score_answers`."""
        rows = [self.eval_dataset.rows[index] for index in indices]
        folder = Path(self.args.output_dir) / ANSWERS_DIR
        questions, file = folder / "questions.jsonl", folder / f"step-{self.state.global_step}.jsonl"
        names = ("id", "video_id", "question_type", "question", "short_answer")
        known = [{name: getattr(row, name) for name in names} for row in rows]
        with self.naming_failed_saves():
            folder.mkdir(parents=True, exist_ok=True)
            for path, parts in ((questions, [{"answer": row.answer} for row in rows]), (file, answers)):
                lines = [json.dumps(row | part, ensure_ascii=False) for row, part in zip(known, parts, strict=True)]
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = [sys.executable, SCORER, "--score_only", "--output_file", file, "--eval_data_path", questions]
        # A session of its own: Ctrl-C stops this process after its batch, and the scores belong to that.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", start_new_session=True)
        if done.returncode:
            raise VQAError(f"{file}: could not be scored ({(done.stderr.splitlines() or ['no message'])[-1]})")
        summary = json.loads(file.with_suffix(".summary.json").read_text(encoding="utf-8"))
        shares = {name: metric["accuracy"] for name, metric in summary["metrics"].items()}
        shares["stopped"] = summary["finish"]["eos"] / summary["n_total"]
        return {name: shares[name] for name in ANSWER_METRICS}

    def answer_rows(self, indices: Sequence[int]) -> list[dict]:
        """Greedy answers to evaluation rows, as the prediction part of evaluation's rows."""
        dataset = copy.copy(self.eval_dataset)
        dataset.with_answer = False
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        tokenizer = self.tokenizer
        decoding = tokenizer.pad_token_id, stop_token_ids(tokenizer), ANSWER_TOKENS
        size = even_size(len(indices), self.answers_at_once)

        def heed_signal() -> None:  # of this rank: the ranks' batches differ in number
            if self.stop_signal.received:
                raise Interrupted(self.stop_signal.received)

        def heeding_signals(samples: Iterable[dict]) -> Iterator[dict]:
            for sample in samples:
                heed_signal()
                self.batches = [(sample["row_indices"], len(sample["input_ids"]), None)]  # for `explain`
                yield sample

        def answer(samples: Iterable[dict]) -> list[tuple[list[int], str]]:
            return answer_batch(model, heeding_signals(samples), *decoding)

        samples = ahead(dataset.__getitem__, indices, 2 * size)
        with contextlib.closing(samples), layers_as(model), self.accelerator.autocast():
            answers, fitting = answer_with_halving(samples, size, True, answer)
        if fitting < size:
            self.answers_at_once = fitting
        parts = []
        for index, (ids, finish) in zip(indices, answers, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            part = {"predicted_answer": text, "ground_truth": dataset.rows[index].answer}
            parts.append(part | {"finish_reason": finish, "n_tokens": len(ids)})
        return parts

    def floating_point_ops(self, inputs: dict) -> int:
        """The Trainer's figure; counts the parameters once, which for each batch takes longer than a small step."""
        if self.parameter_count is None:
            self.parameter_count = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self.parameter_count

    def get_train_dataloader(self):
        """The Trainer's, by `let_workers_ignore_signals`, as the next; or with the rows in groups of like length."""
        loader = let_workers_ignore_signals(super().get_train_dataloader())
        if self.grouped:
            args = self.args
            seed = args.seed if args.data_seed is None else args.data_seed
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            loader.set_sampler(GroupedByLength(rows, self.train_dataset.token_counts(), seed))
        return self.fill(loader)

    def get_eval_dataloader(self, *args, **kwargs):
        """The Trainer's, for evaluation."""
        return self.fill(let_workers_ignore_signals(super().get_eval_dataloader(*args, **kwargs)))

    def fill(self, loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
        """`loader`, which with several ranks is accelerate's, `Filled` so that it has as many batches for each."""
        if self.args.world_size > 1:
            batches = loader.batch_sampler.batch_sampler  # of all ranks
            loader.set_sampler(Filled(batches.sampler, batches.batch_size * self.args.world_size))
        return loader


class GroupedByLength(LengthGroupedSampler):
    """transformers' sampler, whose order follows from the seed and the epoch: a resumed run has the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


def even_size(count: int, most: int) -> int:
    """Rows in a batch where `count` go in batches of about one size, of at most `most`."""
    return math.ceil(count / math.ceil(count / most))


def spread_over_types(rows: Sequence[VQARow], count: int) -> list[int]:
    """Indices of `count` rows, or of all: equally many of each question type as far as they go, evenly spaced among
    its rows."""
    types: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        types.setdefault(row.question_type, []).append(index)
    turns = sorted((turn, kind) for kind, indices in types.items() for turn in range(len(indices)))
    share = Counter(kind for _, kind in turns[:count])
    return sorted(index for kind in share for index in select_frames(types[kind], share[kind]))


def let_workers_ignore_signals(loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """`loader`, or accelerate's around it, whose workers leave signals to this process."""
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(start_worker, inner.worker_init_fn)
    return loader


def start_worker(init: typing.Callable | None, worker: int) -> None:
    """Start of a loader worker, which ignores signals; `init` is the Trainer's own."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)


class RunGuard(TrainerCallback):
    """Stops a run at a signal or at a number that is not finite, and completes its checkpoints."""

    def __init__(self, trainer: VQATrainer):
        self.trainer = trainer
        self.saved: Path | None = None  # the last complete checkpoint, or the one that the run resumed from
        self.saved_step, self.resumed, self.already_finished = -1, False, False
        self.began = False  # a first step has begun
        self.stepping = False  # the optimizer is changing the weights
        self.evaluation_due = False  # a signal cut one short
        self.unlogged_loss = (0.0, 0)  # the sum of losses since the last log, and the step of that log
        self.samples, self.seconds, self.since = 0, 0.0, time.monotonic()  # of this rank, since the last log

    def resume(self, checkpoint: Path | None) -> None:
        """Read where `checkpoint` stood; VQAError where that, or the Trainer's state, cannot be read."""
        if checkpoint is None:
            return
        self.resumed = True
        self.trainer.args.eval_on_start = False  # it was evaluated at its own start
        try:
            stored = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
            self.saved, self.saved_step = checkpoint, int(stored["step"])
            self.evaluation_due = bool(stored["evaluate"]) or (checkpoint / EVALUATION_DUE).exists()
            losses, ranks = np.atleast_1d(stored["tr_loss"]), self.trainer.args.world_size
            own = losses[self.trainer.args.process_index] if len(losses) == ranks else losses.mean()
            self.unlogged_loss = float(own), int(stored["last_logged"])
            if TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step != self.saved_step:
                raise ValueError("its files are of different steps")
        except Exception as error:  # of a damaged file
            raise VQAError(f"{checkpoint}: {PROGRESS_FILE} or trainer_state.json cannot be read ({error})") from error

    def last_checkpoint(self) -> str:
        """Which one there is to resume from, in words."""
        return f"the last complete checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    def pace(self) -> dict[str, float]:
        """Samples a second since the last call, evaluations and saves not counted, and the GPU memory in GiB that the
        allocator holds: training's peak, for between steps it gives nothing back."""
        samples = sum(gather(self.trainer.args, self.samples))  # of the last batches the ranks have unequal shares
        speed = {"samples_per_second": samples / self.seconds} if self.seconds else {}
        self.samples, self.seconds = 0, 0.0
        return speed | ({"gpu_memory_gib": torch.cuda.memory_reserved() / GIB} if torch.cuda.is_available() else {})

    def on_step_begin(self, args, state, control, **kwargs):
        """The checkpoint is loaded; later errors are not its."""
        self.began = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tell the dataset, before its loader starts; a run that resumes within an epoch has its fraction too."""
        self.trainer.train_dataset.epoch.fill_(int(state.epoch))

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up the loss log, and the evaluation that was cut short, where the checkpoint left them."""
        trainer, stopping = self.trainer, self.trainer.early_stopping
        if trainer.sharded and args.should_save:
            check_room(trainer.model, args, state, trainer.total_limit + args.load_best_model_at_end)
        if trainer.sharded:  # autocast, which the Trainer's own call would bring with DDP
            trainer.accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)
        if args.early_stopping_patience:
            stored = state.stateful_callbacks.setdefault(type(stopping).__name__, stopping.state())
            stopping.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
        for file in (Path(args.output_dir) / ANSWERS_DIR).glob("step-*.json*"):  # some may be of steps rolled back
            number = file.name.removeprefix("step-").partition(".")[0]
            if args.eval_answers and args.should_save and number.isdecimal() and int(number) > state.global_step:
                file.unlink()
        if args.world_size > 1:  # each its own dropout; a checkpoint's random states are read later
            set_seed((args.seed + args.process_index) % 2**32)
        if self.saved_step >= 0:
            trainer._tr_loss += self.unlogged_loss[0]
            trainer._globalstep_last_logged = self.unlogged_loss[1]
        if trainer.train_dataset.feature_store:
            trainer.model.offload_encoders()
        if self.evaluation_due:
            self.evaluation_due = False
            keep_best(args, state, trainer.evaluate(), kwargs["lr_scheduler"], self.saved)
        self.since = time.monotonic()
        stopped_early = stopping.early_stopping_patience_counter >= stopping.early_stopping_patience
        self.already_finished = control.should_training_stop = stopped_early or state.global_step >= state.max_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Loss and gradients must be finite; they are read from the GPU once a step, and waited for."""
        batches = self.trainer.batches
        values = [loss.detach().float() for *_, loss in batches]
        values.append(whole_of(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        values = torch.stack([value.to(values[0]) for value in values]).tolist()
        if all(map(math.isfinite, values)):
            self.stepping = True
            return
        bad = [i for i, value in enumerate(values[: len(batches)]) if not math.isfinite(value)]
        what = f"the loss is {values[bad[0]]}" if bad else "the gradient is not finite"
        dataset = self.trainer.train_dataset
        rows = [dataset.rows[index] for i in bad or range(len(batches)) for index in batches[i][0]]
        found = [(bool(bad), what, [f"{row.key} ({row.where})" for row in rows])]
        if not math.isfinite(values[-1]):  # which is the same on all ranks, but maybe the loss of one alone
            found = gather(args, *found)
        found = [one for one in found if one[0]] or found
        named = ", ".join(itertools.chain.from_iterable(names for *_, names in found))
        raise VQAError(
            f"step {state.global_step + 1}: {found[0][1]} with {named}; "
            f"stopped before the optimizer step; {self.last_checkpoint()}; look at these samples, or start another run "
            "with a lower --learning_rate"
        )

    def on_step_end(self, args, state, control, **kwargs):
        """After a signal: save and stop; where the epoch ends with this step, what is due then comes first."""
        self.stepping = False
        now = time.monotonic()
        self.samples += sum(len(rows) for rows, *_ in self.trainer.batches)
        self.seconds, self.since = self.seconds + now - self.since, now
        self.trainer.batches = []
        if self.trainer.stop_signal.agree():
            control.should_training_stop = True
            control.should_save |= not epoch_ends(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        """After a signal: nothing more where the epoch was cut short, a save where it was not."""
        if self.already_finished or (self.trainer.stop_signal.signum and not epoch_ends(state)):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.trainer.stop_signal.signum:
            control.should_save = self.saved_step != state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        """Between two batches of an evaluation."""
        self.heed_signal()

    def on_evaluate(self, args, state, control, **kwargs):
        """Training goes on: only now does its clock."""
        self.since = time.monotonic()

    def heed_signal(self) -> None:
        """After a signal an evaluation ends at once; it is made up for when the run is resumed."""
        if signum := self.trainer.stop_signal.agree():
            raise Interrupted(signum)

    def on_save(self, args, state, control, **kwargs):
        """Complete the checkpoint, once all ranks have written their part of it."""
        trainer = self.trainer
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        progress = {"step": state.global_step, "tr_loss": gather(args, trainer._tr_loss.item())}
        progress |= {"evaluate": self.evaluation_due, "last_logged": trainer._globalstep_last_logged}
        by_first(args, self.complete, folder, progress)
        self.saved, self.saved_step, trainer.saving = folder, state.global_step, False
        control.should_training_stop |= bool(trainer.stop_signal.agree())
        self.since = time.monotonic()

    def complete(self, folder: Path, progress: dict) -> None:
        """Write the last files of a checkpoint, its manifest at the end; then those beyond --save_total_limit go, but
        for the best."""
        trainer, root, state = self.trainer, folder.parent, self.trainer.state
        (folder / PROGRESS_FILE).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        write_manifest(folder)
        sync(root)
        if trainer.total_limit and trainer.total_limit > 0:
            earlier = [path for step, path in checkpoints_of(root).items() if step <= state.global_step]
            complete = [path for path in earlier if (path / MANIFEST_FILE).is_file()]  # newest first
            for old in complete[trainer.total_limit :]:
                if old.name != Path(state.best_model_checkpoint or "").name:
                    (old / MANIFEST_FILE).unlink()  # a deletion cut short leaves nothing that looks complete
                    shutil.rmtree(old)


def epoch_ends(state: TrainerState) -> bool:
    """Whether the Trainer leaves its epoch after this step, and does what is due at its end."""
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps


def keep_best(args: VQATrainingArguments, state: TrainerState, metrics: dict, scheduler, checkpoint: Path) -> None:
    """What the Trainer does with the `metrics` of an evaluation of its own: step a schedule that follows them, and note
    where they are the best so far."""
    if args.metric_for_best_model is None:
        return
    value = metrics["eval_" + args.metric_for_best_model.removeprefix("eval_")]
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        scheduler.step(value)
    better = operator.gt if args.greater_is_better else operator.lt
    if state.best_metric is None or better(value, state.best_metric):
        state.best_metric, state.best_global_step = value, state.global_step
        state.best_model_checkpoint = str(checkpoint)  # of this step, in --output_dir or elsewhere


def begin_phase() -> None:
    """Give the GPU's free memory back, so that what is reserved from here on is this phase's."""
    accelerate.utils.memory.clear_device_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class PeakMemory(TrainerCallback):
    """Keeps the peak GPU memory of each phase in GiB, as the allocator reserved it; empty without a CUDA GPU."""

    def __init__(self):
        self.gib: dict[str, float] = {}

    def _note(self, phase: str, *args, **kwargs) -> None:
        if torch.cuda.is_available():
            self.gib[phase] = max(self.gib.get(phase, 0.0), torch.cuda.max_memory_reserved() / GIB)
            torch.cuda.reset_peak_memory_stats()

    on_step_end = partialmethod(_note, "training")
    on_evaluate = partialmethod(_note, "evaluation")  # with --eval_answers
    on_save = partialmethod(_note, "saving")


class StopAtLoss(TrainerCallback):
    """Ends training once the logged loss is below `target`; `reached` says whether it was."""

    def __init__(self, target: float):
        self.target, self.reached = target, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer with each log."""
        if logs and "loss" in logs and float(logs["loss"]) < self.target:
            self.reached = control.should_training_stop = True


# ----------------------------------------------------------------------------------------------------------------------
# The plan: memory, tokens and steps
# ----------------------------------------------------------------------------------------------------------------------


def optimizer_bytes(optim: str) -> float:
    """Bytes that the optimizer of --optim keeps of a trained parameter on the GPU."""
    states = next(count for names, count in OPTIMIZER_STATES.items() if re.fullmatch(names, optim))
    return states * (EIGHT_BITS if "8bit" in optim else 4)


def parts_of_weights(args: SimpleNamespace) -> int:
    """How many GPUs share the trained weights; 1: each has all of them."""
    return args.num_gpus if args.train_decoder == "full" else 1


def estimate_memory(
    model: SpeechMixin,
    tokens: int,
    args: SimpleNamespace,
    dtype: torch.dtype,
    cached_features: bool,
    every_n: int,
    states: float = 8,
) -> dict[str, int]:
    """Bytes of GPU memory at the peak of training on batches of `tokens`, by what takes them; an estimate. `args` are
    from `together`, `states` from `optimizer_bytes`. `model` has its adapter, and may be on the meta device; with
    `cached_features` its frozen encoders are off the GPU. Not counted: activations of trained encoders, and of frozen
    ones while they run; the logits at answer positions; what --use_liger_kernel saves."""
    text = model.config.text_config
    size = dtype.itemsize
    count = text.num_hidden_layers
    recomputed = math.ceil(count / every_n) if every_n else 0
    layer = layer_activations(model, args, size)
    stored = model.model.language_model.norm.weight.dtype.itemsize  # between layers values have the decoder's own dtype
    kept = (count - recomputed) * layer + recomputed * stored * text.hidden_size + bool(recomputed) * layer
    trainable = count_trainable(model)
    packed = [layer.base_layer.weight for layer in model.modules() if isinstance(layer, LoraLayer)] * args.load_in_4bit
    # On the meta device they have 16 bits or more.
    sizes = [p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in packed]
    # A weight in 4 bits has a scale for each 64, in 8 bits, and for 256 of those a float32.
    four_bits = round(sum(sizes) * (1 / 2 + 1 / 64 + 4 / (64 * 256))) - sum(p.nbytes for p in packed)
    resting = [*model.model.visual.parameters(), *model.audio_encoder.parameters()] if cached_features else []
    copied = size if size < 4 else 0  # autocast keeps a copy of float32 weights in the dtype of the computation
    copied += 4 * (args.num_gpus > 1)  # the gradients once more, in the buckets that the GPUs exchange
    weights = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in resting) + four_bits
    parts = parts_of_weights(args)
    if parts > 1:  # gathered are the largest weight and its gradient
        copied = 0
        weights += 8 * model.get_input_embeddings().weight.numel() - round(4 * trainable * (1 - 1 / parts))
    working = tokens * 6 * text.intermediate_size * size  # of the backward pass of one MLP
    dequantised = size * max(sizes, default=0)  # one weight at a time, for its product
    return {
        "weights": weights,
        "gradients and optimizer": round((4 + states + copied) * trainable / parts),
        "activations": tokens * kept + working + dequantised,
    }


def layer_activations(model: SpeechMixin, args: ModelArguments, size: int) -> int:
    """Bytes a token that a decoder layer keeps for its backward pass; those of a value of the computation are `size`.

    In float32 both norms' inputs, and what comes of them where the norms are trained. Then queries and attention
    output, keys and values, gate, up and their activation, LoRA's narrow outputs, and the inputs of the linear layers:
    with dropout a copy each and a byte of mask; else the two that they share and the product, or, where autocast casts
    float32 weights' inputs, one for each but the output's. A compiled layer keeps its two inputs, queries, output,
    keys, values, gate and up (see ACTIVATION_MEMORY_BUDGET).
    """
    text = model.config.text_config
    adapted = args.train_decoder == "lora"
    stored = model.model.language_model.norm.weight.dtype.itemsize
    h, f, r = text.hidden_size, text.intermediate_size, args.lora_r * adapted
    k = text.num_key_value_heads * h // text.num_attention_heads
    if args.compile_layers:
        return 2 * stored * h + size * (2 * h + 2 * k + 2 * f + 7 * r)
    layer = 4 * (2 if adapted else 4) * h + size * (2 * h + 2 * k + 3 * f + 7 * r)
    if adapted and args.lora_dropout:
        return layer + (size + 1) * (6 * h + f)
    return layer + size * ((2 if stored == size else 5) * h + f)


def estimate_run(
    model: SpeechMixin, tokens: tuple[int, int], flags: SimpleNamespace, every_n: int
) -> dict[str, dict[str, int]]:
    """Bytes of GPU memory at the peaks of training, evaluation and --eval_answers, by what takes them; an estimate.
    `tokens` are those of the longest sample to train on, and to evaluate on (0: there is none)."""
    size = flags.compute_dtype.itemsize
    longest, longest_asked = (math.ceil(count / flags.padding_multiple) * flags.padding_multiple for count in tokens)
    estimate = partial(estimate_memory, model, args=flags, dtype=flags.compute_dtype, every_n=every_n)
    estimate = partial(estimate, cached_features=bool(flags.cache_features), states=optimizer_bytes(flags.optim.value))
    training = estimate(tokens=flags.per_device_train_batch_size * longest)
    phases = {"training": training}
    parts = parts_of_weights(flags)
    if parts > 1:
        phases["loading"] = {"weights": sum(p.nbytes for p in model.parameters())}  # whole, before they are shared out
    if not longest_asked:
        return phases
    text = model.config.text_config
    trainable = count_trainable(model)
    resting = {
        "weights": training["weights"],
        "optimizer": training["gradients and optimizer"] - 4 * trainable // parts,
    }
    dequantised = estimate(tokens=0)["activations"]
    # Without gradients an MLP works with four values of its own width and four of the hidden size a token.
    token = 4 * (text.intermediate_size + text.hidden_size) * size
    asked = flags.per_device_eval_batch_size * longest_asked
    phases["evaluation"] = resting | {"activations": asked * token + dequantised}
    if not flags.cache_features:
        # Before the decoder runs, MLPs of the encoders work with three values of their own width, and the vision
        # encoder with two of its hidden size a patch, in blocks too small for the decoder.
        vision, speech = model.config.vision_config, model.audio_encoder.config
        positions = speech.max_source_positions * (flags.input_mode != "text")
        patches = vision.spatial_merge_size**2 * (longest_asked - positions * (flags.audio_tokens == "full"))
        patch = int(3 * vision.mlp_ratio + 2) * vision.embed_dim
        values = flags.per_device_eval_batch_size * (patches * patch + 3 * positions * speech.encoder_ffn_dim)
        phases["evaluation"]["encoders"] = size * values
    if flags.eval_answers:
        rows = even_size(flags.eval_answers, ANSWERS_AT_ONCE)
        read = max(longest_asked, min(PREFILL_TOKENS, rows * longest_asked))
        head = text.hidden_size // text.num_attention_heads
        kept = 2 * head * text.num_key_value_heads * size * rows * (longest_asked + ANSWER_TOKENS)
        kept *= text.num_hidden_layers + 2  # one layer is there twice as it grows
        phases["answers"] = resting | {"activations": read * token + dequantised, "keys and values": kept}
        if parts > 1:
            phases["answers"]["gathered"] = size * trainable
    return phases


def choose_recomputation(args: ModelArguments, estimate: typing.Callable[[int], dict[str, int]]) -> int:
    """`--checkpoint_every_n` as a number: for `auto` the fewest recomputed layers whose estimate fits."""
    if args.checkpoint_every_n != "auto":
        return int(args.checkpoint_every_n)
    limit = FITTING_SHARE * memory_limit(args) * GIB
    every_n = next((n for n in (0, *range(32, 1, -1)) if sum(estimate(n).values()) < limit), 1)
    print(f"Activation checkpointing: --checkpoint_every_n auto takes {every_n}")
    return every_n


def longest_sample(dataset: SurgicalVQADataset | None, **changes) -> int:
    """Tokens of the longest sample of a dataset, or of its processor, with `changes`; 0 for no dataset."""
    if dataset is None:
        return 0
    dataset = copy.copy(dataset)
    dataset.processor = copy.copy(dataset.processor)
    for name, value in changes.items():
        setattr(dataset if hasattr(dataset, name) else dataset.processor, name, value)
    return max(dataset.token_counts())


def smaller_settings(flags: SimpleNamespace, most_frames: int) -> list[list[dict[str, object]]]:
    """What may make a run fit: alternatives, from the least change to the greatest, of flags with their values. First
    those that leave the result as it is, then fewer tokens, then coarser weights and states, then fewer frames."""

    def halves(number: int) -> list[int]:
        return [number >> shift for shift in range(1, number.bit_length())]

    train, asked = flags.per_device_train_batch_size, flags.per_device_eval_batch_size
    rows = train * flags.gradient_accumulation_steps
    batches = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": rows // n} for n in halves(train)]
    frozen = not (flags.train_vision_tower or flags.train_audio_encoder)
    return [
        [{"checkpoint_every_n": 1}] * (flags.checkpoint_every_n != 1),
        batches,
        [{"per_device_eval_batch_size": n} for n in halves(asked)] * bool(flags.eval_data_path),
        [{"eval_answers": n} for n in halves(min(flags.eval_answers, ANSWERS_AT_ONCE))],
        [{"cache_features": "features"}] * (frozen and not flags.cache_features),
        [{"audio_tokens": "speech"}] * (flags.audio_tokens != "speech" and flags.input_mode != "text"),
        [{"frame_mode": "video"}] * (flags.frame_mode != "video"),
        [{"load_in_4bit": True}] * (flags.train_decoder == "lora" and not flags.load_in_4bit),
        [{"optim": OptimizerNames.ADAMW_BNB}]
        * (optimizer_bytes(flags.optim.value) == 8 and parts_of_weights(flags) == 1),
        [{"max_train_frames": n} for n in halves(most_frames)],
    ]


def advise_to_fit(
    limit: float,
    model: SpeechMixin,
    datasets: tuple[SurgicalVQADataset, SurgicalVQADataset | None],
    flags: SimpleNamespace,
) -> str:
    """Flags with which the estimate is below `limit` bytes, none of which could be left out; or that there are none."""
    length = cache(longest_sample)  # which reads the headers of all frames

    def peak(chosen: list[dict[str, object]]) -> int:
        changed = copy.copy(flags)
        for settings in chosen:
            vars(changed).update(settings)
        inputs = {"audio_tokens": changed.audio_tokens, "frame_mode": changed.frame_mode}
        tokens = length(datasets[0], **inputs, max_train_frames=changed.max_train_frames), length(datasets[1], **inputs)
        phases = estimate_run(model, tokens, changed, changed.checkpoint_every_n)
        return max(sum(parts.values()) for parts in phases.values())

    options = smaller_settings(flags, max(len(datasets[0].media_of(i)[0]) for i in range(len(datasets[0]))))
    chosen = [some[-1] if some else {} for some in options]
    if peak(chosen) >= limit:
        return "no flags of this script would make it fit: take a larger GPU, or a smaller model"
    for index in reversed(range(len(options))):  # all at first; of each, the last ones first, the least that will do
        smaller = ([*chosen[:index], settings, *chosen[index + 1 :]] for settings in ({}, *options[index]))
        chosen = next(some for some in smaller if peak(some) < limit)
    named = [f"--{n} {getattr(value, 'value', value)}" for settings in chosen for n, value in settings.items()]
    return f"it would fit with {' '.join(named)} ({peak(chosen) / GIB:.1f} GiB)"


def plan(
    model: SpeechMixin, datasets: tuple[SurgicalVQADataset, SurgicalVQADataset | None], flags: SimpleNamespace
) -> int:
    """--checkpoint_every_n as a number: every N-th layer is recomputed, 0: none. With --dry_run also prints tokens,
    optimizer steps and memory, and raises a VQAError where that does not fit."""
    counted = flags.dry_run or flags.checkpoint_every_n == "auto"
    lengths = [sorted(dataset.token_counts()) if counted and dataset else [0] for dataset in datasets]
    estimate = partial(estimate_run, model, (lengths[0][-1], lengths[1][-1]), flags)
    every_n = choose_recomputation(flags, lambda n: estimate(n)["training"])
    if not flags.dry_run:
        return every_n
    for name, counts in zip(("train", "eval"), lengths, strict=True):
        if counts[-1]:
            spread = f"min {counts[0]}, median {counts[len(counts) // 2]}, max {counts[-1]}"
            print(f"{name}: {len(counts)} samples, tokens per sample: {spread}")
    samples = len(datasets[0])
    batches = math.ceil(samples / flags.per_device_train_batch_size)
    per_epoch = math.ceil(batches / (flags.gradient_accumulation_steps * flags.num_gpus))
    steps = flags.max_steps if flags.max_steps > 0 else math.ceil(flags.num_train_epochs * per_epoch)
    gpu, on_gpus = ("each GPU", f" on {flags.num_gpus} GPUs") if flags.num_gpus > 1 else ("the GPU", "")
    print(f"steps: {steps} ({per_epoch} an epoch of {samples} samples{on_gpus})")
    peaks = {}
    for phase, parts in estimate(every_n).items():
        peaks[phase] = sum(parts.values())
        shares = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        print(f"memory: about {peaks[phase] / GIB:.1f} GiB of {gpu} at the peak of {phase} ({shares})")
    phase = max(peaks, key=peaks.get)
    limit = memory_limit(flags)
    if limit and peaks[phase] > limit * GIB:
        asked = flags.gpu_memory_limit_gib is not None
        what = f"--gpu_memory_limit_gib {limit:g}" if asked else f"the GPU, which has {limit:.1f} GiB"
        flags.checkpoint_every_n = every_n
        advice = advise_to_fit(FITTING_SHARE * limit * GIB, model, datasets, flags)
        raise VQAError(f"{what}: does not hold the {peaks[phase] / GIB:.1f} GiB of {phase}; {advice}")
    return every_n


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def prepare_data(args: DataArguments) -> tuple[list[VQARow], list[VQARow], list[str]]:
    """Read and decode everything once: the rows of training and evaluation, and the problems of those that
    --skip_bad_samples left out. VQAError for all that is wrong with either file, unless those rows may be left out."""
    sources = [(args.train_data_path, args.audio_dir, args.max_train_samples, args.max_train_frames)]
    if args.eval_data_path:
        eval_audio_dir = args.eval_audio_dir or args.audio_dir
        sources.append((args.eval_data_path, eval_audio_dir, args.max_eval_samples, args.max_eval_frames))
    loaded, problems, empty, patterns = [], [], [], (args.audio_pattern, args.frame_pattern)
    for path, audio_dir, limit, max_frames in sources:
        audio_dir = audio_dir if args.input_mode != "text" else None
        rows, found = check_rows(path, args.frames_dir, audio_dir, limit, args.allow_symlinks, *patterns)
        if args.frame_mode == "video":
            found += (mixed := find_mixed_sizes(rows, args.max_image_size, max_frames))
            rows = [row for row in rows if row.line not in {line for problem in mixed for line in problem.lines}]
        if args.check_data:
            media = {file for row in rows for file in row.media}
            clips, types = len({row.frames for row in rows}), len({row.question_type for row in rows})
            bad = len({line for problem in found for line in problem.lines})
            print(f"{path}: {len(rows)} good rows ({clips} clips, {types} types, {len(media)} files), {bad} bad")
        text, too_many = find_empty_frames(rows)
        if too_many and not args.allow_empty_frames:
            empty.append(f"{text}; replace them, or let them pass with --allow_empty_frames True")
        elif text:
            print(f"   {text}")
        loaded.append(rows)
        problems += found
    shared = find_shared_media(row for rows in loaded for row in rows)  # never left out: none can say which is wrong
    raise_problems([*([] if args.skip_bad_samples else problems), *shared, *empty])
    if problems:
        print(f"Leaving out bad rows ({len(problems)} problems, --skip_bad_samples):", *problems, sep="\n")
    for (path, *_), rows in zip(sources, loaded, strict=True):
        if not rows:
            raise VQAError(f"{path}: no good row is left; see what is wrong with --check_data")
    return loaded[0], loaded[1] if len(loaded) > 1 else [], [str(problem) for problem in problems]


def load_base(
    args: ModelArguments, training_args: VQATrainingArguments, tokenizer: PreTrainedTokenizerBase, device
) -> SpeechMixin:
    """`load_model` as the flags say."""
    dtype = training_args.compute_dtype
    options = {name: getattr(args, name) for name in BASE_FIELDS} | {"device": device, "compute_dtype": dtype}
    options["seed"] = training_args.seed if args.base_seed is None else args.base_seed
    options["dtype"] = torch.float32 if args.train_decoder == "full" else dtype
    return load_model(args.model_name_or_path, tokenizer, **options)


def check_model(
    args: ModelArguments, training_args: VQATrainingArguments
) -> tuple[PreTrainedTokenizerBase, Qwen2VLConfig]:
    """Tokenizer and config of the base. VQAError for what the headers of its weights, and the adapter, tell against
    them. Nothing is allocated."""
    kernel = ATTENTION_KERNELS[args.attn_implementation]
    if args.use_liger_kernel and (used := load_config(args.model_name_or_path).text_config.hidden_act) != "silu":
        raise VQAError(f"--use_liger_kernel needs hidden_act 'silu', config.json has {used!r}; leave it out")
    print(f"⏳ Loading merged {'BF16' if training_args.bf16 else 'FP32'} model with {kernel} attention...")
    tokenizer = load_tokenizer(args.model_name_or_path)
    config = load_base(args, training_args, tokenizer, "meta").config
    if args.adapter_path:
        read_adapter(Path(args.adapter_path))
    if args.audio_encoder and args.init == "pretrained" and Path(args.audio_encoder).is_dir():
        stored_keys(Path(args.audio_encoder))
    return tokenizer, config


def build_model(
    args: ModelArguments,
    training_args: VQATrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
) -> tuple[SpeechMixin, SpeechMixin | PeftModel, str]:
    """The model, what is trained of it (the adapter around it, or itself), the base's fingerprint. On the `meta` device
    nothing is allocated, and there is no fingerprint."""
    on_meta = str(device) == "meta"
    precision = "BF16" if training_args.bf16 else "FP32"
    model = load_base(args, training_args, tokenizer, device)
    print("✓ Model built without weights" if on_meta else f"✓ Model loaded in full {precision}")
    base_fingerprint = "" if on_meta else fingerprint(model)
    encoders = {encoder: getattr(args, f"train_{encoder}") for encoder in ENCODERS}
    set_seed(training_args.seed)
    if args.train_decoder == "full":
        print("🧠 Training the full decoder, without LoRA...")
        trained = train_fully(model, training_args.compute_dtype, **encoders)
    else:
        print("🧠 Adding LoRA Adapters...")
        if args.adapter_path and not on_meta:
            trained = load_adapter(model, args.adapter_path, dropout=args.lora_dropout)
        else:
            with torch.device(device):
                trained = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, **encoders)
        if training_args.bf16:
            skip_input_casts(trained)
    print_trainable_parameters(trained)
    return model, trained, base_fingerprint


def make_ready(model: SpeechMixin, args: ModelArguments, training_args: VQATrainingArguments, every_n: int) -> None:
    """Prepare a built model for training: spread it over the ranks, recompute its activations, compile its layers."""
    if training_args.world_size > 1 and args.train_decoder == "full":
        shard(model, training_args)
    set_recomputation(model, every_n)
    if args.compile_layers:
        compile_decoder(model)
    if args.use_liger_kernel:
        use_liger(model)


def choose_layout(base: str, asked: str | None) -> str:
    """The prompt layout to train: that `asked` for, else that of the base if it was trained here, else plain."""
    folder = resolve_model_dir(base)
    stored = load_settings(folder)["input"] if (folder / SETTINGS_FILE).is_file() else {}
    layout = asked or stored.get("prompt_layout", "plain")
    theirs = stored.get("prompt_layout", layout)
    other = f"; {base} was trained with {theirs}" if theirs != layout else ""
    print(f"   Prompt layout: {layout}{other}" + ("" if asked else " (--prompt_layout names another)"))
    return layout


def build_datasets(
    train_rows: Sequence[VQARow], eval_rows: Sequence[VQARow], processor: VQAProcessor, args: DataArguments, seed: int
) -> tuple[SurgicalVQADataset, SurgicalVQADataset | None]:
    """The datasets of training and, where there are rows, of evaluation; VQAError where a sample is too long."""
    print(f"📁 Loading Train Data: {args.train_data_path}")
    jitter = {"speech_token_jitter": args.speech_token_jitter, "seed": seed}  # of the silence behind the speech
    train = SurgicalVQADataset(train_rows, processor, max_train_frames=args.max_train_frames, with_index=True, **jitter)
    evaluation = None
    limit = args.max_eval_frames
    if eval_rows:
        print(f"📁 Loading Eval Data: {args.eval_data_path}")
        evaluation = SurgicalVQADataset(eval_rows, processor, max_eval_frames=limit, is_eval=True, with_index=True)
        if limit is not None and any(len(row.frames) > limit for row in eval_rows):
            print(f"   Using {limit} frames (evenly sampled) to reduce eval memory")
    raise_problems(train.find_too_long() + (evaluation.find_too_long() if evaluation else []))
    return train, evaluation


def make_trainer(
    trained: SpeechMixin | PeftModel,
    datasets: tuple[SurgicalVQADataset, SurgicalVQADataset | None],
    settings: dict,
    multiple: int,
    callbacks: Sequence[TrainerCallback],
    args: VQATrainingArguments,
    stop_signal: StopSignal,
) -> VQATrainer:
    """The Trainer of a run; `multiple` as in `VQACollator`."""
    tokenizer = datasets[0].processor.tokenizer
    return VQATrainer(
        model=trained,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=VQACollator(tokenizer.pad_token_id, multiple=multiple),
        tokenizer=tokenizer,
        callbacks=list(callbacks),
        settings=settings,
        stop_signal=stop_signal,
    )


def finish(trainer: VQATrainer, memory: PeakMemory, target: StopAtLoss | None) -> int:
    """Save what training ended with, evaluate it where no evaluation was asked for before, and upload it; returns the
    exit status."""
    args, stop_signal = trainer.args, trainer.stop_signal
    trainer.save_final()
    gather(args, None)  # until rank 0 has written
    if not stop_signal.agree() and trainer.eval_dataset is not None and args.eval_strategy == "no":
        with contextlib.suppress(Interrupted):
            print(trainer.evaluate())
    if stop_signal.agree():
        text = f"training had ended, and {args.output_dir} is complete" + ", and not uploaded" * args.upload
        raise Interrupted(stop_signal.signum, text)
    if memory.gib:
        each = gather(args, memory.gib)
        peaks = {phase: max(one[phase] for one in each) for phase in memory.gib}
        print("Peak GPU memory: " + ", ".join(f"{phase} {gib:.1f} GiB" for phase, gib in peaks.items()))
    if args.load_best_model_at_end:
        print(name_final_step(args, trainer.state, trainer.early_stopping))
    what = "adapter, projector" if isinstance(trainer.model, PeftModel) else "the full model"
    print(f"Saved {what}, tokenizer and {SETTINGS_FILE} to {args.output_dir}")
    failed = bool(target and not target.reached)
    if failed:
        print(f"error: the loss did not fall below --target_train_loss {target.target}", file=sys.stderr)
    if args.upload:
        trainer.uploader.send_final()
    return int(failed or trainer.uploader.failed > 0)


def name_final_step(args: VQATrainingArguments, state: TrainerState, early_stopping: EarlyStoppingCallback) -> str:
    """Which step the final model is from with --load_best_model_at_end, and why, in a line."""
    metric = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    end = f"training ended at step {state.global_step}"
    misses = early_stopping.early_stopping_patience_counter
    if misses >= early_stopping.early_stopping_patience:
        count = f"{misses} evaluation{'s' * (misses > 1)}"
        end = f"stopped early at step {state.global_step}, after {count} without improvement"
    if state.best_model_checkpoint is None:
        return f"Final model: of step {state.global_step}, the last; no checkpoint was the best by {metric}; {end}"
    step = int(Path(state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    value = next(entry[metric] for entry in state.log_history if entry["step"] == step and metric in entry)
    line = f"Final model: of step {step}, the best by {metric} = {value:.4g}"
    if step != state.best_global_step:
        line += f" with a checkpoint (step {state.best_global_step} had {state.best_metric:.4g}, but was not saved)"
    return f"{line}; {end}"


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: VQATrainingArguments, stop_signal: StopSignal
) -> int:
    """The steps of `main` after the arguments; returns the exit status."""
    # 2. What is cheap to check: where it is uploaded to, what the run resumes from, the files of the model
    if training_args.upload and not data_args.dry_run and training_args.process_index == 0:
        name = training_args.hub_model_id or Path(training_args.output_dir).resolve().name
        where = {"private": training_args.hub_private_repo, "revision": training_args.hub_revision}
        training_args.hub_model_id = open_repo(name, **where, token=training_args.hub_token)
    checkpoint = by_first(training_args, find_checkpoint, training_args)
    stored = load_settings(checkpoint) if checkpoint else {}
    if "started_from" in stored:
        model_args.base_seed = stored["model"]["init_seed"]
    data_args.prompt_layout = choose_layout(model_args.model_name_or_path, data_args.prompt_layout)
    tokenizer, config = by_first(training_args, check_model, model_args, training_args)
    processor = VQAProcessor(tokenizer, config, **{name: getattr(data_args, name) for name in PROCESSOR_FIELDS})
    digests = read_digests(resolve_model_dir(model_args.model_name_or_path), model_args.adapter_path, checkpoint)
    settings_of = partial(resolved_settings, model_args, data_args, training_args, processor)
    if checkpoint:
        refuse_other_settings(checkpoint, settings_of(stored["model"].get("base_fingerprint")))

    # 3. Data, before any weight is loaded; model and datasets
    train_rows, eval_rows, skipped = by_first(training_args, prepare_data, data_args)
    training_args.eval_answers = min(training_args.eval_answers, len(eval_rows))
    device = "meta" if data_args.dry_run else training_args.device
    model, trained, base_fingerprint = build_model(model_args, training_args, tokenizer, device)
    datasets = build_datasets(train_rows, eval_rows, processor, data_args, training_args.seed)

    # 4. The plan, which is all that --dry_run asks for
    every_n = plan(model, datasets, together(model_args, data_args, training_args))
    if data_args.dry_run:
        return 0
    make_ready(model, model_args, training_args, every_n)
    if data_args.cache_features:
        store = FeatureStore(data_args.cache_features, model, processor, data_args.speech_token_jitter)
        present = [dataset for dataset in datasets if dataset]
        store.fill(present)
        for dataset in present:
            dataset.feature_store = store

    # 5. Training
    settings = settings_of(base_fingerprint, skipped)
    settings["data"] |= describe_data(data_args, train_rows, eval_rows)
    if checkpoint:
        refuse_other_settings(checkpoint, settings)
        print(f"Resuming from {checkpoint}")
    memory = PeakMemory()
    target = StopAtLoss(data_args.target_train_loss) if data_args.target_train_loss is not None else None
    callbacks, multiple = [memory, *filter(None, [target])], model_args.padding_multiple
    trainer = make_trainer(trained, datasets, settings, multiple, callbacks, training_args, stop_signal)
    trainer.digests |= digests or set()
    marker = Path(training_args.output_dir) / STARTED_FILE
    if training_args.should_save and model_args.adapter_path:
        marker.write_text(f"{model_args.adapter_path}\n", encoding="utf-8")
    elif training_args.should_save and not checkpoint and marker.is_file():
        marker.unlink()
    trainer.train_safely(checkpoint)

    # 6. Results
    return finish(trainer, memory, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    # 1. Arguments
    # Else a batch that is longer than all before makes the allocator give back and ask anew for most of its memory.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with contextlib.ExitStack() as stack:
        if is_other_rank():
            stack.enter_context(silent())
        model_args, data_args, training_args = parse_arguments(sys.argv[1:] if argv is None else list(argv))
        if not data_args.dry_run:  # which may plan for another card
            limit_gpu_memory(model_args.gpu_memory_limit_gib)
        stop_signal = stack.enter_context(StopSignal(args=training_args))
        if data_args.check_data:
            prepare_data(data_args)
            return 0
        if not data_args.dry_run and training_args.should_save:
            stack.enter_context(lock_folder(training_args.output_dir))
        try:
            return train(model_args, data_args, training_args, stop_signal)
        except Exception as error:
            stop_signal.follow(error)
            raise


def run(entry) -> None:
    """Exit with the status of `entry()`; a VQAError becomes its text and status 1, without a traceback. Of several
    ranks the first that fails says so, and rank 0 says what stopped them."""
    failed = False
    try:
        status = entry()
    except Interrupted as stop:
        end_bars()
        if not is_other_rank():
            print(stop, file=sys.stderr)
        status = 128 + stop.signum
    except SystemExit as end:
        failed, status = True, end.code
    except Exception as error:
        failed, status = True, 1
        if is_first_to_fail():
            end_bars()
            known = isinstance(error, VQAError)
            lines = [f"error: {line}" for line in str(error).splitlines()] if known else [traceback.format_exc()]
            print(*lines, sep="\n", file=sys.stderr)
            if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # with which torchrun ends what it says itself
                said = {"message": "\n".join(lines), "timestamp": int(time.time())}
                Path(report).write_text(json.dumps(said), encoding="utf-8")
    finally:
        end_workers()
    if dist.is_initialized():
        if failed:  # an exit by Python would wait for operations that the other ranks will never end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def end_bars() -> None:
    """End the lines of progress bars that an error left open: its own line begins one."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def end_workers() -> None:
    """Kill loader workers that outlived their loader (--dataloader_persistent_workers): they hold nothing. As it exits,
    Python would send them a SIGTERM, which they ignore, and wait for them without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a failure
    for worker in multiprocessing.active_children():
        worker.kill()


if __name__ == "__main__":
    run(main)
