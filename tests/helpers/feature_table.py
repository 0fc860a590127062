"""Print which model type has a test of what, as the documents show it: `python tests/helpers/feature_table.py`."""

import re
import sys
from pathlib import Path

import pytest
from models import CONFIGS

TESTS = Path(__file__).parents[1]
# column → the tests that every type with a mark passes, between spaces
FEATURES = {
    "as defined": "test_attention_is_the_definition_on_the_models_own_queries_keys_and_values",
    "revert": "test_up_to_one_segment_nothing_changes_and_revert_undoes_everything",
    "padding": "test_a_padded_row_equals_the_row_alone",
    "packing": "test_packed_sequences_by_position_ids_equal_each_alone",
    "lookback, sinks": "test_a_segment_with_sinks_is_a_text_of_sinks_and_window",
    "pieces": "test_pieces_of_any_sizes_equal_the_whole",
    "generate": "test_generate_equals_reading_it_all_again_for_every_token",
    "padded batches": "test_a_left_padded_row_generates_what_it_generates_alone",
    "beams": "test_beams_follow_their_own_memory",
    "static cache, compiled": "test_a_static_cache_equals_the_whole_eager_and_compiled "
    "test_generate_with_a_static_cache_of_padded_rows_and_beams",
    "checkpointing": "test_gradient_checkpointing_changes_nothing",
    "save, load": "test_saved_and_loaded_is_the_same_model",
    "`RecurrentMemory`": "test_decoder_equals_a_plain_loop",
    "`AssociativeMemory`": "test_a_first_segment_is_the_models_own_and_the_diagonal_equals_the_vertical",
}
FILES = (
    *(f"infini/test_{name}.py" for name in ("conversion", "windows", "generation", "hf_training", "saving")),
    *(f"rmt/test_{name}.py" for name in ("recurrent", "associative")),
)
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3",
    "gpt_neox": "GPT-NeoX",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "mixtral": "Mixtral",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "gemma": "Gemma",
    "phi": "Phi 1, 2",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite",
    "granitemoe": "GraniteMoE",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder 2",
    "gpt_bigcode": "GPTBigCode (StarCoder)",
    "cohere": "Cohere",
    "cohere2": "Cohere 2",
    "glm4": "GLM 4",
    "smollm3": "SmolLM 3",
    "llama4_text": "Llama 4 (text)",
    "nemotron": "Nemotron",
    "helium": "Helium",
    "exaone4": "Exaone 4",
    "deepseek_v3": "DeepSeek-V3",
    "gpt_oss": "GPT-OSS",
    "falcon": "Falcon",
    "bloom": "Bloom",
}


class Collected:
    """A plugin that keeps the names of the tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.name for item in session.items]


def table() -> str:
    """Return the table in Markdown, a row for each type, with a mark where a test of that name is collected for it."""
    collected = Collected()
    options = ["--collect-only", f"--rootdir={TESTS.parent}"]
    options += [f"-pno:{plugin}" for plugin in ("terminal", "cacheprovider", "xdist")]
    status = pytest.main([*options, *(str(TESTS / file) for file in FILES)], [collected])
    assert status == pytest.ExitCode.OK
    tests = [re.fullmatch(r"(\w+)\[([^\]]+)\]", name) for name in collected.names]
    found = {(test[1], kind) for test in tests if test for kind in test[2].split("-")}
    rows = [["", *FEATURES], ["---"] * (1 + len(FEATURES))]
    rows += [
        [
            NAMES[kind],
            *("✓" if all((test, kind) in found for test in tests.split()) else "" for tests in FEATURES.values()),
        ]
        for kind in CONFIGS
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
