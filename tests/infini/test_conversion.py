"""`convert` and `revert`: what a converted model computes, and what it leaves as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from models import CHOSEN, NAMES, OPTIONS, VERSION, converted, double, make, open_gates, tokens
from torch_defaults import defaults

import segattn
from segattn.infini.huggingface import interface
from segattn.infini.huggingface.settings import conversion_of
from segattn.infini.rotary import unrotate
from segattn.kernels import reference
from segattn.kernels.state import HeadBiases, MemoryState, Options

L = 16


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_definition_on_the_models_own_queries_keys_and_values(
    name: str, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = double(converted(name, L, update))
    calls, seen, plain = [], [], []
    for module in [module for module in model.modules() if hasattr(module, "segattn_gate")]:
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, _ = interface.segment_attention_forward(module, q, k, v, mask, **kwargs)
        scale, softcap, sinks = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
        seen.append((module, q, k, v, scale or k.shape[-1] ** -0.5, softcap, sinks, out))
        return out, None

    def without_positions(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain.append((q, k))
        return q.new_zeros(*q.shape[:1], *q.shape[2:0:-1], v.shape[-1]), None

    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, "segattn", spy)
    logits(model, tokens(2, 53))
    # the same calls again, in which nothing is rotated
    monkeypatch.setitem(functions, "segattn", without_positions)
    home = sys.modules[type(calls[0][0]).__module__]
    for function in [function for function in vars(home) if function.startswith("apply_rotary")]:
        monkeypatch.setattr(home, function, lambda q, k, *args, **kwargs: (q, k))
    for module, args, kwargs in calls[:]:
        module(*args, **kwargs)
    assert len(seen) == len(plain) == 2
    assert {softcap for *_, softcap, _, _ in seen} == {2.0 if name == "gemma2" else None}
    assert sum(sinks is not None for *_, sinks, _ in seen) == {"gpt_oss": 2, "mimo_v2_flash": 1}.get(name, 0)
    # some rotate in float32, whatever their dtype
    tolerance = 1e-6 if name in ("cohere", "cohere2", "llama4_text") else 1e-9
    for (module, q, k, v, scale, softcap, sinks, out), (memory_q, memory_k) in zip(seen, plain, strict=True):
        if name == "opt":
            memory_q = memory_q / module.scaling
        state = MemoryState.zeros(2, k.shape[1], k.shape[3], v.shape[3], dtype=torch.float64)
        options = Options(L, update, True, 0, 0, "local", scale, softcap)
        gate = module.segattn_gate().double()
        inputs, biases = (q, k, v, memory_q, memory_k, gate, state, None, None), HeadBiases(sink_logits=sinks)
        wanted, _ = reference.reference_attention(*inputs, biases, options)
        torch.testing.assert_close(
            out.transpose(1, 2), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item()
        )


@pytest.mark.parametrize("name", NAMES)
def test_up_to_one_segment_nothing_changes_and_revert_undoes_everything(name: str) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config, short, long = model.config.to_dict(), tokens(2, L), tokens(2, 3 * L + 5)
    original = logits(model, short), logits(model, long)
    segattn.convert(model, L, quiet=True, **OPTIONS.get(name, {}))
    open_gates(model)
    torch.testing.assert_close(logits(model, short), original[0], rtol=0, atol=2e-5)
    assert (logits(model, long)[:, L:] - original[1][:, L:]).abs().max() > 1e-3
    assert segattn.revert(model) is model
    assert torch.equal(logits(model, short), original[0])
    assert torch.equal(logits(model, long), original[1])
    assert model.config.to_dict() == config
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_up_to_one_segment_learnt_sinks_are_trained_as_before() -> None:
    model, ids = double(make("gpt_oss")), tokens(2, L)

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {
            name: x.grad.clone() for name, x in model.named_parameters() if name.endswith(("sinks", "q_proj.weight"))
        }

    before = grads()
    segattn.convert(model, L, quiet=True)
    after = grads()
    assert len(before) == 4
    for name, grad in before.items():
        assert grad.abs().min() > 0
        torch.testing.assert_close(after[name], grad, rtol=1e-9, atol=1e-12)


def test_converted_again_after_revert() -> None:
    model = converted()
    ids = tokens(1, 40)
    once = logits(model, ids)
    segattn.convert(segattn.revert(model), L, quiet=True)
    open_gates(model)
    assert torch.equal(logits(model, ids), once)


@pytest.mark.parametrize("name", CHOSEN)
def test_no_token_sees_a_later_one_and_every_one_sees_the_first(name: str) -> None:
    model, ids = converted(name), tokens(1, 3 * L + 3)
    other = ids.clone()
    changed = 2 * L + 4
    other[:, changed:] = (other[:, changed:] + 5) % 50 + 3
    assert torch.equal(logits(model, ids)[:, :changed], logits(model, other)[:, :changed])
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 7) % 50 + 3
    assert (logits(model, ids) != logits(model, other)).any(-1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_equals_the_row_alone(name: str) -> None:
    model, ids = converted(name), tokens(2, 45)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    left = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(left[0, 9:], logits(model, ids[:1, 9:])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left[1], logits(model, ids[1:])[0], rtol=1e-4, atol=1e-4)
    right = logits(model, ids, attention_mask=mask.flip(1))
    torch.testing.assert_close(right[0, :-9], logits(model, ids[:1, :-9])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences_by_position_ids_equal_each_alone(name: str, batch: int) -> None:
    model, ids = converted(name), tokens(batch, 50)
    lengths = [19, 31] if batch == 1 else [50, 8, 42]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(batch, 50)
    packed = logits(model, ids, position_ids=positions)
    # a tokenizer's mask of ones says nothing
    assert torch.equal(packed, logits(model, ids, position_ids=positions, attention_mask=torch.ones_like(ids)))
    packed = packed.flatten(0, 1).split(lengths)
    alone = [logits(model, piece[None])[0] for piece in ids.flatten().split(lengths)]
    for mine, wanted in zip(packed, alone, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_packed_sequences_by_the_bounds_that_flash_attention_takes() -> None:
    model, ids = converted(), tokens(1, 50)
    bounds = torch.tensor([0, 19, 50], dtype=torch.int32)
    packed = logits(model, ids, cu_seq_lens_q=bounds)
    assert torch.equal(packed, logits(model, ids, cu_seq_lens_q=bounds, attention_mask=torch.ones_like(ids)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids, cu_seq_lens_q=bounds), packed)
    positions = torch.cat([torch.arange(19), torch.arange(31)])[None]
    # where positions begin anew is looked up outside of a graph, or not at all
    with pytest.raises(Exception, match=r"position_ids must be left out under torch\.compile"):
        logits(compiled, ids, position_ids=positions)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), ids, position_ids=positions), packed)
    torch.testing.assert_close(packed[0, 19:], logits(model, ids[:, 19:])[0], rtol=1e-4, atol=1e-4)


# sequences of 19 and 31 tokens
POSITIONS = torch.cat([torch.arange(19), torch.arange(31)])[None]
BOUNDS = torch.tensor([0, 19, 50], dtype=torch.int32)


# GPT-OSS asks for its masks without positions
@pytest.mark.parametrize("name", [*CHOSEN, "gpt_oss"])
def test_packed_sequences_are_apart_in_layers_that_were_not_converted_too(name: str) -> None:
    if name == "gpt2" and VERSION < (5, 8):
        pytest.skip("it drops arguments in older transformers")
    model, ids = segattn.convert(make(name), L, layers=[0], quiet=True), tokens(1, 50)
    open_gates(model)
    ones = torch.ones_like(ids)
    calls: list[dict[str, Any]] = [{"cu_seq_lens_q": BOUNDS}, {"position_ids": POSITIONS}]
    calls += [call | {"attention_mask": ones} for call in calls]
    for call in calls:
        if name in ("gpt2", "opt"):
            with pytest.raises(ValueError, match=r"must not pack sequences while layers \[1\] of a model with learnt"):
                logits(model, ids, **call)
        else:
            packed = logits(model, ids, **call)
            torch.testing.assert_close(packed[:, 19:], logits(model, ids[:, 19:]), rtol=1e-4, atol=1e-4)
            assert torch.equal(packed, logits(model, ids, position_ids=POSITIONS))
    with pytest.raises(ValueError, match=r"begin a sequence with each row|must not pack sequences"):
        logits(model, ids.view(2, 25), cu_seq_lens_q=BOUNDS)


@pytest.mark.parametrize("name", CHOSEN)
def test_layers_that_were_not_converted_see_the_whole_text(name: str) -> None:
    model, ids = segattn.convert(make(name), L, layers=[0], quiet=True), tokens(2, 3 * L)
    with torch.no_grad():
        # with a cache, transformers never looks for packed sequences in positions
        cached = model(ids, use_cache=True).logits
    torch.testing.assert_close(logits(model, ids), cached, rtol=1e-5, atol=1e-5)


def test_bounds_of_packed_sequences_and_rows_are_brought_to_the_layers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = converted(), []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append((options["cu_seqlens"], options["spans"], q.device))
        return segattn.SegmentOutput(torch.zeros_like(q), None)

    monkeypatch.setattr(interface, "segment_attention", spy)
    attention = model.model.layers[1].self_attn
    q, k, v = (torch.zeros(1, heads, 50, 8, device="meta") for heads in (4, 2, 2))
    angles = torch.ones(1, 50, 8), torch.zeros(1, 50, 8)

    def run(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        interface.segment_attention_forward(
            attention, q, k, v, None, segattn_pass=kwargs["segattn_pass"], segattn_rotary=angles
        )
        raise InterruptedError

    model.model.register_forward_pre_hook(run, with_kwargs=True)
    mask = torch.ones(1, 50)
    mask[:, :3] = 0
    for call in ({"cu_seq_lens_q": BOUNDS}, {"position_ids": POSITIONS}, {"attention_mask": mask}):
        with pytest.raises(InterruptedError):
            logits(model, tokens(1, 50), **call)
        bounds = [x for x in seen.pop()[:2] if x is not None]
        assert [x.device.type for x in bounds] == ["meta"]


def test_layers_by_index_and_the_others_as_they_were() -> None:
    model = segattn.convert(make(), L, layers=[-1], quiet=True)
    assert [name for name, _ in model.named_parameters() if "segattn" in name] == [
        "model.layers.1.self_attn.segattn_gate.bias"
    ]
    ids = tokens(1, 45)
    plain = make().model.layers[0]
    seen = []
    model.model.layers[0].register_forward_hook(lambda *x: seen.append(x[2]))
    got = logits(model, ids)
    hidden = make().model.embed_tokens(ids)
    rotary = make().model.rotary_emb(hidden, torch.arange(45)[None])
    wanted = plain(hidden, position_embeddings=rotary)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    torch.testing.assert_close(
        logits(model, ids, attention_mask=mask)[0, 3:], logits(model, ids[:, 3:])[0], rtol=1e-4, atol=1e-4
    )
    assert got.isfinite().all()


def test_sliding_layers_stay_as_they_are_unless_asked_for() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = segattn.convert(make("gemma3_text", layer_types=kinds, sliding_window=8), L, quiet=True)
    assert [hasattr(layer.self_attn, "segattn_gate") for layer in model.model.layers] == [False, True]
    other = segattn.convert(
        make("gemma3_text", layer_types=kinds, sliding_window=8), L, convert_sliding=True, quiet=True
    )
    assert [hasattr(layer.self_attn, "segattn_gate") for layer in other.model.layers] == [True, True]
    seen = {}
    for name, mine in (("kept", model), ("plain", make("gemma3_text", layer_types=kinds, sliding_window=8))):
        mine.model.layers[0].register_forward_hook(lambda *x, name=name: seen.__setitem__(name, x[2]))
        logits(mine, tokens(2, 45))
    torch.testing.assert_close(seen["kept"], seen["plain"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="convert_sliding=True"):
        segattn.convert(make("mistral", sliding_window=8), L)
    with pytest.raises(ValueError, match=r"layers \[0\] have a sliding window of 8"):
        segattn.convert(make("gemma3_text", layer_types=kinds, sliding_window=8), L, layers=[0, 1])


def test_a_dynamic_rotary_embedding_does_not_see_the_length_of_the_text() -> None:
    long = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, ids = converted(max_position_embeddings=L, rope_parameters=long), tokens(1, 3 * L)
    whole = logits(model, ids)
    with pytest.raises(ValueError, match=f"segment_len must be at most {L}, where the model's 'dynamic' rotary"):
        segattn.convert(make(max_position_embeddings=L, rope_parameters=long), L + 1)
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_models_of_one_configuration_do_not_disturb_each_other() -> None:
    first = make()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    ids = tokens(2, 40)
    plain = logits(second, ids)
    segattn.convert(first, L, layers=[0], quiet=True)
    assert torch.equal(logits(second, ids), plain)
    segattn.convert(second, L, quiet=True)
    segattn.revert(first)
    assert torch.equal(logits(first, ids), plain)
    assert not torch.equal(logits(second, ids), plain)
    segattn.revert(second)
    assert torch.equal(logits(second, ids), plain)


@pytest.mark.parametrize("how", ["from_config", "shared", "copied"])
def test_a_model_made_from_a_converted_ones_configuration_is_not_converted(how: str) -> None:
    first, ids = converted(), tokens(2, 40)
    wanted = logits(first, ids)
    second = {
        "from_config": transformers.AutoModelForCausalLM.from_config,
        "shared": transformers.LlamaForCausalLM,
        "copied": lambda config: transformers.LlamaForCausalLM(copy.deepcopy(config)),
    }[how](first.config).eval()
    with pytest.raises(
        RuntimeError, match=r"got one that is not, .* from type\(config\)\.from_dict\(config\.to_dict\(\)\)"
    ):
        logits(second, ids)
    with pytest.raises(ValueError, match="though its configuration has the settings of one that is"):
        segattn.revert(second)
    # as the message says
    remedy = transformers.LlamaForCausalLM(type(first.config).from_dict(first.config.to_dict())).eval()
    remedy.load_state_dict(second.state_dict())
    plain = logits(remedy, ids)
    segattn.convert(second, L, quiet=True)
    assert not torch.equal(logits(second, ids), plain)
    segattn.revert(second)
    assert torch.equal(logits(second, ids), plain)
    assert not hasattr(second.config, "segment_attention")
    assert torch.equal(logits(first, ids), wanted)


def test_attention_named_without_a_conversion_is_refused() -> None:
    model = make()
    model.set_attn_implementation("segattn")
    with pytest.raises(RuntimeError, match=r"must be converted, got one that is not, .* call segattn\.convert"):
        logits(model, tokens(1, 5))
    ids = tokens(1, 40)
    assert torch.equal(logits(segattn.revert(segattn.convert(model, L, quiet=True)), ids), logits(make(), ids))


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_the_default_dtype_and_device_change_nothing(name: str, other: dict[str, Any]) -> None:
    if name in ("gemma2", "opt") and VERSION < (5, 23):
        pytest.skip("that of older transformers makes tensors on the default device, or as long as the text")
    model, ids = make(name), tokens(2, 45)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def results() -> list[Tensor]:
        mine = segattn.convert(copy.deepcopy(model), L, gate_init=0.5, quiet=True)
        found = [logits(mine, ids), logits(mine, ids, attention_mask=mask), logits(mine, ids[:1], cu_seq_lens_q=bounds)]
        found.append(segattn.backward_in_pieces(mine, ids, 20, truncate=2).loss)
        found += [p.grad for n, p in mine.named_parameters() if "segattn_gate" in n]
        for cache in (segattn.InfiniCache(mine), segattn.StaticInfiniCache(mine, 2)):
            with torch.no_grad():
                found += [mine(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 24], 1)]
        return found

    bounds = torch.tensor([0, 19, 45], dtype=torch.int32)
    wanted = results()
    with defaults(**other):
        mine = results()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(mine, wanted, strict=True))


def test_an_untrained_memory_hardly_changes_a_model() -> None:
    ids = tokens(2, 5 * L)

    def read(**options: Any) -> Tensor:
        return logits(segattn.convert(make(), L, quiet=True, **options), ids)

    alone = read(gate_init=-60.0)
    assert torch.equal(read(), read(gate_init=-4.0))
    assert 0 < (read() - alone).norm() < 0.2 * (read(gate_init=0.0) - alone).norm()


def test_converted_in_inference_mode_it_can_still_be_trained() -> None:
    model = make()
    with torch.inference_mode():
        segattn.convert(model, L, quiet=True)
    ids = tokens(1, 40)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad.all() for n, p in model.named_parameters() if "segattn_gate" in n)


def test_a_copy_is_its_own() -> None:
    model = converted()
    ids = tokens(1, 40)
    before = logits(model, ids)
    other = copy.deepcopy(model)
    segattn.revert(other)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(other, ids), logits(make(), ids))


def test_a_pickled_model_runs_in_a_new_process(tmp_path: Path) -> None:
    model, ids = converted(), tokens(1, 40)
    torch.save([model, ids, logits(model, ids)], tmp_path / "model.pt")
    code = (
        "import sys, torch; model, ids, wanted = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(model(ids, use_cache=False).logits, wanted)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_the_kernels_run_inside_a_model() -> None:
    model, ids = segattn.convert(make(hidden_size=64), L, backend="triton", quiet=True), tokens(1, 37)
    open_gates(model)
    mine = logits(model, ids)
    plain = segattn.convert(make(hidden_size=64), L, backend="torch", quiet=True)
    open_gates(plain)
    torch.testing.assert_close(mine, logits(plain, ids), rtol=1e-4, atol=1e-4)


def test_it_says_what_was_converted(capsys: pytest.CaptureFixture[str]) -> None:
    segattn.convert(make(), L)
    assert capsys.readouterr().err == "converted 2/2 attention layers of LlamaForCausalLM\n"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_printed_model_shows_its_settings_until_it_is_reverted(name: str) -> None:
    model = make(name)
    before = repr(model)
    segattn.convert(model, L, update="linear", quiet=True)
    # equal layers are printed once
    (line,) = [line for line in repr(model).splitlines(keepends=True) if "segattn" in line]
    assert line.strip() == "(segattn_gate): LayerGate(heads=4, segment_len=16, update='linear')"
    assert repr(model).replace(line, "") == before
    assert repr(segattn.revert(model)) == before


PLACES = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")


@pytest.mark.parametrize("disk", [(), ("model.layers.0", "lm_head"), ("model.layers.1",), ("model.embed_tokens",)])
def test_a_model_that_accelerate_has_dispatched(disk: tuple[str, ...], tmp_path: Path) -> None:
    """Convert one whose modules have accelerate's hooks, as when its layers are on several devices or partly on disk.

    The hooks copy lists, tuples and dictionaries on their way into modules.
    """
    accelerate = pytest.importorskip("accelerate")
    places = PLACES | dict.fromkeys(("model.layers.0", "model.layers.1"), "cpu") | dict.fromkeys(disk, "disk")
    model, ids = make(), tokens(2, 3 * L + 5)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if {*disk} & {"model.layers.1", "model.embed_tokens"}:
        with pytest.raises(ValueError, match=r"model must have its weights.*remove_hook_from_submodules\(model\)"):
            segattn.convert(model, L, layers=[1], quiet=True)
        return
    wanted = segattn.convert(make(), L, layers=[1], quiet=True)
    assert torch.equal(logits(segattn.convert(model, L, layers=[1], quiet=True), ids), logits(wanted, ids))


def test_a_model_that_cannot_be_run_keeps_no_hooks() -> None:
    model, ids = make(), tokens(2, 9)
    before = logits(model, ids)
    model.set_input_embeddings(torch.nn.Sequential(model.get_input_embeddings()))
    with pytest.raises(AttributeError, match="weight"):
        segattn.convert(model, L, quiet=True)
    assert torch.equal(logits(model, ids), before)


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
INSTEAD = r"segattn\.RecurrentMemory\(mask='causal'\) leaves attention as it is"
REFUSALS: dict[str, tuple[Any, str]] = {
    "learnt sink logits of other heads": (
        lambda: with_sinks(make("gpt_oss"), 3),
        r"layer 0 .* GptOssAttention must have one learnt sink logit \(s_aux\) for each of its 4 heads",
    ),
    "alibi": (
        lambda: make("bloom"),
        rf"BloomForCausalLM, which adds a bias by distance \(ALiBi\) to its scores: {INSTEAD}",
    ),
    "alibi by configuration": (lambda: make("falcon", alibi=True), r"got FalconForCausalLM, .* distance \(ALiBi\)"),
    "attention of its own": (lambda: make("falcon"), rf"whose FalconAttention computes its own: .*{INSTEAD}"),
    "an encoder and a decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
        ),
        r"got T5ForConditionalGeneration, an encoder and a decoder",
    ),
    "an encoder": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
        "one stack of layers with causal attention, got 0 in BertModel",
    ),
    "tokens embedded elsewhere": (
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True)),
        rf"got BertLMHeadModel, whose BertEncoder takes no inputs_embeds: {INSTEAD}"
        if VERSION >= (5,)
        else r"got 0 in BertLMHeadModel: segattn\.RecurrentMemory leaves attention as it is",
    ),
    "two attentions in a layer": (
        lambda: transformers.LongcatFlashForCausalLM(
            transformers.LongcatFlashConfig(
                **SIZES | {"num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2},
                **{"n_routed_experts": 4, "zero_expert_num": 2, "q_lora_rank": 16, "kv_lora_rank": 16},
                **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            )
        ),
        rf"one causal attention in each layer, got LongcatFlashForCausalLM, whose layers \[0\] have 2: {INSTEAD}",
    ),
    "layers without attention": (
        lambda: transformers.JambaForCausalLM(
            transformers.JambaConfig(**SIZES, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1)
        ),
        r"attention in every layer, got JambaForCausalLM, whose layers \[0\] have none",
    ),
    "scaling by the length of the text": (
        lambda: make("llama4_text", attn_temperature_tuning=True),
        r"layer 1 .* Llama4TextAttention must make queries .* \(attn_temperature_tuning\)",
    ),
    "a weighted norm after rotation": (
        lambda: with_norms(
            transformers.HunYuanDenseV1ForCausalLM(transformers.HunYuanDenseV1Config(**SIZES, head_dim=8))
        ),
        "layer 0 .* HunYuanDenseV1Attention must rotate pairs of channels as its last step",
    ),
    "a norm after rotation whose weights are still ones": (
        lambda: transformers.HunYuanDenseV1ForCausalLM(transformers.HunYuanDenseV1Config(**SIZES, head_dim=8)),
        "layer 0 .* HunYuanDenseV1Attention must rotate pairs of channels as its last step",
    ),
}


def with_sinks(model: Any, count: int) -> Any:
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(count))
    return model


def with_norms(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(parameter)
    return model


@pytest.mark.parametrize("property_of", REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(property_of: str) -> None:
    made, message = REFUSALS[property_of]
    model = made().train()
    before = model.config.to_dict(), model.config._attn_implementation, torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message):
        segattn.convert(model, L, convert_sliding=True)
    assert (model.config.to_dict(), model.config._attn_implementation) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif("ministral3" not in NAMES, reason="this transformers scales by the position in the text")
def test_scaling_by_position_ends_segments_where_it_begins() -> None:
    message = "layer 0 cannot be converted: its Ministral3Attention must .* shorten segments to where it begins"
    with pytest.raises(ValueError, match=message):
        segattn.convert(make("ministral3"), 33)
    with pytest.raises(ValueError, match=message):
        segattn.convert(make("ministral3"), 32, layers=[0])
    assert logits(segattn.convert(make("ministral3"), 32, quiet=True), tokens(1, 100)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_models_in_half_precision_are_read_alike(name: str, dtype: torch.dtype) -> None:
    traits = conversion_of(converted(name, L)).traits
    assert conversion_of(segattn.convert(make(name).to(dtype), L, quiet=True, **OPTIONS.get(name, {}))).traits == traits


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotary_embedding_is_undone(interleaved: bool, last: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 14, dtype=torch.float64), torch.randn(2, 1, 5, 4, dtype=torch.float64)
    turned = x[..., 6:] if last else x[..., :8]
    pairs = turned.unflatten(-1, (4, 2)) if interleaved else turned.unflatten(-1, (2, 4)).transpose(-1, -2)
    # a common scale, as YaRN has
    turn = 1.3 * torch.exp(1j * angle)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    rotated = torch.cat([x[..., :6], turned] if last else [turned, x[..., 8:]], -1)
    undone = unrotate(rotated, turn.real[:, 0], turn.imag[:, 0], interleaved=interleaved, last=last)
    torch.testing.assert_close(undone, x)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        segattn.convert(torch.nn.Linear(2, 2))
    texts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99, "head_dim": 8}
    images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    around = transformers.Gemma3Config(text_config=texts, vision_config=images)
    with pytest.raises(ValueError, match="got the Gemma3ForConditionalGeneration around one"):
        segattn.convert(transformers.Gemma3ForConditionalGeneration(around))
    with pytest.raises(ValueError, match="revert it first"):
        segattn.convert(converted())
    with pytest.raises(ValueError, match=r"call segattn\.convert first"):
        segattn.revert(make())
    crossing = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True)
    with pytest.raises(ValueError, match="got one with cross-attention: load it with add_cross_attention=False"):
        segattn.convert(transformers.GPT2LMHeadModel(crossing))
    for call in (segattn.revert, segattn.InfiniCache):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            call([torch.nn.Linear(2, 2)])
    with torch.device("meta"):
        empty = make()
    with pytest.raises(ValueError, match="meta device"):
        segattn.convert(empty)


SMALL = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.skipif(VERSION < (5, 23), reason="these types came, or changed, later")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (
            "FalconH1",
            {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_n_groups": 1},
        ),
        ("MiniMax", {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "head_dim": 8}),
    ],
)
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(kind: str, sizes: dict[str, Any]) -> None:
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL, **sizes))
    said = (
        f"model must keep keys and values alone in its cache, got {kind}Model, which does not run with a DynamicCache"
    )
    with pytest.raises(ValueError, match=said):
        segattn.convert(model)
    assert model.config._attn_implementation != "segattn"


def test_a_bias_of_the_scores_is_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", partial(attention.forward, position_bias=torch.zeros(4)))
    with pytest.raises(
        ValueError, match="layer 1 cannot be converted: its LlamaAttention must pass no position_bias to"
    ):
        segattn.convert(model)
    assert not any("segattn" in name for name, _ in model.named_modules())
    segattn.convert(model, layers=[0], quiet=True)


def test_a_model_that_does_not_run_on_embeddings_is_refused() -> None:
    model = make()
    model.model.register_forward_pre_hook(lambda trunk, args, given: given["input_ids"].shape, with_kwargs=True)
    with pytest.raises(ValueError, match=r"model must run on inputs_embeds \[1, 16, 32\] .* got LlamaModel, whose "):
        segattn.convert(model)


@pytest.mark.skipif(not hasattr(transformers, "AfmoeConfig"), reason="the type came later")
def test_attention_that_views_what_it_gets_takes_ours() -> None:
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "num_dense_layers": 1, "num_experts_per_tok": 1}
    config = transformers.AfmoeConfig(**SMALL, **experts, head_dim=8, layer_types=["full_attention"] * 2)
    model, x = transformers.AfmoeForCausalLM(config).eval(), tokens(2, 16)
    before = logits(model, x)
    assert torch.equal(logits(segattn.convert(model, 16, quiet=True), x), before)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_segments_longer_than_learnt_positions(name: str) -> None:
    model = make(name)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="segment_len must be at most the 64 learnt positions"):
        segattn.convert(model, 65)
    assert model.config.to_dict() == before
    assert logits(segattn.convert(model, 64, quiet=True), tokens(1, 200)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"segment_len": 1}, ValueError, "segment_len must be at least 2"),
        ({"segment_len": 2.0}, TypeError, "segment_len must be an integer"),
        ({"update": "sum"}, ValueError, "update must be one of"),
        ({"gate_init": "0"}, TypeError, "gate_init must be a number"),
        ({"gate_init": float("nan")}, ValueError, "gate_init must be finite, got nan"),
        ({"convert_sliding": "yes"}, TypeError, "convert_sliding must be True or False"),
        ({"layers": 5}, TypeError, "layers must be a list of integers, got 5"),
        ({"layers": [2]}, ValueError, r"layers must lie in \[-2, 2\), got 2"),
        ({"layers": [-3]}, ValueError, "layers must be at least -2, got -3"),
        ({"layers": ["0"]}, TypeError, "layers must be an integer"),
        ({"layers": []}, ValueError, "layers must name at least one"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = make()
    before = model.config.to_dict()
    with pytest.raises(error, match=match):
        segattn.convert(model, **arguments)
    assert model.config.to_dict() == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_calls() -> None:
    model, ids = converted(), tokens(2, 20)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\]"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 20\], .* got \[2, 5\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 20\], .* got \[1, 20\]"):
        model(ids, attention_mask=torch.ones(1, 20))
    with pytest.raises(ValueError, match="position_ids must count from 0 by ones"):
        model(ids, position_ids=2 * torch.arange(20)[None])
    with pytest.raises(ValueError, match="position_ids must count from 0 by ones"):
        model(ids, position_ids=7 + torch.arange(20)[None])
    with pytest.raises(ValueError, match="no zeros beside cu_seq_lens_q"):
        model(ids, attention_mask=torch.arange(20).expand(2, 20) > 3, cu_seq_lens_q=torch.tensor([0, 40]))
    holes = torch.ones(2, 20)
    holes[1, 4] = 0
    with pytest.raises(ValueError, match="row 1 has 19 ones between 0 and 20"):
        model(ids, attention_mask=holes)
    for wrong in (ids[None], ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] of at least one token, got \["):
            model(wrong)
    with pytest.raises(TypeError, match=r"input_ids must be an int32 or int64 tensor, got torch\.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[B, T, 32\] of at least one token, got \[20, 32\]"):
        model(inputs_embeds=torch.zeros(20, 32))
    with pytest.raises(ValueError, match=r"position_ids must be \[1 or 2, 20\], got \[20\]"):
        model(ids, position_ids=torch.arange(20))
    packed = torch.arange(20)[None] % 13
    padded = torch.arange(20).expand(2, 20) > 3
    cache = segattn.InfiniCache(model)
    model(ids, past_key_values=cache)
    for call in ({"attention_mask": padded}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="position_ids must count by ones in each row beside padding or a cache"):
            model(ids, position_ids=packed, **call)
    with pytest.raises(
        ValueError, match=r"past_key_values must be None beside cu_seq_lens_q, .*, got one of 20 tokens"
    ):
        model(ids, cu_seq_lens_q=torch.tensor([0, 13, 40]), past_key_values=cache)
    changed = converted()
    changed.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"'sdpa', which was set after convert: call segattn\.revert first"):
        changed(ids)
    dropping = converted(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"attention dropout must be 0 in training, got 0\.1"):
        dropping(ids)
    assert dropping.eval()(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_without_effect_have_none(name: str) -> None:
    model, ids = converted(name), tokens(2, 40)
    plain = model(ids, labels=ids)
    harmless = {"num_items_in_batch": 2 * 39, "ignore_index": -100, "output_hidden_states": True, "unknown": None}
    found = model(ids, labels=ids, **(harmless if name != "gpt2" else harmless | {"output_hidden_states": None}))
    assert torch.equal(found.logits, plain.logits)
    torch.testing.assert_close(found.loss, plain.loss)


@pytest.mark.parametrize("training", [False, True])
def test_arguments_that_change_attention_are_refused_by_name(training: bool) -> None:
    # the first layer is not converted, and writes its cache before the second begins
    model = segattn.convert(make(), 16, layers=[1], quiet=True).train(training)
    ids, cache = tokens(1, 20), segattn.InfiniCache(model)
    for arguments, said in (
        ({"s_aux": torch.zeros(4)}, "s_aux must be left out for a converted model, .* got from the call"),
        ({"position_bias": torch.zeros(1), "chunk": 4}, "chunk, position_bias must be left out"),
        ({"is_causal": False}, "is_causal must be True for a converted model"),
    ):
        with pytest.raises(ValueError, match=said):
            model(ids, past_key_values=cache, **arguments)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_arguments_that_a_layer_adds_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = converted(), tokens(1, 20)
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", partial(attention.forward, position_bias=torch.zeros(4)))
    with pytest.raises(ValueError, match=r"position_bias must be left out .* got from its LlamaAttention"):
        model(ids)


def test_a_mask_in_a_graph() -> None:
    model, ids = converted(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    refused = r"attention_mask must be left out under torch\.compile\(fullgraph=True\) and torch\.export"
    torch._dynamo.reset()
    with pytest.raises(Exception, match=refused):
        logits(torch.compile(model, backend="eager", fullgraph=True), ids, attention_mask=mask)
    with pytest.raises(ValueError, match=refused):
        torch.export.export(model, (ids,), {"use_cache": False, "attention_mask": mask}, strict=False)
    torch._dynamo.reset()
    broken = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(broken, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))
