"""What both memories are given, by one rule: embeddings, masks and labels; and what they are not made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from models import make, tokens

from segattn import AssociativeMemory, RecurrentMemory

L = 8
KINDS: dict[str, Any] = {
    "RecurrentMemory": lambda name="llama": RecurrentMemory(make(name), 2, L).eval(),
    "AssociativeMemory": lambda name="llama": AssociativeMemory(make(name), 2, L, d_mem=4).eval(),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_be_narrower_than_the_model_but_not_wider(kind: str, name: str) -> None:
    memory = KINDS[kind](name)
    narrow = memory.get_input_embeddings()(tokens(2, 20)).bfloat16()
    wanted = memory(inputs_embeds=narrow.float())
    assert torch.equal(memory(inputs_embeds=narrow).logits, wanted.logits)
    with pytest.raises(
        TypeError, match=r"inputs_embeds must be of the model's dtype, torch.float32, got torch.float64"
    ):
        memory(inputs_embeds=narrow.double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_with_holes_names_the_padding_token(kind: str) -> None:
    memory, ids = KINDS[kind](), tokens(2, 20)
    ids[1, 4] = 0
    said = r"row 1 has 19 ones between 0 and 20\. .* pass it attention_mask=torch\.ones_like\(input_ids\)"
    for call in (memory, memory.generate):
        with pytest.raises(ValueError, match=said):
            call(ids, (ids != 0).long())
    assert memory(ids, torch.ones_like(ids)).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_have_one_rule(kind: str) -> None:
    memory, ids = KINDS[kind](), tokens(2, 20)
    assert torch.equal(memory(ids, labels=ids.int()).loss, memory(ids, labels=ids).loss)
    for wrong, got in ((ids.short(), "torch.int16"), (ids.byte(), "torch.uint8"), (ids.tolist(), "list")):
        with pytest.raises(TypeError, match=f"labels must be an int32 or int64 tensor, got {got}"):
            memory(ids, labels=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_memory_lacks_of_a_hugging_face_model(kind: str) -> None:
    memory = KINDS[kind]()
    for name in ("generate_batch", "init_continuous_batching", "save_pretrained"):
        assert not hasattr(memory, name)
        with pytest.raises(AttributeError, match=f"{kind} has no {name}.*: (call generate with|save its model by)"):
            getattr(memory, name)
    with pytest.raises(AttributeError, match=f"'{kind}' object has no attribute 'unknown'"):
        memory.unknown  # noqa: B018


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_call_is_no_graph(kind: str, masked: bool) -> None:
    memory, ids = KINDS[kind](), tokens(2, 20)
    mask = None
    if masked:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{kind} must not be compiled whole, .* (call its compile|layers in place)"):
        torch.compile(memory, fullgraph=True, backend="eager")(ids, mask)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(memory, backend="eager")(ids, mask).logits, memory(ids, mask).logits)
