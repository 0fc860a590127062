"""The model that lm-evaluation-harness asks: its HFLM around what `segattn evaluate` loads, reading piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...runs.errors import SettingError
from ..huggingface.cache import InfiniCache
from ..huggingface.settings import is_converted
from .loading import Loaded, PretrainedTokenizer, load
from .reading import PIECE_TOKENS, longest_text, piece_len, segment_len_of
from .settings import Source

# what HFLM would load a model by, and ignores in silence where it is handed one
OF_LOADING = (
    *("backend", "revision", "subfolder", "trust_remote_code", "use_fast_tokenizer", "gguf_file"),
    *("peft", "delta", "autogptq", "gptqmodel", "load_in_8bit", "load_in_4bit", "tp_plan"),
    *("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
)
# more tokens than any text has
UNBOUNDED = 2**40


class SegattnLM(HFLM):  # type: ignore[misc]
    """HFLM for converted models, and for plain ones to compare them with.

    A prompt is read in pieces, so that a converted model needs the same memory for each length, and is never cut: a
    converted model has no longest text.

    Args:
        pretrained: folder or name, as of `segattn evaluate`; or what `load` returned.
        max_length: tokens of the longest prompt with its answer, beyond which lm-eval cuts prompts on the left. None:
            nothing is cut, and a plain model is refused prompts that are longer than its positions.
        batch_size: prompts to read at once, or "auto": as many as give a converted model a segment of each in a piece.
        piece: tokens of a prompt to read at once, whole segments. None: about 4096 of all that are read at once.
        on_answers: called with the number of prompts of each batch that is answered; lm-eval's bar is then off.
        options: fields of `Source`, and arguments of HFLM.

    Attributes:
        longest: tokens of the longest prompt so far; may be set to 0.

    Raises:
        SettingError: an option with which HFLM would load the model itself, or one that cannot be.
    """

    def __init__(
        self,
        pretrained: str | Loaded,
        max_length: int | None = None,
        batch_size: int | str = 1,
        piece: int | None = None,
        on_answers: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        _check_options(options)
        of_source = {name: options.pop(name) for name in [x.name for x in fields(Source)] if name in options}
        loaded = load(Source(pretrained, **of_source)) if isinstance(pretrained, str) else pretrained
        bound = longest_text(loaded.model)
        if max_length is not None and bound is not None and max_length > bound:
            raise SettingError(
                "max_length",
                f"must be at most the {bound} positions of a model that is not converted, got {max_length}: convert it",
            )
        self.piece, self.on_answers, self.longest = piece, on_answers, 0
        self.cuts = max_length is not None
        piece_len(loaded.model, piece)
        super().__init__(
            pretrained=loaded.model,
            tokenizer=tokenizer_of(loaded),
            max_length=max_length or bound or UNBOUNDED,
            batch_size=batch_size,
            backend="causal",
            **options,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests, as HFLM does."""
        answers: list[str] = super().generate_until(requests, disable_tqdm or self.on_answers is not None)
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts and their mask, as HFLM does, cut to `left_truncate_len` tokens if at all.

        Raises:
            ValueError: a prompt would be cut, and no `max_length` says so.
        """
        most = left_truncate_len if self.cuts else None
        ids, mask = super().tok_batch_encode(strings, padding_side, most, truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            raise ValueError(
                f"length must leave prompts of at most {left_truncate_len} tokens to a model that is not converted, "
                f"got one of {ids.shape[1]}: convert it, or read shorter texts"
            )
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Read prompts [B, T] piece by piece and go on with them, as HFLM does after reading them at once."""
        piece = piece_len(self.model, self.piece, len(context))
        if context.shape[1] > piece:
            options["prefill_chunk_size"] = piece
            if is_converted(self.model):
                # transformers 5.0 makes none for pieces
                options["past_key_values"] = InfiniCache(self.model)
        tokens: Tensor = super()._model_generate(context, max_length, stop, **options)
        self.longest = max(self.longest, context.shape[1])
        if self.on_answers is not None:
            self.on_answers(len(context))
        return tokens

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Return the prompts to generate from at once: HFLM would try 64 of the greatest length, read at once."""
        segment = segment_len_of(self.model)
        if segment is None or requests is not None:
            return int(super()._detect_batch_size(requests, pos))
        return max(1, min(self.max_batch_size, PIECE_TOKENS // segment))


def tokenizer_of(loaded: Loaded) -> Any:
    """Return a model's tokenizer as one of transformers; that of bytes has NUL as the end of a text and as padding."""
    if isinstance(loaded.tokenizer, PretrainedTokenizer):
        return loaded.tokenizer.tokenizer
    letters = bytes_to_unicode()
    made = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0], pad_token=letters[0])


def _check_options(options: Mapping[str, Any]) -> None:
    """Check that nothing is asked for that HFLM would do while loading the model, which then had no memory.

    Raises:
        SettingError: naming the first such option.
    """
    for name in OF_LOADING:
        if options.get(name):
            raise SettingError(
                name,
                f"must be left out, got {options[name]!r}: with it lm_eval loads the model itself, without its memory",
            )
