"""Any model that takes embeddings, called in one way."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .recurrent.block_attention import Block
from .recurrent.layout import Layout, block_mask
from .recurrent.settings import Settings


class Outputs(NamedTuple):
    """hidden: the last layer's rows [B, T, d]. logits: [B, T, C], [B, C], or None. cache: keys and values so far."""

    hidden: Tensor
    logits: Tensor | None
    cache: Any


def huggingface_of(model: nn.Module) -> Any:
    """The Hugging Face model that `model` is, or wraps (compiled, with adapters); None where there is none."""
    for module in model.modules():
        # told by name, so that other modules need no transformers
        if any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
            return module
    return None


def kind_of(model: nn.Module) -> str:
    """ "decoder" where the model's attention is causal or it generates text, "encoder" where a row sees later ones.

    Raises:
        ValueError: it cannot be told from the model.
    """
    inner = huggingface_of(model)
    untold = f"kind must be 'decoder' or 'encoder' for a {type(model).__name__}, which does not tell"
    if inner is None:
        raise ValueError(untold)
    causal = _says_causal(inner)
    if True in causal or inner.can_generate():
        return "decoder"
    if False in causal or _sees_ahead(inner):
        return "encoder"
    raise ValueError(untold)


def _says_causal(model: nn.Module) -> set[bool]:
    """What the parts of a model say of themselves."""
    said = (getattr(module, "is_causal", None) for module in model.modules())
    return {causal for causal in said if isinstance(causal, bool)}


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Whether a row changes with one that comes after it."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None or weight.is_meta:
        return False
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    other = torch.cat((x[:3], -x[3:]))
    with _evaluating(model):
        first, second = (run(model, rows[None], {}, True).hidden[0, 0] for rows in (x, other))
    return bool((first != second).any())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, then each of its modules as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def embedding_of(model: nn.Module) -> nn.Module:
    """What turns token ids into vectors.

    Raises:
        ValueError: there is none.
    """
    inner = huggingface_of(model)
    embedding = None if inner is None else inner.get_input_embeddings()
    if not isinstance(embedding, nn.Module) or getattr(embedding, "weight", None) is None:
        raise ValueError(
            f"model must have input embeddings, got {type(model).__name__} without: pass embedding= (token ids to "
            "vectors), with weight [tokens, d]"
        )
    return embedding


def check_model(model: nn.Module) -> None:
    """See that it is one model, whose attention is its own.

    Raises:
        TypeError: it is none.
        ValueError: it is an encoder and a decoder, or `segattn.convert` has changed it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner = huggingface_of(model)
    # the encoder of such a model has the configuration of both
    if inner is not None and "decoder_input_ids" in accepted(model):
        raise ValueError(
            f"model must be an encoder or a decoder, got {type(inner).__name__}, which is both: pass one of them"
        )
    # a plain model keeps the entry of a converted one's configuration, as transformers loads and makes it
    if getattr(getattr(inner, "config", None), "_attn_implementation", None) == "segattn":
        raise ValueError(
            "model must keep its own attention, got that of segattn.convert: segattn.revert first, or, if only the "
            "configuration is a converted model's, make the model from type(config).from_dict(config.to_dict())"
        )


def check_sight(model: nn.Module, kind: str, masked: bool) -> None:
    """See that rows see what they are to see.

    Args:
        masked: whether a decoder is given a mask, which hides later rows.

    Raises:
        ValueError: an encoder's do not see later ones, or a decoder's do.
    """
    inner = huggingface_of(model)
    if inner is None:
        return
    says_causal = True in _says_causal(inner)
    if kind == "encoder" and says_causal and not _sees_ahead(inner):
        raise ValueError(f"kind must be 'decoder' for a {type(inner).__name__}, whose rows do not see later ones")
    if kind == "decoder" and not masked and not says_causal and _sees_ahead(inner):
        raise ValueError(
            f"mask must be 'paper' for a {type(inner).__name__}, whose rows see later ones: pass that, or set "
            "is_decoder=True in a configuration that has it"
        )


def check_positions(model: nn.Module, rows: int, extra: int) -> None:
    """See that a segment fits the positions that the model knows.

    Raises:
        ValueError: it does not.
    """
    inner = huggingface_of(model)
    known = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    for name, module in () if inner is None else inner.named_modules():
        # RoBERTa counts positions from one past the padding's on
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            known = module.num_embeddings - module.padding_idx - 1
    # XLNet's is -1: it has no table
    if isinstance(known, int) and 0 < known < rows:
        raise ValueError(
            f"segment_len must be at most {known - extra}, since the model knows {known} positions and {extra} go to "
            f"memory and special tokens, got {rows - extra}"
        )


def check_windows(model: nn.Module, rows: int, extra: int) -> None:
    """See that every layer of a decoder sees a whole segment.

    Raises:
        ValueError: it does not.
    """
    config = getattr(huggingface_of(model), "config", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # GPT-Neo's names
    if "local" in getattr(config, "attention_layers", ()):
        window, kinds = getattr(config, "window_size", None), None
    if isinstance(window, int) and rows > window and (kinds is None or "sliding_attention" in kinds):
        raise ValueError(
            f"segment_len must be at most {window - extra}, since the model has layers with a window of {window} rows "
            f"and {extra} go to memory, got {rows - extra}: shorten the segment, or widen the window in the "
            "configuration"
        )


def check_widths(model: nn.Module) -> None:
    """See that what the last layer gives can be an embedding again.

    Raises:
        ValueError: it is wider or narrower.
    """
    config = getattr(huggingface_of(model), "config", None)
    inside, outside = getattr(config, "hidden_size", None), getattr(config, "embedding_size", None)
    if outside is not None and outside != inside:
        raise ValueError(
            f"model must have embeddings as wide as its layers, {inside}, got {outside}: memory goes from the last "
            "layer to the first"
        )


def accepted(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that the model's forward takes."""
    inner = huggingface_of(model)
    return frozenset(inspect.signature((model if inner is None else inner).forward).parameters)


class Caller(NamedTuple):
    """How a model is called with the rows of a segment.

    layout: where the tokens stand among a segment's rows.
    accepts: the arguments that it takes.
    huggingface: whether it is, or wraps, a Hugging Face model.
    fused: whether its attention is told the block mask.
    """

    model: nn.Module
    settings: Settings
    layout: Layout
    accepts: frozenset[str]
    huggingface: bool
    fused: bool

    @property
    def caches(self) -> bool:
        """Whether keys and values can be kept between calls."""
        return "past_key_values" in self.accepts and "use_cache" in self.accepts

    def segment(self, rows: Tensor, ends: Tensor | None, with_logits: bool) -> Outputs:
        """A whole segment, rows [B, T, d], those behind `ends` [B] padding; logits are the tokens', or a row's one."""
        arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in self.accepts else {}
        choosy = "logits_to_keep" in self.accepts
        if choosy:
            at = torch.arange(rows.shape[1], device=rows.device)
            arguments["logits_to_keep"] = self.layout.tokens_of(at[None])[0] if with_logits else 1
        if self.settings.kind == "decoder":
            arguments |= self._decoder_mask(rows, ends, 0, True)
        else:
            arguments |= {"attention_mask": self._encoder_mask(rows, ends)}
        out = run(self.model, rows, arguments, self.huggingface)
        if choosy or out.logits is None or out.logits.ndim == 2:
            return out
        return out._replace(logits=self.layout.tokens_of(out.logits))

    def newest(self, rows: Tensor, writes: bool, cache: Any) -> Outputs:
        """The newest rows [B, n, d] of a growing segment; the cache holds those before them.

        Args:
            writes: whether the last rows are the memory's, so that the segment is whole.
        """
        past = 0 if cache is None else cache.get_seq_length()
        arguments = self._decoder_mask(rows, None, past, writes)
        if "logits_to_keep" in self.accepts:
            arguments["logits_to_keep"] = 1
        if self.caches:
            return run(self.model, rows, arguments | {"use_cache": True, "past_key_values": cache}, self.huggingface)
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        return run(self.model, rows, arguments, self.huggingface)._replace(cache=None)

    @torch.no_grad()
    def check_mask(self) -> None:
        """See that a model keeps to a mask that lets its memory rows see each other.

        Raises:
            ValueError: it does not, or takes none.
        """
        inner = huggingface_of(self.model)
        weight = None if inner is None else inner.get_input_embeddings().weight
        if self.settings.mask != "paper" or self.fused or weight is None or weight.is_meta:
            return
        # [read, read | token | write, write]
        blocks = self._replace(model=inner, settings=replace(self.settings, num_memory_tokens=2, segment_len=2))
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        others = [x + 2 * x.roll(1, 1) * (torch.arange(5) == row)[:, None].to(x) for row in (1, 4)]
        try:
            with _evaluating(inner):
                # one by one, so that equal rows come out equal to the bit
                plain, read, write = (
                    run(inner, rows[None], blocks._decoder_mask(rows[None], None, 0, True), True).hidden[0]
                    for rows in (x, *others)
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"mask must be 'causal' for a {type(inner).__name__}, which takes no mask [1, 1, T, T] ({reason})"
            ) from None
        changed = [(hidden != plain).any(1).tolist() for hidden in (read, write)]
        if changed != [[True] * 5, [False, False, False, True, True]]:
            raise ValueError(
                f"mask must be 'causal' for a {type(inner).__name__}, whose attention does not keep to a mask given"
            )

    def _decoder_mask(self, rows: Tensor, ends: Tensor | None, past: int, writes: bool) -> dict[str, Any]:
        queries, time = rows.shape[1], past + rows.shape[1]
        read = self.settings.num_memory_tokens if self.settings.mask == "paper" else 0
        write = read if writes else 0
        if self.fused:
            spans = None if ends is None else torch.stack((torch.zeros_like(ends), ends), 1).int()
            return {"segattn_block": Block(read, write, spans)}
        # a causal model sees no padding, which stands behind all else, and a single new row sees everything
        if self.huggingface and (not read or (past and queries == 1)):
            return {}
        visible = block_mask(time, read, write, ends, queries=queries, device=rows.device)
        if not self.huggingface:
            return {"attention_mask": visible}
        mask = {"attention_mask": additive(visible, rows.dtype)}
        if "position_ids" not in self.accepts:
            return mask
        return mask | {"position_ids": torch.arange(past, time, device=rows.device)[None]}

    def _encoder_mask(self, rows: Tensor, ends: Tensor | None) -> Tensor | None:
        batch, time = rows.shape[:2]
        at = torch.arange(time, device=rows.device)
        real = None if ends is None else at < ends[:, None]
        if self.huggingface:
            return None if real is None else real.long()
        if real is None:
            return torch.ones(1, 1, time, time, dtype=torch.bool, device=rows.device)
        return real[:, None, None].expand(batch, 1, time, time)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool → 0 where visible, the least number of `dtype` elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def run(model: nn.Module, x: Tensor, arguments: dict[str, Any], huggingface: bool) -> Outputs:
    """One pass over embeddings [B, T, d].

    Raises:
        TypeError: the model returns neither hidden rows nor a tensor of them.
    """
    asked = {"output_hidden_states": True, "return_dict": True} if huggingface else {}
    out = model(inputs_embeds=x, **arguments, **asked)
    if isinstance(out, Tensor):
        return Outputs(out, None, None)
    states = getattr(out, "hidden_states", None)
    hidden = states[-1] if states is not None else getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise TypeError(
            f"model must return the hidden rows [B, T, d], or an object with hidden_states or last_hidden_state, got "
            f"{type(out).__name__}"
        )
    return Outputs(hidden, getattr(out, "logits", None), getattr(out, "past_key_values", None))
