"""Ways to decode that evaluate_checkpoint.py does not use; generate_speed.py measures them."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_vqa as vqa


@contextlib.contextmanager
def grouped_attention() -> Iterator[None]:
    """Compute the query heads that share a key head as several queries of one head, for one new token.

    With a mask, transformers' sdpa repeats keys and values for every query head, at each step and layer; this does not.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def grouped(module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows, heads, length, size = query.shape
        if length > 1 or attention_mask is None:
            return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        queries = query.reshape(rows, key.shape[1], -1, size)
        mask = attention_mask.expand(-1, -1, queries.shape[2], -1)
        mixed = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
        return mixed.reshape(rows, 1, heads, size), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


class FixedCache:
    """Keys and values in buffers [rows, heads, width, head size], one pair per layer; those of a new token go to
    `place`."""

    def __init__(self, like: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int):
        rows, heads, _, size = like[0][0].shape
        self.layers = [tuple(part.new_zeros(rows, heads, width, size) for part in pair) for pair in like]
        self.place = torch.zeros(1, dtype=torch.long, device=like[0][0].device)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values [rows, heads, 1, head size] of a new token; returns the full buffers."""
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer.index_copy_(2, self.place, new)
        return self.layers[layer]


class GraphStep:
    """One step of decoding on fixed buffers; on a GPU a CUDA graph from its second run on."""

    def __init__(self, model, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int):
        self.model, self.cache, self.width = model, FixedCache(layers, width), width
        rows, device = len(layers[0][0]), layers[0][0].device
        self.ids, self.positions = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.mask = torch.zeros(rows, 1, 1, width, dtype=torch.bool, device=device)
        self.warm, self.graph = False, None

    def load(self, lengths: Sequence[int], ids: torch.Tensor, positions: torch.Tensor, layers: list) -> None:
        """Take over what `prefill` returns; empties `layers`."""
        filled, places = max(lengths), torch.arange(self.width, device=ids.device)
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.cache.place.fill_(filled)
        starts = filled - torch.tensor(lengths, device=ids.device)
        self.mask[:, 0, 0] = (places >= starts[:, None]) & (places < filled)
        for index in range(len(layers)):
            for buffer, part in zip(self.cache.layers[index], layers[index], strict=True):
                buffer[:, :, :filled] = part
            layers[index] = None

    def run(self) -> None:
        """Read the last tokens, choose the next ones."""
        self.mask.index_fill_(3, self.cache.place, True)
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self.ids[:, None]),
            attention_mask={"full_attention": self.mask},
            position_ids=self.positions.expand(3, -1)[..., None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.ids.copy_(self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1))
        self.positions += 1
        self.cache.place += 1

    def __call__(self) -> torch.Tensor:
        """The next token of each row, int64 [rows]."""
        if not self.warm or self.ids.device.type != "cuda":
            self.run()
            self.warm = True
            return self.ids.clone()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.run()
        self.graph.replay()
        return self.ids.clone()


class GraphDecoder:
    """`answer_batch` with one `GraphStep` per number of rows, made for the first batch, which is the longest."""

    def __init__(self):
        self.steps: dict[int, GraphStep] = {}

    def __call__(
        self, model, samples: Iterable[dict], pad_token_id: int, stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[tuple[list[int], str]]:
        """As `answer_batch`, for answers that all have `max_new_tokens` tokens (no `stop_ids`)."""
        with torch.inference_mode(), grouped_attention():
            lengths, ids, positions, layers = vqa.prefill(model, samples, pad_token_id)
            if not lengths:
                return []
            step = self.steps.get(len(lengths))
            if step is None or step.width < max(lengths) + max_new_tokens:
                step = self.steps[len(lengths)] = GraphStep(model, layers, max(lengths) + max_new_tokens)
            step.load(lengths, ids, positions, layers)
            produced = [ids, *(step() for _ in range(max_new_tokens - 1))]
        return [(tokens, "length") for tokens in torch.stack(produced, dim=1).tolist()]


def answer_by_library(
    model, samples: Iterable[dict], pad_token_id: int, stop_ids: Sequence[int], max_new_tokens: int
) -> list[tuple[list[int], str]]:
    """As `answer_batch`, by transformers' `generate` on one batch that is padded on the left."""
    if not (samples := list(samples)):
        return []
    batch = vqa.VQACollator(pad_token_id, "left")(samples)
    with torch.inference_mode():
        inputs = vqa.on_device(batch, model.device)
        stops = list(stop_ids) or None
        decoding = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_token_id
        )
        new = model.generate(**inputs, generation_config=decoding)[:, inputs["input_ids"].shape[1] :].tolist()
    answers = []
    for ids in new:
        end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        answers.append((ids, "length") if end is None else (ids[: end + 1], "eos"))
    return answers
