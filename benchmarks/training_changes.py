"""Changes to training that have no flag: one exact lever of ours undone, or a way tried and not kept.

`train_speed.py --design "NAME=@all_logits ..."` measures a design under them; nothing else uses them.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

import train_vqa as vqa

LENGTH_MULTIPLE = 64  # of `one_length`; above the 23 tokens by which samples with `--audio_tokens full` differ


@contextlib.contextmanager
def all_logits() -> Iterator[None]:
    """Logits of every position, [B, T, vocabulary], and transformers' loss over them."""
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
    """A mask of ones goes to the model with every batch of one."""
    collate = vqa.VQACollator.__call__

    def masked(self, samples):
        batch = collate(self, samples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    with patch.object(vqa.VQACollator, "__call__", masked):
        yield


@contextlib.contextmanager
def kv_cache() -> Iterator[None]:
    """The decoder keeps a cache of keys and values in training, where a layer is not recomputed."""
    forward = qwen.Qwen2VLTextModel.forward

    def keeping(self, *args, **kwargs):
        return forward(self, *args, **{**kwargs, "use_cache": True})

    with patch.object(qwen.Qwen2VLTextModel, "forward", keeping):
        yield


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """cuDNN's attention kernel alone, where sdpa else chooses among its own, FlashAttention's and others."""
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
    """`torch.compile` with these options over those that it is called with."""
    compiler = torch.compile

    def compiled(*args, **kwargs):
        return compiler(*args, **{**kwargs, **options})

    return patch.object(torch, "compile", compiled)


@contextlib.contextmanager
def one_length() -> Iterator[None]:
    """Compiled layers for batches padded to a multiple of LENGTH_MULTIPLE, each length compiled for alone."""
    with patch.object(vqa, "PADDING_MULTIPLE", LENGTH_MULTIPLE), compiling(dynamic=False):
        yield


@contextlib.contextmanager
def cuda_graphs() -> Iterator[None]:
    """Compiled layers as CUDA graphs; gradients are summed in place, since a graph writes over what it put out."""
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
