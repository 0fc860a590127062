"""Train on long texts over several processes, and write log, checkpoints, figures and model."""

from __future__ import annotations

import json
import math
import os
import statistics
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from ...runs.checkpoint import InterruptedRunError, SettingError
from ...runs.figures import prepare, versions, write_figures
from ..evaluate.loading import ByteTokenizer, PretrainedTokenizer, Source, Tokenizer
from ..evaluate.loading import load as load_model
from ..finetune.runs import FREE, Listener, choose_trained, convert_plain, keep_lines
from ..huggingface.saving import save_pretrained
from ..huggingface.settings import conversion_of
from ..sharding import runs_of
from . import checkpoints
from .processes import agreed, deferred_stop, is_first, largest, mesh_of
from .settings import LongSettings
from .stream import START, Position, Rows
from .trainer import LongTrainer

# with --resume; not what steps that are done have made use of, but for rates, of which each step has its own
MAY_CHANGE = (*FREE, "sequence_ranks", "gradient_checkpointing", "steps", "lr", "gate_lr", "warmup")


class Outputs(NamedTuple):
    """Where a run's files are: a line of JSON per step, the figures of all, checkpoints, the model's folder."""

    log: Path
    figures: Path
    checkpoints: Path
    model: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """The files of a run in `folder`."""
        return cls(folder / "log.jsonl", folder / "figures.json", folder / "checkpoints", folder / "model")


def run_long_training(
    settings: LongSettings,
    folder: Path,
    listener: Listener,
    device: torch.device,
    *,
    keep: int = 2,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, on every rank of the default process group together.

    Args:
        folder: the same one for all processes.
        listener: told of each step on this rank.
        device: of this process.
        keep: checkpoints that stay.
        resume: go on from the newest checkpoint, on as many ranks as there are now. Of the settings, `steps`, `lr`,
            `gate_lr` and `warmup` may be others: the steps still to come have the rates of a run that had these from
            its first step. So may `gradient_checkpointing`, `sequence_ranks`, `device` and `save_every`, and the
            places of model, tokenizer and text, if they hold the same. The others must be the checkpoint's.

    Returns:
        The figures.

    Raises:
        SettingError: on every rank: a setting that cannot be, or with `resume`, one that is not the checkpoint's.
        InterruptedRunError: on every rank: one of them was told to stop, and the checkpoint is written.
        RuntimeError: a process has ended, or does not answer within the group's timeout.
    """
    outputs = Outputs.of(folder)
    if keep < 1:
        raise SettingError("keep", f"must be at least 1, got {keep}")
    mesh = mesh_of(device, settings.sequence_ranks)
    model, tokenizer, rows, saved = agreed(lambda: _prepare(settings, outputs, mesh, resume))
    trainer = LongTrainer(model, settings, mesh, device)
    if saved is not None:
        checkpoints.load(trainer, outputs.checkpoints, saved["step"])
    _train(trainer, rows, outputs, listener, keep)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        save_pretrained(model, outputs.model, state_dict=whole)
        if isinstance(tokenizer, PretrainedTokenizer):
            tokenizer.tokenizer.save_pretrained(outputs.model)
    return _figures(settings, outputs, model, device)


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run whose checkpoints are in `folder`.

    Raises:
        SettingError: of `resume`, where there is none.
    """
    settings = checkpoints.about(Outputs.of(folder).checkpoints)["settings"]
    if settings.keys() != LongSettings.__dataclass_fields__.keys():
        raise SettingError(
            "resume", f"needs a checkpoint of this version, and that of {str(folder)!r} has other settings"
        )
    return dict(settings)


def _prepare(
    settings: LongSettings, outputs: Outputs, mesh: DeviceMesh, resume: bool
) -> tuple[Any, Tokenizer, Rows, dict[str, Any] | None]:
    """What a run begins with, by itself on each rank; the first one's files."""
    rows_each, sequences = mesh.size(1), mesh.size(0)
    if settings.batch % sequences:
        raise SettingError(
            "batch",
            f"must be a multiple of the {sequences} groups of {rows_each} ranks that read rows of their own, got "
            f"{settings.batch}: choose another, or more --sequence-ranks",
        )
    saved = checkpoints.about(outputs.checkpoints) if resume else None
    if saved is not None:
        for name, value in asdict(settings).items():
            if name not in MAY_CHANGE and saved["settings"].get(name) != value:
                raise SettingError(
                    name, f"must be the checkpoint's with --resume, {saved['settings'].get(name)!r}, got {value!r}"
                )
        if settings.steps < saved["step"]:
            raise SettingError(
                "steps", f"must be at least the {saved['step']} of the checkpoint with --resume, got {settings.steps}"
            )
    if is_first():
        prepare(outputs.log, resume)
    model, tokenizer = build_model(settings)
    try:
        runs_of(settings.length, rows_each, conversion_of(model).settings.segment_len)
    except ValueError as error:
        raise SettingError("length", f"is too short: {error}") from None
    rows = Rows(settings, tokenizer, START if saved is None else Position(*saved["position"]))
    if saved is not None and is_first() and saved["rows"] != rows.fingerprint:
        name = "dataset" if settings.text is None else "text"
        raise SettingError(name, "must hold the tokens of the checkpoint's with --resume, got others")
    return model, tokenizer, rows, saved


def build_model(settings: LongSettings) -> tuple[Any, Tokenizer]:
    """The converted model, on the CPU, and its tokenizer.

    Raises:
        SettingError: naming the setting.
    """
    tokenizer: Tokenizer = ByteTokenizer()
    if settings.model:
        source = Source(settings.model, tokenizer=settings.tokenizer, dtype="float32", device="cpu")
        model, tokenizer, _ = load_model(source)
    else:
        model = _llama(settings)
    convert_plain(model, settings)
    if native := conversion_of(model).native:
        raise SettingError(
            "model", f"must be one whose every layer is converted, got layers {list(native)} that are not"
        )
    choose_trained(model, settings)
    return model, tokenizer


def _llama(settings: LongSettings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": settings.width,
        "intermediate_size": 3 * (settings.width or 0),
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.length,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))


def _train(trainer: LongTrainer, rows: Rows, outputs: Outputs, listener: Listener, keep: int) -> None:
    settings, place = trainer.settings, _place(trainer.settings, trainer.mesh)
    if is_first():
        keep_lines(outputs.log, trainer.step)
    opened = outputs.log.open("a", encoding="utf-8") if is_first() else nullcontext()
    with deferred_stop() as caught, opened as log:
        while trainer.step < settings.steps:
            figures = trainer.advance(rows.read)
            stop, seconds, peak = largest(bool(caught), figures["seconds"], _peak_bytes(trainer.device))
            figures |= {
                "seconds": seconds,
                "tokens_per_second": settings.accumulate * settings.batch * settings.length / seconds,
                "peak_bytes": int(peak),
                **place,
            }
            if log is not None:
                log.write(json.dumps(figures) + "\n")
                log.flush()
            listener.trained(trainer.step, settings.steps, figures)
            done = trainer.step == settings.steps
            if stop or done or trainer.step % settings.save_every == 0:
                about = {
                    "step": trainer.step,
                    "position": rows.position,
                    "rows": rows.fingerprint,
                    "settings": asdict(settings),
                }
                checkpoints.save(trainer, outputs.checkpoints, about, keep)
            if stop and not done:
                raise InterruptedRunError


def _peak_bytes(device: torch.device) -> int:
    """The most that tensors took of the GPU, or the process of the machine; 0 where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _place(settings: LongSettings, mesh: DeviceMesh) -> dict[str, Any]:
    """What speed and memory depend on, of all that may change when a run is gone on with."""
    return {
        "ranks": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        "device": torch.cuda.get_device_name() if mesh.device_type == "cuda" else "cpu",
        "gradient_checkpointing": settings.gradient_checkpointing,
    }


def _figures(settings: LongSettings, outputs: Outputs, model: Any, device: torch.device) -> dict[str, Any]:
    """Of the whole run, from its log; the first rank writes them, and the others have none.

    Speed and memory are those of all steps on such ranks as the last step's.
    """
    if not is_first():
        return {}
    lines: list[dict[str, Any]] = [json.loads(line) for line in outputs.log.read_text("utf-8").splitlines()]
    place = {name: lines[-1][name] for name in ("ranks", "device", "gradient_checkpointing")}
    timed = [line for line in lines if place.items() <= line.items()]
    median = statistics.median(line["seconds"] for line in timed)
    tokens = settings.accumulate * settings.batch * settings.length
    figures = {
        "settings": asdict(settings),
        "versions": versions(),
        **place,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "conversion": conversion_of(model).settings.as_entry(),
        "dtype": str(settings.product_dtype(device)).removeprefix("torch."),
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "loss": lines[-1]["loss"],
        "seconds": sum(line["seconds"] for line in lines),
        "timed_steps": len(timed),
        "tokens_per_second": tokens / median,
        "tokens_per_second_and_rank": tokens / median / math.prod(place["ranks"].values()),
        "peak_bytes": max(line["peak_bytes"] for line in timed),
    }
    write_figures(outputs.figures, figures)
    return figures
