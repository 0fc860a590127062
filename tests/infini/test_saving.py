"""Converted models saved and loaded: whole, as gates alone, through PEFT, copied, and from damaged files."""

from __future__ import annotations

import copy
import io
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from models import CONFIGS, NAMES, VERSION, make
from torch_defaults import defaults

from segattn import RecurrentMemory
from segattn.infini.huggingface.conversion import convert, revert
from segattn.infini.huggingface.saving import from_pretrained, load_gates, save_gates, save_pretrained
from segattn.infini.huggingface.settings import conversion_of, is_converted
from segattn.infini.huggingface.static_cache import StaticInfiniCache

L = 7
# three layers of three heads, whatever a type calls them
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24},
    **{"n_layer": 3, "n_head": 3, "n_embd": 24, "word_embed_proj_dim": 24, "layer_types": ["full_attention"] * 3},
}
KINDS = (*NAMES, "llama tied")


def plain(kind: str = "llama", **changes: Any) -> Any:
    name, _, tied = kind.partition(" ")
    sizes = {key: size for key, size in SIZES.items() if key in CONFIGS[name][1]}
    if name == "deepseek_v3":
        # whose keys are made for every query head
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return make(name, **sizes | {"tie_word_embeddings": bool(tied) or name == "gpt2"} | changes)


def gates(model: nn.Module) -> dict[str, Tensor]:
    return {name: gate for name, gate in model.state_dict().items() if "segattn_gate" in name}


def with_random_gates(model: Any) -> Any:
    with torch.no_grad():
        for gate in gates(model).values():
            gate.normal_()
    return model


def converted(kind: str = "llama", changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    settings = {"segment_len": L, "quiet": True} | settings
    return with_random_gates(convert(plain(kind, **(changes or {})), **settings))


def with_gates_of(model: Any, other: Any) -> Any:
    """Return `other` with the gates of `model`."""
    with torch.no_grad():
        for gate, wanted in zip(gates(other).values(), gates(model).values(), strict=True):
            gate.copy_(wanted)
    return other


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (2, 4 * L + 3))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(ids, use_cache=False).logits


def assert_same(model: Any, other: Any, ids: Tensor) -> None:
    assert conversion_of(model).settings == conversion_of(other).settings
    ours, theirs = gates(model), gates(other)
    assert list(ours) == list(theirs)
    assert all(gate.dtype == torch.float32 and torch.equal(gate, theirs[name]) for name, gate in ours.items())
    assert torch.equal(logits(model, ids), logits(other, ids))


def snapshot(model: Any) -> tuple[Any, ...]:
    """Return everything that must not change when something is refused."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return state, hooks, model.config.to_dict(), model.config._attn_implementation, is_converted(model)


def assert_unchanged(model: Any, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert after[1:] == before[1:]


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@pytest.fixture
def heard() -> Any:
    """Record what transformers logs, which it does not pass on to pytest."""
    logger, handler = logging.getLogger("transformers"), Heard()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_model(kind: str, tmp_path: Path, ids: Tensor) -> None:
    model = converted(kind, update="linear" if kind == "phi3" else "delta", empty_memory="local")
    with torch.no_grad():
        assert not torch.equal(logits(model, ids), logits(plain(kind), ids))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, quiet=True)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(model, loaded, ids)
    torch.testing.assert_close(
        model.generate(ids[:, : L + 2], max_new_tokens=L, do_sample=False),
        loaded.generate(ids[:, : L + 2], max_new_tokens=L, do_sample=False),
        rtol=0,
        atol=0,
    )


def test_all_settings_come_back(tmp_path: Path, ids: Tensor) -> None:
    model = converted(segment_len=5, update="linear", gate_init=-1.5, layers=[-1, 0], empty_memory="gated")
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(str(tmp_path), backend="reference", quiet=True)
    settings = conversion_of(loaded).settings
    assert (settings.segment_len, settings.update, settings.gate_init) == (5, "linear", -1.5)
    assert (settings.layers, settings.empty_memory, settings.backend) == ((0, 2), "gated", "reference")
    assert list(gates(loaded)) == [f"model.layers.{layer}.self_attn.segattn_gate.bias" for layer in (0, 2)]
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


@pytest.mark.skipif(VERSION < (5,), reason="transformers 4 makes rotary angles in the default dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path: Path, ids: Tensor) -> None:
    model, other = converted(), plain()
    with defaults(dtype=dtype):
        save_pretrained(model, tmp_path)
        save_gates(model, tmp_path / "gates")
        assert_same(model, load_gates(from_pretrained(tmp_path, quiet=True), tmp_path / "gates"), ids)
        assert_same(model, load_gates(other, tmp_path / "gates", quiet=True), ids)


def test_nothing_that_is_written_pickles(tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_shards(tmp_path: Path, ids: Tensor) -> None:
    model = converted()
    save_pretrained(model, tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({shard for key, shard in index.items() if "segattn_gate" in key}) > 1
    assert_same(model, from_pretrained(tmp_path, quiet=True), ids)


def test_variant_and_subfolder(tmp_path: Path, ids: Tensor) -> None:
    model = converted()
    for name, size in (("whole", "1GB"), ("shards", "10KB")):
        save_pretrained(model, tmp_path / name, variant="ours", max_shard_size=size)
        assert_same(model, from_pretrained(tmp_path, subfolder=name, variant="ours", quiet=True), ids)


@pytest.mark.parametrize("convert_sliding", [False, True])
def test_sliding_layers_stay_as_they_were(convert_sliding: bool, tmp_path: Path, ids: Tensor) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = plain("gemma3_text", sliding_window=4, layer_types=kinds)
    with_random_gates(convert(model, L, convert_sliding=convert_sliding, quiet=True))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, quiet=True)
    assert conversion_of(loaded).settings.layers == ((0, 1, 2) if convert_sliding else (1,))
    assert_same(model, loaded, ids)


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16])
def test_gates_are_exact_in_bfloat16(saved_in: torch.dtype, tmp_path: Path, ids: Tensor) -> None:
    model = converted().to(saved_in)
    assert any(not torch.equal(gate, gate.bfloat16().float()) for gate in gates(model).values())
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16, quiet=True)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    # unlike `.bfloat16()`, loading leaves the rotary frequencies in float32
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again = with_gates_of(model, convert(again, L, quiet=True))
    assert_same(again, loaded, ids)


def test_trunk_alone(tmp_path: Path, ids: Tensor) -> None:
    """Save a decoder without its head, and load it with a head: the keys then have a prefix that the file lacks."""
    model = converted("gpt2")
    save_pretrained(model.transformer, tmp_path)
    trunk = from_pretrained(tmp_path, model_class=transformers.AutoModel, quiet=True)
    want = model.transformer(ids, use_cache=False).last_hidden_state
    assert torch.equal(trunk(ids, use_cache=False).last_hidden_state, want)
    # the output matrix is the embedding
    assert torch.equal(logits(from_pretrained(tmp_path, quiet=True), ids), logits(model, ids))


def test_state_dict_of_the_caller(tmp_path: Path, ids: Tensor) -> None:
    model = converted()
    save_pretrained(model, tmp_path / "whole", state_dict=model.state_dict())
    assert_same(model, from_pretrained(tmp_path / "whole", quiet=True), ids)
    state = model.state_dict()
    del state["model.layers.1.self_attn.segattn_gate.bias"]
    with pytest.raises(ValueError, match=r"state_dict must hold one gate for each .* lacks those of \[1\]"):
        save_pretrained(model, tmp_path / "less", state_dict=state)
    assert not (tmp_path / "less").exists()


def test_loaded_without_segattn_it_says_what_is_missing(tmp_path: Path, heard: Heard, ids: Tensor) -> None:
    model = converted()
    save_pretrained(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["segment_attention"]
    assert entry["load_with"] == "segattn.from_pretrained"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(gates(model))
    assert "segattn_gate.bias" in heard.text
    assert loaded.config.segment_attention["load_with"] == "segattn.from_pretrained"
    # it is then the model before conversion, and can be converted or given its gates
    assert torch.equal(logits(loaded, ids), logits(plain(), ids))
    save_gates(model, tmp_path / "gates.safetensors")
    assert_same(model, load_gates(loaded, tmp_path / "gates.safetensors", quiet=True), ids)


def test_loaded_without_segattn_it_is_a_plain_model_whatever_its_configuration_says(
    tmp_path: Path, ids: Tensor
) -> None:
    save_pretrained(converted(), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, ids), logits(plain(), ids))
    for call in (revert, lambda model: save_gates(model, tmp_path / "gates")):
        with pytest.raises(
            ValueError, match=r"makes plain models of such .* with segattn\.from_pretrained, or call segat"
        ):
            call(model)
    assert RecurrentMemory(model, 2, L)(ids).logits.shape == (*ids.shape, 61)
    assert not hasattr(revert(convert(model, L, quiet=True)).config, "segment_attention")
    assert torch.equal(logits(model, ids), logits(plain(), ids))


def test_loading_reports_other_keys_but_not_gates(tmp_path: Path, heard: Heard) -> None:
    save_pretrained(converted(), tmp_path)
    from_pretrained(tmp_path, quiet=True)
    # earlier ones report in another form, which is let through
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert "segattn_gate" not in heard.text
    held = safetensors_torch.load_file(tmp_path / "model.safetensors")
    safetensors_torch.save_file(held | {"stranger": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    from_pretrained(tmp_path, quiet=True)
    assert "stranger" in heard.text


def test_conversion_is_announced_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(converted(), tmp_path)
    capsys.readouterr()
    from_pretrained(tmp_path)
    assert "converted 3/3 attention layers of LlamaForCausalLM" in capsys.readouterr().err


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be converted, got a LlamaForCausalLM that is not"):
        save_pretrained(plain(), tmp_path / "model")
    with pytest.raises(TypeError, match=r"transformers PreTrainedModel without adapters, got Sequential"):
        save_pretrained(nn.Sequential(converted()), tmp_path / "model")
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        save_pretrained(converted(), tmp_path / "model", safe_serialization=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        save_pretrained(converted(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_plain_checkpoint(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"plain checkpoint.*load it with transformers and call segattn.convert"):
        from_pretrained(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        from_pretrained(tmp_path)
    save_pretrained(converted(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        from_pretrained(tmp_path)


def test_loading_takes_no_other_settings(tmp_path: Path) -> None:
    # before the checkpoint is looked for
    with pytest.raises(ValueError, match=r"layers, segment_len must be left out: .* segattn\.revert the loaded model"):
        from_pretrained(tmp_path / "nowhere", segment_len=32, layers=[0])


@pytest.mark.parametrize("refused", [{"use_safetensors": False}, {"output_loading_info": True}])
def test_arguments_that_are_refused(refused: dict[str, Any], tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    with pytest.raises(ValueError, match="output_loading_info must be False"):
        from_pretrained(tmp_path, **refused)
    with pytest.raises(ValueError, match="backend"):
        from_pretrained(tmp_path, backend="abacus")


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 3}, r"^\S+config.json: segment_attention must be of version 1 or 2, got 3$"),
    "update": ({"update": "gamma"}, "update"),
    "segment_len": ({"segment_len": "7"}, "segment_len"),
    "no layers": ({"layers": None}, "damaged"),
    "other layers": ({"layers": [0, 1, 3]}, "must name every layer once"),
    "layer twice": ({"layers": [0, 1, 1, 2]}, "must name every layer once"),
    "fewer layers": (
        {"layers": [0, 1], "memory_layers": [0, 1], "native": [2]},
        r"\['model.layers.2.self_attn.segattn_gate.bias'\] should not",
    ),
    "more layers": ({"layers": [0, 1, 2, 3], "memory_layers": [0, 1, 2, 3]}, r"lacks those of \[3\]"),
    "deeper": ({"native": [3]}, "must be of a model of 3 layers, got one of 4"),
}


@pytest.mark.parametrize("change", ENTRIES)
def test_settings_that_are_not_right(change: str, tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    changes, message = ENTRIES[change]
    config = json.loads((tmp_path / "config.json").read_text())
    config["segment_attention"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_settings_that_lack_something(tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("update", "native"):
        lacking = copy.deepcopy(config)
        del lacking["segment_attention"][name]
        (tmp_path / "config.json").write_text(json.dumps(lacking))
        with pytest.raises(ValueError, match=rf"config.json: segment_attention .*{name}"):
            from_pretrained(tmp_path)


FIRST = "model.layers.0.self_attn.segattn_gate.bias"
GATES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({FIRST: None}, r"lacks those of \[0\]"),
    "extra": (
        {"model.layers.3.self_attn.segattn_gate.bias": torch.zeros(3)},
        r"\['model.layers.3.*should not be there",
    ),
    "twice": ({"layers.0.self_attn.segattn_gate.bias": torch.zeros(3)}, "should not be there"),
    "other name": ({"model.layers.0.self_attn.segattn_gate.weight": torch.zeros(3)}, "should not be there"),
    "other heads": ({FIRST: torch.zeros(4)}, rf"{FIRST} must be of shape \[3\].*got \[4\]"),
    "integers": ({FIRST: torch.zeros(3, dtype=torch.int32)}, r"got \[3\] of torch.int32"),
}


@pytest.mark.parametrize("change", GATES)
def test_gates_that_are_not_right(change: str, tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    changes, message = GATES[change]
    held = safetensors_torch.load_file(tmp_path / "model.safetensors") | changes
    held = {key: tensor for key, tensor in held.items() if tensor is not None}
    safetensors_torch.save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as raised:
        from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_truncated_weights(tmp_path: Path) -> None:
    save_pretrained(converted(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors must be a safetensors file, got a damaged"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gates_alone(kind: str, tmp_path: Path, ids: Tensor) -> None:
    model = converted(kind, update="linear", layers=[0, 2])
    file = tmp_path / "gates.safetensors"
    save_gates(model, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_size < 1000
    fresh = load_gates(plain(kind), str(file), quiet=True)
    assert_same(model, fresh, ids)
    # on one that is converted, also where it began elsewhere
    other = convert(plain(kind), L, update="linear", gate_init=3.0, layers=[0, 2], quiet=True)
    parameters = list(other.parameters())
    assert load_gates(other, file) is other
    assert all(ours is theirs for ours, theirs in zip(other.parameters(), parameters, strict=True))
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_gates_alone_stay_float32(tmp_path: Path, ids: Tensor) -> None:
    model = converted().bfloat16()
    save_gates(model, tmp_path / "gates")
    assert_same(model, load_gates(plain().bfloat16(), tmp_path / "gates", quiet=True), ids)


def test_gates_alone_of_sliding_layers(tmp_path: Path, ids: Tensor) -> None:
    model = convert(plain("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1), L, quiet=True)
    assert conversion_of(model).settings.layers == (0,)
    revert(model)
    with_random_gates(convert(model, L, convert_sliding=True, quiet=True))
    save_gates(model, tmp_path / "gates")
    fresh = plain("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert_same(model, load_gates(fresh, tmp_path / "gates", quiet=True), ids)


def test_gates_of_an_interrupted_save_are_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gates"
    model = converted()
    save_gates(model, file)
    before = file.read_bytes()
    write = Path.write_bytes

    def interrupted(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_gates(with_random_gates(model), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def rewritten(file: Path, entry: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None) -> None:
    """Change some of the settings and tensors in a file of gates."""
    with pytest.importorskip("safetensors").safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    held = safetensors_torch.load_file(file) | (tensors or {})
    metadata["segment_attention"] = json.dumps(json.loads(metadata["segment_attention"]) | (entry or {}))
    kept = {key: tensor for key, tensor in held.items() if tensor is not None}
    safetensors_torch.save_file(kept, file, metadata)


TAMPERED: dict[str, tuple[dict[str, Any], str]] = {
    "other heads": (
        {"tensors": {f"{layer}.segattn_gate.bias": torch.zeros(4) for layer in range(3)}},
        r"0.segattn_gate.bias must be of shape \[3\].*got \[4\]",
    ),
    "a gate missing": ({"tensors": {"1.segattn_gate.bias": None}}, r"lacks those of \[1\]"),
    "a gate more": ({"tensors": {"3.segattn_gate.bias": torch.zeros(3)}}, "3.segattn_gate.bias.* should not be there"),
    "integers": ({"tensors": {"1.segattn_gate.bias": torch.zeros(3, dtype=torch.int64)}}, "of torch.int64"),
    "deeper": ({"entry": {"native": [3, 4]}}, "must be of a model of 3 layers, got one of 5"),
    "version": ({"entry": {"version": 99}}, "must be of version 1 or 2, got 99"),
    "update": ({"entry": {"update": None}}, "update"),
    "layers": ({"entry": {"layers": "all"}}, "must name every layer once"),
}


@pytest.mark.parametrize("on", ["plain", "converted"])
@pytest.mark.parametrize("change", TAMPERED)
def test_tampered_gates(change: str, on: str, tmp_path: Path) -> None:
    file = tmp_path / "gates"
    save_gates(converted(), file)
    changes, message = TAMPERED[change]
    rewritten(file, **changes)
    model = plain() if on == "plain" else converted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as raised:
        load_gates(model, file)
    assert str(file) in str(raised.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("on", ["plain", "converted"])
def test_damaged_gates(on: str, tmp_path: Path) -> None:
    file = tmp_path / "gates"
    save_gates(converted(), file)
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    model = plain() if on == "plain" else converted()
    before = snapshot(model)
    damaged = [b"", whole[:5], whole[: header // 2], whole[:-1], whole + b"1", b"\xff" * 8 + whole[8:]]
    pickled = io.BytesIO()
    torch.save({"0.segattn_gate.bias": torch.zeros(3)}, pickled)
    for content in [*damaged, pickled.getvalue()]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"gates must be a safetensors file, got a damaged.*save it again"):
            load_gates(model, file)
        assert_unchanged(model, before)
    settings = {"segment_attention": "{"}
    safetensors_torch.save_file({"0.segattn_gate.bias": torch.zeros(3)}, file, settings)
    with pytest.raises(ValueError, match="gates: segment_attention is damaged"):
        load_gates(model, file)
    safetensors_torch.save_file({"0.segattn_gate.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"gates must be a file that segattn.save_gates wrote"):
        load_gates(model, file)
    with pytest.raises(ValueError, match="got a folder"):
        load_gates(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_gates(model, tmp_path / "nothing")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_len": 8}, "converted with segment_len=8, as this one is, got 7"),
        ({"update": "linear"}, "update='linear', as this one is, got 'delta'"),
        ({"layers": [0, 2]}, r"layers=\(0, 2\), as this one is, got \(0, 1, 2\)"),
        ({"empty_memory": "gated"}, "empty_memory='gated', as this one is, got 'local'"),
    ],
)
def test_gates_of_other_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_gates(converted(), tmp_path / "gates")
    model = converted(**settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_gates(model, tmp_path / "gates")
    assert_unchanged(model, before)


def test_gates_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "gates"
    save_gates(converted(), file)
    others = {
        r"shape \[2\].*got \[3\]": plain(num_attention_heads=2),
        "of a model of 2 layers, got one of 3": plain(num_hidden_layers=2),
        "at most the 6 learnt positions": plain("gpt2", n_positions=6),
    }
    for message, model in others.items():
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_gates(model, file)
        assert_unchanged(model, before)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        load_gates(nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="model must be converted"):
        save_gates(plain(), file)


def test_partitioned_gates(tmp_path: Path) -> None:
    """DeepSpeed leaves parameters without elements outside of their modules' forward."""
    model = converted()
    save_gates(model, tmp_path / "gates")
    model.model.layers[1].self_attn.segattn_gate.bias.data = torch.zeros(0)
    with pytest.raises(ValueError, match=r"1.segattn_gate.bias must be of shape \[3\].*got \[0\]"):
        save_gates(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    before = snapshot(model)
    with pytest.raises(ValueError, match="model must not be sharded or partitioned yet"):
        load_gates(model, tmp_path / "gates")
    assert_unchanged(model, before)


def test_offloaded_gates(tmp_path: Path, ids: Tensor) -> None:
    """accelerate leaves parameters without values outside of their modules' forward."""
    accelerate = pytest.importorskip("accelerate")
    model, want = converted(), converted()
    save_gates(want, tmp_path / "gates")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = logits(model, ids)
    for refused in (
        lambda: save_gates(model, tmp_path / "none"),
        lambda: save_pretrained(model, tmp_path / "none"),
        lambda: load_gates(model, tmp_path / "gates"),
        lambda: StaticInfiniCache(model),
    ):
        with pytest.raises(ValueError, match=r"model must have its weights.*remove_hook_from_submodules\(model\)"):
            refused()
    assert not (tmp_path / "none").exists()
    assert torch.equal(logits(model, ids), before)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(load_gates(model, tmp_path / "gates"), want, ids)


def test_a_model_spread_over_memory_and_disk_is_saved(tmp_path: Path, ids: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, want = converted(), converted()
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
    accelerate.dispatch_model(
        model, places | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=tmp_path / "off", force_hooks=True
    )
    assert any(parameter.is_meta for parameter in model.model.layers[1].parameters())
    save_pretrained(model, tmp_path / "saved")
    assert_same(from_pretrained(tmp_path / "saved", quiet=True), want, ids)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_gates(tmp_path: Path, ids: Tensor) -> None:
    """Gather the gates that FSDP2 has sharded when they are saved; they must be loaded before they are sharded."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, want = converted(), converted()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(gate, DTensor) for gate in gates(model).values())
    save_gates(model, tmp_path / "gates")
    assert_same(want, load_gates(plain(), tmp_path / "gates", quiet=True), ids)
    with pytest.raises(ValueError, match="model must not be sharded or partitioned yet"):
        load_gates(model, tmp_path / "gates")


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["segattn_gate"])
    return peft.get_peft_model(model, config)


def trained(model: Any, ids: Tensor) -> Any:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        optimiser.zero_grad()
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
    return model.eval()


def active(model: Any) -> dict[int, Tensor]:
    return {
        layer: block.self_attn.segattn_gate.modules_to_save["default"].bias.detach().clone()
        for layer, block in enumerate(model.base_model.model.model.layers)
    }


def test_lora_trains_saves_and_reloads_gates(tmp_path: Path, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    base = converted()
    untrained = copy.deepcopy(base)
    before = dict(enumerate(gates(untrained).values()))
    model = trained(adapted(base), ids)
    after = active(model)
    assert all(not torch.equal(after[layer], before[layer]) for layer in range(3))
    want = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(untrained, ids))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(untrained, tmp_path)
    assert all(torch.equal(gate, after[layer]) for layer, gate in active(again).items())
    assert torch.equal(logits(again, ids), want)


def test_gates_of_a_model_with_lora(tmp_path: Path, ids: Tensor) -> None:
    file = tmp_path / "gates"
    model = trained(adapted(converted()), ids)
    after = active(model)
    save_gates(model, file)
    assert all(torch.equal(gate, after[int(key[0])]) for key, gate in safetensors_torch.load_file(file).items())
    # to the adapter in use, and to no other
    other = adapted(converted())
    originals = [
        block.self_attn.segattn_gate.original_module.bias.clone() for block in other.base_model.model.model.layers
    ]
    load_gates(other, file)
    assert all(torch.equal(gate, after[layer]) for layer, gate in active(other).items())
    for block, original in zip(other.base_model.model.model.layers, originals, strict=True):
        assert torch.equal(block.self_attn.segattn_gate.original_module.bias, original)
    with model.disable_adapter():
        save_gates(model, file)
    kept = safetensors_torch.load_file(file)["0.segattn_gate.bias"]
    assert torch.equal(kept, model.base_model.model.model.layers[0].self_attn.segattn_gate.original_module.bias)


def test_merged_lora_keeps_gates(tmp_path: Path, ids: Tensor) -> None:
    model = trained(adapted(converted()), ids)
    with pytest.raises(TypeError, match=r"without adapters, got PeftModel.*merge_and_unload"):
        save_pretrained(model, tmp_path)
    after, want = active(model), logits(model, ids)
    merged = model.merge_and_unload()
    assert all(torch.equal(gate, after[layer]) for layer, gate in enumerate(gates(merged).values()))
    torch.testing.assert_close(logits(merged, ids), want)
    save_pretrained(merged, tmp_path)
    assert_same(merged, from_pretrained(tmp_path, quiet=True), ids)


def test_adapter_added_by_transformers_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = converted()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="without adapters"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_copy_is_a_model_of_its_own(kind: str, ids: Tensor) -> None:
    model = converted(kind)
    # a forward pass must leave nothing behind that cannot be copied
    model.train()(ids, labels=ids).loss.backward()
    model.eval()
    want, written = logits(model, ids), model.generate(ids[:, :L], max_new_tokens=L, do_sample=False)
    other = copy.deepcopy(model)
    assert_same(model, other, ids)
    with torch.no_grad():
        for gate in gates(other).values():
            gate.add_(1.0)
    assert not torch.equal(logits(other, ids), want)
    assert torch.equal(logits(model, ids), want)
    revert(other)
    assert torch.equal(logits(other, ids), logits(plain(kind), ids))
    assert torch.equal(logits(model, ids), want)
    assert torch.equal(model.generate(ids[:, :L], max_new_tokens=L, do_sample=False), written)
    revert(model)
    assert torch.equal(logits(model, ids), logits(plain(kind), ids))


def test_a_pickled_model_is_a_model_of_its_own(ids: Tensor) -> None:
    """Pickle a model, as copies between processes do; it is not how to save one."""
    model = converted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_same(model, other, ids)
    revert(other)
    assert torch.equal(logits(other, ids), logits(plain(), ids))
    assert conversion_of(model) is not None
