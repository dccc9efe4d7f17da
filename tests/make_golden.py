"""Write tests/golden/*.npz: what Hugging Face transformers computes on tiny random models.

    pip install -r benchmarks/requirements.txt && python tests/make_golden.py

One file per entry of CASES: config (JSON text), tokens, targets, logits, loss, prompt, answer and, for each
weight under the name that published checkpoints give it, weights/NAME and gradients/NAME. All in float32
on the CPU with eager attention; the weights are float16 numbers, stored exactly in half the space.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 4 pairs of channels, one is kept, one blended
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
KIMI = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 32.0,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}

# name: (sequences, their length, form of the rope fields, config)
CASES = {
    "llama": (2, 24, "older", {
        "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_parameters": LLAMA3, "tie_word_embeddings": True,
    }),
    "llama_biases": (3, 17, "newer", {
        "model_type": "llama", "vocab_size": 83, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}, "rms_norm_eps": 1e-2,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
    }),
    "qwen3": (2, 21, "newer", {
        "model_type": "qwen3", "vocab_size": 71, "hidden_size": 20, "intermediate_size": 44,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
    }),
    "qwen3_yarn": (1, 40, "older", {
        "model_type": "qwen3", "vocab_size": 53, "hidden_size": 36, "intermediate_size": 28,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "rope_parameters": YARN, "attention_bias": True,
        "tie_word_embeddings": True,
    }),
    "smollm3": (2, 19, "newer", {
        "model_type": "smollm3", "vocab_size": 67, "hidden_size": 24, "intermediate_size": 24,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}, "tie_word_embeddings": True,
        "pad_token_id": None,
    }),
    "smollm3_biases": (2, 26, "older", {
        "model_type": "smollm3", "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "no_rope_layers": [0, 1, 1, 0],
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "pad_token_id": None,
    }),
    "qwen3_moe": (2, 18, "older", {
        "model_type": "qwen3_moe", "vocab_size": 59, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
    }),
    "qwen3_moe_mixed": (3, 15, "newer", {
        "model_type": "qwen3_moe", "vocab_size": 47, "hidden_size": 20, "intermediate_size": 28,
        "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": False,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": True,
    }),
    "deepseek_v3": (2, 20, "older", {
        "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 20, "intermediate_size": 28,
        "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 14,
        "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 7,
        "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 9, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 128,
    }),
    "deepseek_v3_full_rank": (3, 14, "newer", {
        "model_type": "deepseek_v3", "vocab_size": 43, "hidden_size": 18, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None,
        "kv_lora_rank": 12, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 9,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
        "moe_intermediate_size": 8, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 0, "rope_interleave": False, "attention_bias": True, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "tie_word_embeddings": True,
    }),
    "kimi_k2": (2, 22, "older", {
        "model_type": "deepseek_v3", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 12,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 8, "routed_scaling_factor": 2.827, "first_k_dense_replace": 1,
        "rope_parameters": KIMI, "max_position_embeddings": 1024, "num_nextn_predict_layers": 0,
    }),
    "kimi_k2_deep": (1, 30, "newer", {
        "model_type": "deepseek_v3", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 10,
        "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
        "n_routed_experts": 10, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 6, "routed_scaling_factor": 2.827, "first_k_dense_replace": 1,
        "rope_parameters": KIMI | {"mscale": 0.7}, "max_position_embeddings": 512, "num_nextn_predict_layers": 0,
    }),
}  # fmt: skip


def older_form(config):
    """The same config with rope_theta and rope_scaling, as config.json had them before rope_parameters."""
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return config


def published(model):
    """The model's parameters as a checkpoint names them, which need not be the names they have in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def make(name, sequences, length, form, fields, answer_length=12):
    rng = np.random.default_rng(sum(name.encode()))
    no_specials = {"bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(**no_specials | fields)
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .float()
        .eval()
    )
    for key, parameter in sorted(model.named_parameters()):
        value = rng.normal(1.0 if key.endswith("norm.weight") else 0.0, 0.3, parameter.shape)
        parameter.data = torch.tensor(value.astype(np.float16).astype(np.float32))
    biases = {key: buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")}
    for buffer in biases.values():
        buffer.data = torch.tensor(rng.normal(0.0, 0.3, buffer.shape).astype(np.float16).astype(np.float32))
    model.tie_weights()

    tokens = rng.integers(config.vocab_size, size=(sequences, length))
    targets = rng.integers(config.vocab_size, size=(sequences, length))
    targets[rng.random(targets.shape) < 0.2] = -100
    logits = model(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()

    prompt = tokens[0, :5]
    text = model.generate(torch.tensor(prompt[None]), max_new_tokens=answer_length, do_sample=False)
    best, second = model(text).logits[0, len(prompt) - 1 : -1].topk(2).values.T.detach()
    if (best - second).min() < 1e-3:
        raise ValueError(f"{name}: a greedy choice is a near tie; give the case another name")

    weights = published(model)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in biases.values():  # they only choose, and have no gradient
        buffer.data = torch.zeros_like(buffer)
    gradients = published(model)
    described = json.loads(config.to_json_string(use_diff=False))
    if name.startswith("kimi_k2"):  # its published model_type, of which transformers says deepseek_v3
        described["model_type"] = "kimi_k2"
    np.savez_compressed(
        Path(__file__).parent / "golden" / f"{name}.npz",
        config=json.dumps(older_form(described) if form == "older" else described),
        tokens=tokens,
        targets=targets,
        logits=logits.detach().numpy(),
        loss=loss.item(),
        prompt=prompt,
        answer=text[0, len(prompt) :].numpy(),
        **{f"weights/{key}": value.astype(np.float16) for key, value in weights.items()},
        **{f"gradients/{key}": value for key, value in gradients.items()},
    )


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of a sum, and so its last bits, depends on the number of threads
    for name, case in CASES.items():
        make(name, *case)
