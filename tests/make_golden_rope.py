"""Writes golden/rope.json: RoPE frequencies of published configurations, by Hugging Face transformers.

For development only: `python tests/make_golden_rope.py` needs transformers and torch; the tests do not.
"""

import json
from pathlib import Path

import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

YARN_DEEPSEEK = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN_DEEPSEEK |= {"original_max_position_embeddings": 4096, "type": "yarn"}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN_QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN_GPT_OSS = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
YARN_GPT_OSS |= {"original_max_position_embeddings": 4096}

# name: (size of a head, base, scaling, max_position_embeddings)
CASES = {
    "SmolLM2": (64, 100000.0, None, 8192),
    "Qwen3": (128, 1000000.0, {"rope_type": "default", "rope_theta": 1000000.0}, 40960),
    "Llama 3.2 1B": (64, 500000.0, LLAMA3, 131072),
    "Llama 3.1 8B": (128, 500000.0, LLAMA3 | {"factor": 8.0}, 131072),
    "Llama 3, original length left out": (64, 500000.0, {k: LLAMA3[k] for k in list(LLAMA3)[:4]}, 8192),
    "DeepSeek V3": (64, 10000.0, YARN_DEEPSEEK, 163840),
    "DeepSeek V2 Lite": (64, 10000.0, YARN_DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}, 163840),
    "yarn, unequal mscale": (64, 10000.0, YARN_DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 0.5}, 163840),
    "yarn, mscale alone": (64, 10000.0, YARN_DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0}, 163840),
    "yarn, factor null": (64, 10000.0, YARN_DEEPSEEK | {"factor": None}, 163840),
    "yarn, attention_factor given": (64, 10000.0, YARN_DEEPSEEK | {"attention_factor": 1.25}, 163840),
    "Kimi K2 0905": (64, 50000.0, YARN_DEEPSEEK | {"beta_fast": 1.0, "factor": 64.0}, 262144),
    "Qwen3, yarn": (128, 1000000.0, YARN_QWEN, 131072),
    "gpt-oss": (64, 150000.0, YARN_GPT_OSS, 131072),
    "yarn, over all pairs": (8, 100.0, YARN_QWEN | {"original_max_position_embeddings": 64}, 256),
    "yarn, past the last pair": (8, 100.0, YARN_QWEN | {"original_max_position_embeddings": 4096}, 16384),
    "yarn, past dim": (
        8,
        100.0,
        YARN_QWEN | {"original_max_position_embeddings": 2**16, "beta_fast": 1000},
        2**18,
    ),
    "yarn, over no pair": (8, 10000.0, YARN_QWEN | {"original_max_position_embeddings": 4}, 16),
    "yarn, an empty band": (64, 10000.0, YARN_DEEPSEEK | {"beta_fast": 1, "truncate": False}, 163840),
    "linear": (64, 10000.0, {"type": "linear", "factor": 2.5}, 4096),
    "linear, partial": (
        64,
        10000.0,
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25},
        4096,
    ),
}


def reference(dim, base, scaling, max_position_embeddings):
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": base, **(scaling or {})},
    )
    config.standardize_rope_params()
    kind = config.rope_parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, attention_factor = compute(config)
    return [float(f"{f:.9g}") for f in frequencies.double().tolist()], attention_factor


if __name__ == "__main__":
    cases = []
    for name, (dim, base, scaling, max_position_embeddings) in CASES.items():
        given = {"name": name, "dim": dim, "base": base, "scaling": scaling}
        given["max_position_embeddings"] = max_position_embeddings
        frequencies, attention_factor = reference(dim, base, scaling, max_position_embeddings)
        cases.append(given | {"frequencies": frequencies, "attention_factor": attention_factor})
    path = Path(__file__).parent / "golden" / "rope.json"
    path.parent.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(case) for case in cases)
    path.write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n{rows}\n]}}\n')
