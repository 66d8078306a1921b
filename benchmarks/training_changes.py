"""Changes to training that have no flag: each undoes one of our optimizations, or is an experiment that is not used.

`train_speed.py --design "NAME=@all_logits ..."` measures a design with them; nothing else uses them.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

import train_vqa as vqa

LENGTH_MULTIPLE = 64  # for `one_length`; larger than the 23 tokens by which samples with `--audio_tokens full` differ


@contextlib.contextmanager
def all_logits() -> Iterator[None]:
    """Logits at every position, [B, T, vocabulary], and transformers' loss over them."""
    forward = vqa.SurgicalVQAModel.forward

    def plain(self, labels=None, num_items_in_batch=None, **inputs):
        output = forward(self, **inputs, use_cache=False)
        size = self.config.text_config.vocab_size
        output.loss = self.loss_function(output.logits, labels, size, num_items_in_batch=num_items_in_batch)
        return output

    with patch.object(vqa.SurgicalVQAModel, "forward", plain):
        yield


@contextlib.contextmanager
def input_casts() -> Iterator[None]:
    """PEFT casts the input of every adapter to float32."""
    build = vqa.build_model

    def casting(*args):
        built = build(*args)
        for module in built[1].modules():
            if isinstance(module, vqa.BaseTunerLayer):
                module.cast_input_dtype_enabled = True
        return built

    with patch.object(vqa, "build_model", casting):
        yield


@contextlib.contextmanager
def ones_mask() -> Iterator[None]:
    """The model gets a mask of ones with every batch."""
    collate = vqa.VQACollator.__call__

    def masked(self, samples):
        batch = collate(self, samples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    with patch.object(vqa.VQACollator, "__call__", masked):
        yield


@contextlib.contextmanager
def kv_cache() -> Iterator[None]:
    """In training the decoder keeps a cache of keys and values, in layers that are not recomputed."""
    forward = qwen.Qwen2VLTextModel.forward

    def keeping(self, *args, **kwargs):
        return forward(self, *args, **{**kwargs, "use_cache": True})

    with patch.object(qwen.Qwen2VLTextModel, "forward", keeping):
        yield


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """Allow only cuDNN's attention kernel; sdpa otherwise chooses among this, FlashAttention's and others."""
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.cudnn_sdp_enabled()
    switches = kernels.enable_flash_sdp, kernels.enable_mem_efficient_sdp, kernels.enable_cudnn_sdp
    for switch, on in zip(switches, (False, False, True), strict=True):
        switch(on)
    try:
        yield
    finally:
        for switch, on in zip(switches, before, strict=True):
            switch(on)


def compiling(**options) -> contextlib.AbstractContextManager:
    """`torch.compile` with these options, which override those of the call."""
    compiler = torch.compile

    def compiled(*args, **kwargs):
        return compiler(*args, **{**kwargs, **options})

    return patch.object(torch, "compile", compiled)


@contextlib.contextmanager
def one_length() -> Iterator[None]:
    """Batches padded to a multiple of LENGTH_MULTIPLE, and layers compiled separately for each length."""
    with patch.object(vqa, "PADDING_MULTIPLE", LENGTH_MULTIPLE), compiling(dynamic=False):
        yield


@contextlib.contextmanager
def cuda_graphs() -> Iterator[None]:
    """Compiled layers as CUDA graphs; gradients are summed in place, because a graph overwrites its earlier output."""
    add_lora, zero_grad = vqa.add_lora, torch.nn.Module.zero_grad

    def with_gradients(*args, **kwargs):
        model = add_lora(*args, **kwargs)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        return model

    with (
        compiling(mode="reduce-overhead"),
        patch.object(vqa, "add_lora", with_gradients),
        patch.object(torch.nn.Module, "zero_grad", lambda self, set_to_none=True: zero_grad(self, False)),
    ):
        yield


CHANGES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    change.__name__: change
    for change in (all_logits, input_casts, ones_mask, kv_cache, cudnn_attention, one_length, cuda_graphs)
}
