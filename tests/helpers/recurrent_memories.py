"""Small recurrent memories around an encoder, a decoder, and a model that is not of Hugging Face."""

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from segattn.rmt.recurrent.memory import RecurrentMemory

M, L = 3, 7
FIRST, SEPARATOR = 1, 2


def decoder(name: str = "llama", **options: Any) -> RecurrentMemory:
    if name in ("gpt2", "gpt_bigcode") and options.get("attention") and models.VERSION < (5, 8):
        pytest.skip("it tells its attention nothing in older transformers")
    torch.manual_seed(1)
    return RecurrentMemory(models.double(models.make(name)), M, L, **options)


def encoder(head: str = "SequenceClassification", classes: int = 5, **options: Any) -> RecurrentMemory:
    config = transformers.BertConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=L + M + 3,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"BertFor{head}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return RecurrentMemory(model, M, L, **{"special_tokens": (FIRST, SEPARATOR), **options})


class Plain(nn.Module):
    """A model that is not of Hugging Face: one layer of attention, with the caller's mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 16)
        self.mix = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        time = inputs_embeds.shape[1]
        position = torch.linspace(0, 1, 40)[:time, None].to(inputs_embeds)
        q, k, v = (self.mix(inputs_embeds + position) * 3)[:, None].chunk(3, -1)
        return inputs_embeds + self.out(F.scaled_dot_product_attention(q, k, v, attention_mask)[:, 0])


def plain_module(kind: str = "decoder", **options: Any) -> RecurrentMemory:
    torch.manual_seed(0)
    model = Plain().double()
    head = nn.Linear(16, models.VOCABULARY).double()
    return RecurrentMemory(model, M, L, kind=kind, embedding=model.embedding, head=head, **options)


def bert(kind: str = "BertLMHeadModel", **options: Any) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**sizes, intermediate_size=32, **options)).eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ragged(lengths: list[int], side: str, width: int) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : length if side == "right" else width] = 1
        if side == "left":
            mask[row, : width - length] = 0
    return mask
