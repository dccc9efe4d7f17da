"""GGUF, the one file of a model that llama.cpp reads: what config.json, tokenizer.json and the weights say, under its
names. The package gguf writes the file, and knows what llama.cpp calls each weight.

llama.cpp computes the same, and keeps some weights in another order or shape:

    q, k of Llama and SmolLM3   the rows of a head as the pairs that RoPE turns: 0, n/2, 1, n/2 + 1, ...
    experts                     all of a layer in one array, (experts, out, in)
    kv_b of latent attention    its two parts, k_b (heads, rank, nope) and v_b (heads, v, rank), since queries are taken
                                to the compressed keys there, not keys to the queries
    Llama 3's stretched RoPE    what each pair's frequency is divided by, rope_freqs (pairs,)

A config is any object with the fields of config.json and the methods of architectures.Config; a tokenizer one with the
attributes of tokenizer_json.Content.
"""

import math
import re

from engine.backend import np, to_numpy
from engine.files import refuse, replace
from engine.pretokenize import DIGITS, PATTERNS, pattern_of
from engine.tokenizer_json import parts

ARCHITECTURES = {  # by model_type
    "llama": "llama",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v3": "deepseek2",
}
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # of the matrices; vectors are float32
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE_TOKENIZERS = {  # what llama.cpp calls (split patterns, ignore_merges)
    ((PATTERNS["gpt2"],), False): "gpt-2",
    ((DIGITS[True], PATTERNS["gpt2"]), False): "smollm",
    ((PATTERNS["llama3"],), False): "smaug-bpe",
    ((PATTERNS["llama3"],), True): "llama-bpe",
    ((PATTERNS["qwen"],), False): "qwen2",
    (DEEPSEEK, False): "deepseek-v3",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
SIGMOID = 2  # how a router scores


def write(path, params, config, tokenizer, chat_template, rope, kind):
    """Writes the file, atomically. ValueError, with one sentence, for what llama.cpp does not have.

    chat_template: its text, or None. rope: what the frequencies are divided by, (pairs,), and the factor of cos and sin
    (see posenc.rope_frequencies). kind: one of TYPES.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("the file of llama.cpp is written by the package gguf: pip install gguf") from None
    stretch, attention_factor = rope
    refuse_what_is_not_there(config, attention_factor)
    notes = metadata(config, attention_factor) | vocabulary(config, tokenizer)
    notes |= {"general.file_type": int(gguf.LlamaFileType[TYPES[kind]])}
    notes |= {"tokenizer.chat_template": chat_template} if chat_template else {}
    arch = ARCHITECTURES[config.model_type]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def write_to(new):
        writer = gguf.GGUFWriter(new, arch)
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        for name, value in notes.items():
            (writer.add_array if type(value) is list else add[type(value)])(name, value)
        for name, array in arranged(params, config, stretch):
            stored = gguf.GGMLQuantizationType[stored_as(name, array.shape, kind).upper()]
            data = gguf.quantize(np.ascontiguousarray(array, np.float32), stored)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    replace(path, write_to)


def refuse_what_is_not_there(config, attention_factor):
    """ValueError for what llama.cpp would leave out, or compute otherwise."""
    kind, layers, scaling = config.model_type, range(config.num_hidden_layers), config.rope_scaling or {}
    three_of_four = tuple(int((i + 1) % 4 != 0) for i in layers)
    lacking = {
        "attention in both directions": not config.causal,
        "windows or patterns of attention": any(config.layer_type(i) != "full_attention" for i in layers),
        "biases": (config.attention_bias or config.mlp_bias) and kind != "llama",
        "RoPE in other than three of four layers": kind == "smollm3" and config.no_rope_layers != three_of_four,
        "RoPE stretched as in Llama 3": rope_type(config) == "llama3" and kind != "llama",
        "YaRN that is not rounded": scaling.get("truncate") is False,
        "YaRN with such an mscale": kind == "deepseek_v3" and abs(attention_factor - 1) > 1e-6,
        "RoPE of halves": config.rope_interleave is False,
        "dense layers beside those of experts": kind == "qwen3_moe" and not all(map(config.has_experts, layers)),
        "gates that do not add up to 1": kind == "qwen3_moe" and not config.norm_topk_prob,
        "a model without shared experts": kind == "deepseek_v3" and not config.shared,
    }
    for what, asked in lacking.items():
        refuse(asked, f"llama.cpp has no {what} in {ARCHITECTURES[kind]}")


def rope_type(config):
    scaling = config.rope_scaling or {}
    return scaling.get("rope_type") or scaling.get("type")


# ---------------------------------------------------------------------------------------------------- weights


def arranged(params, config, stretch):
    """Yields (name, array) as llama.cpp has them, by the published names or such as they would have."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    in_pairs, experts = config.model_type in ("llama", "smollm3"), {}
    if rope_type(config) == "llama3":
        yield "rope_freqs.weight", to_numpy(stretch)
    for name, array in params.items():
        array, place = to_numpy(array), name.split(".")
        if place[1] == "layers" and int(place[2]) >= config.num_hidden_layers:
            continue  # multi-token prediction, which llama.cpp leaves out
        if in_pairs and (which := re.search(r"\.([qk])_proj\.", name)):
            yield name, pairs(array, heads[which[1]])
        elif name.endswith(".kv_b_proj.weight"):
            k_b, v_b = apart(array, heads["q"], config.qk_nope_head_dim)
            yield name.replace("kv_b_proj", "k_b_proj"), k_b
            yield name.replace("kv_b_proj", "v_b_proj"), v_b
        elif ".mlp.experts." in name:
            whole = ".".join(place[:5] + place[6:])  # without the expert's number
            experts.setdefault(whole, []).append(array)
            if len(experts[whole]) == config.experts:
                yield whole, np.stack(experts.pop(whole))
        else:
            yield name.replace("score_correction_bias", "score_correction.bias"), array


def pairs(array, heads):
    """The rows of each head, of which RoPE turns i and i + n/2 together, with such two beside each other."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def apart(kv_b, heads, nope):
    """kv_b (heads · (nope + v), rank) as k_b (heads, rank, nope) and v_b (heads, v, rank)."""
    k_b, v_b = np.split(kv_b.reshape(heads, -1, kv_b.shape[-1]), [nope], axis=1)
    return k_b.swapaxes(1, 2), v_b


def stored_as(name, shape, kind):
    """The format of a weight: that of the file, but float32 for vectors and routers, and float16 where a row is not of
    whole blocks.
    """
    if len(shape) == 1 or name.endswith(".mlp.gate.weight"):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


# ------------------------------------------------------------------------------------------- what is not a weight


def metadata(config, attention_factor):
    """The sizes and switches: {name: value}."""
    found = {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.experts:
        found |= {
            "expert_count": config.experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if config.kv_lora_rank is not None:  # all heads share the compressed keys and values, and the part that RoPE turns
        found |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": config.q_lora_rank or 0,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "attention.value_length_mla": config.v_head_dim,
            "leading_dense_block_count": config.first_k_dense_replace or 0,
            "expert_shared_count": config.shared,
            "expert_group_count": config.n_group or 1,
            "expert_group_used_count": config.topk_group or 1,
            "expert_weights_scale": float(config.routed_scaling_factor or 1),
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_gating_func": SIGMOID,
        }
    if rope_type(config) in ("linear", "yarn"):
        found |= {f"rope.scaling.{name}": value for name, value in stretched(config, attention_factor).items()}
    return {f"{ARCHITECTURES[config.model_type]}.{name}": value for name, value in found.items()}


def stretched(config, attention_factor):
    """How RoPE is stretched: {name: value}."""
    scaling, window = config.rope_scaling, config.max_position_embeddings
    original = scaling.get("original_max_position_embeddings") or window
    factor = float(scaling.get("factor") or window / original)
    if rope_type(config) == "linear":
        return {"type": "linear", "factor": factor}
    in_softmax = config.kv_lora_rank is not None and scaling.get("mscale_all_dim") or 0
    by_itself = 1 if in_softmax else 1 + 0.1 * math.log(max(factor, 1))  # llama.cpp's own factor of cos and sin
    return {
        "type": "yarn",
        "factor": factor,
        "original_context_length": original,
        "attn_factor": attention_factor / by_itself,
        "yarn_beta_fast": float(scaling.get("beta_fast") or 32),
        "yarn_beta_slow": float(scaling.get("beta_slow") or 1),
        "yarn_log_multiplier": 0.1 * in_softmax,
    }


def to_be_told(config):
    """Options of llama.cpp, a list, for what it does not read from the file: where YaRN begins and ends."""
    scaling, usual = config.rope_scaling or {}, {"beta_fast": 32, "beta_slow": 1}
    if rope_type(config) != "yarn":
        return []
    asked = {name: scaling.get(name) or value for name, value in usual.items()}
    return [f"--yarn-{name.replace('_', '-')} {asked[name]:g}" for name in usual if asked[name] != usual[name]]


def vocabulary(config, tokenizer):
    """The tokens and merges: {name: value}."""
    model, added = tokenizer.config["model"], tokenizer.added
    cut = parts(tokenizer.config.get("pre_tokenizer"), "pretokenizers", "ByteLevel", "Digits", "Split")
    patterns = tuple(pattern for pattern in map(pattern_of, cut) if pattern)
    known = PRE_TOKENIZERS.get((patterns, bool(model.get("ignore_merges"))))
    spaced = cut[-1].get("add_prefix_space", True)
    refuse(known is None or spaced, "llama.cpp has no pre-tokenizer that cuts a text as tokenizer.json says")
    size, texts = config.vocab_size, {i: token for token, i in model["vocab"].items()}
    texts |= {i: text for text, i in tokenizer.ids.items()}
    refuse(max(texts) >= size, f"tokenizer.json has {max(texts) + 1:,} tokens, and the model {size:,}")
    kinds = {i: CONTROL if added[text].get("special") else USER_DEFINED for text, i in tokenizer.ids.items()}
    ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    ids = dict(zip(("eos", "eot", "eom"), ends)) | {"bos": (tokenizer.bos or [config.bos_token_id])[0]}
    found = {
        "model": "gpt2",
        "pre": known,
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(size)],
        "token_type": [kinds.get(i, NORMAL if i in texts else UNUSED) for i in range(size)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "add_bos_token": bool(tokenizer.bos),
        "add_eos_token": bool(tokenizer.eos),
    }
    found |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}
