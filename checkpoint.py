"""Tipos de LLMs, plataformas: an open model is a folder that anybody can load.

    config.json          the sizes and switches, see architectures.Config
    model.safetensors    the weights, by name; large models come in several such files and an index of them
    tokenizer.json       see bpe.py

Hugging Face transformers reads and writes such folders, too. In whatever precision their authors chose:

    hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
    >>> params, config = load("SmolLM2-135M")
    >>> save("mine", params, config)

llama.cpp reads one file instead (engine/gguf_file.py):

    python checkpoint.py mine --gguf mine.gguf

A checkpoint is somebody else's file: one that does not fit, or asks for what this model lacks, is refused with one
sentence (engine/published.py, engine/safetensors.py). Each file is written atomically: after a crash there is the old
one or the new one.
"""

import dataclasses
import json
import math
import os
import re
from contextlib import suppress

from architectures import SPARSE, Config, read_table, shapes
from engine import memory, np, to_numpy, xp
from engine.files import read_object, replace, shown, write_text
from engine.published import check_config, checked, is_block_fp8, refuse_what_is_not_here
from engine.safetensors import as_float, mapped_shards, release, scaled, write


def load(folder, dtype=np.float32, mapped=None):
    """Reads config.json and *.safetensors, in one file or in shards with an index: (params, config).

    dtype: what bfloat16, float16 and DeepSeek's 8-bit floats are converted to. mapped: True maps the weights that are
    stored as dtype from the file: loading is instant and takes no memory, generating text is up to a quarter slower.
    None: where they exceed a quarter of the memory.
    Raises ValueError or OSError, with one sentence, where something is missing, damaged or does not fit.
    """
    config, published = read_config(folder)
    stored = mapped_shards(folder)
    # DeepSeek's 8-bit floats: weight = stored · scale_inv, a scale for each block of (usually) 128 × 128
    scales = {name.removesuffix("_scale_inv"): stored.pop(name) for name in list(stored) if name.endswith("_scale_inv")}
    if scales and not is_block_fp8(published.get("quantization_config")):
        what = f"scales for {shown(min(scales))}, and config.json has no quantization_config for them"
        raise ValueError(f"{folder} has {what}")
    for name, (_, kind) in stored.items():
        if kind == "F8_E4M3" and name not in scales:
            raise ValueError(f"{folder} has {shown(name)} in 8-bit floats without a scale")

    mtp_layer = f"model.layers.{config.num_hidden_layers}."  # see mtp.py
    has_mtp = f"{mtp_layer}eh_proj.weight" in stored  # which is often left out, whatever config.json says
    if has_mtp != bool(config.num_nextn_predict_layers):
        config = dataclasses.replace(config, num_nextn_predict_layers=int(has_mtp))
    if has_mtp:
        for name in "embed_tokens.weight", "shared_head.head.weight":  # copies of the model's own
            stored.pop(mtp_layer + name, None)
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder} has no weight {name}")
        if stored[name][0].shape != shape:
            raise ValueError(f"{folder}: {name} has shape {stored[name][0].shape}, and config.json makes it {shape}")
    unknown = {name for name, (array, _) in stored.items() if array.size} - set(wanted)
    unknown -= {"lm_head.weight"}  # a tied head is sometimes stored a second time
    if unknown:
        raise ValueError(f"{folder} has a weight {shown(min(unknown))}, which this model does not have")

    as_stored = {name for name in wanted if stored[name][0].dtype == dtype and name not in scales}
    if mapped is None:
        mapped = sum(stored[name][0].nbytes for name in as_stored) > memory.installed() / 4
    params = room({name: shape for name, shape in wanted.items() if not mapped or name not in as_stored}, dtype)
    for name, array in params.items():
        value = as_float(*stored[name])
        if name in scales:
            value = scaled(name, value, as_float(*scales[name]), published["quantization_config"]["weight_block_size"])
        array[...] = xp.asarray(value)
        release(stored[name][0])
    return {name: params[name] if name in params else xp.asarray(stored[name][0]) for name in wanted}, config


def room(shapes, dtype):
    """Empty arrays, {name: array}. Generating a token takes as long as reading all weights, so they lie in one buffer,
    which the system backs with large pages, and each matrix with its longer side contiguous: a fifth to a third faster
    for SmolLM2.
    """
    buffer, start, arrays = xp.empty(sum(map(math.prod, shapes.values())), dtype), 0, {}
    for name, shape in shapes.items():
        part = buffer[start : start + math.prod(shape)]
        start += part.size
        transposed = len(shape) == 2 and shape[0] >= shape[1]
        arrays[name] = part.reshape(shape[::-1]).T if transposed else part.reshape(shape)
    return arrays


def read_config(folder):
    """The Config of a folder, and what its config.json holds. ValueError or OSError as of `load`."""
    path = os.path.join(existing(folder), "config.json")
    published = read_object(path)
    try:
        config = config_from_json(published)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    generation = os.path.join(folder, "generation_config.json")  # knows all the tokens that end an answer
    if os.path.exists(generation):
        ends = read_object(generation).get("eos_token_id", config.eos_token_id)
        config = dataclasses.replace(config, eos_token_id=checked(FIELDS["eos_token_id"], ends, generation))
    return config, published


def existing(folder):
    """The folder. ValueError where there is none; if it has the name of a published model, with how to download it."""
    if os.path.isdir(folder):
        return folder
    owner, name = os.path.split(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) or os.path.isdir(owner):
        raise ValueError(f"{folder} is not a folder with a checkpoint")
    download = f"pip install huggingface_hub; hf download {folder} --local-dir {name}"
    raise ValueError(f"there is no folder {folder}: if it is a published model, `{download}` makes a folder {name}")


# ---------------------------------------------------------------------------------------------- config.json


# of each model_type, what a field means that config.json leaves out
DEFAULTS = """
                         llama  qwen3  smollm3  qwen3_moe  deepseek_v3
max_position_embeddings  2048   32768  32768    32768      4096
num_key_value_heads      -      32     4        4          -
head_dim                 -      128    -        -          -
rope_theta               -      -      2e6      -          -
use_sliding_window       -      no     no       no         -
sliding_window           -      4096   -        4096       -
tie_word_embeddings      -      -      yes      -          -
bos_token_id             1      -      128000   -          0
eos_token_id             2      -      128001   -          1
num_experts              -      -      -        128        -
n_routed_experts         -      -      -        -          256
num_experts_per_tok      -      -      -        8          8
moe_intermediate_size    -      -      -        768        2048
n_shared_experts         -      -      -        -          1
norm_topk_prob           -      -      -        no         yes
routed_scaling_factor    -      -      -        -          2.5
n_group                  -      -      -        -          8
topk_group               -      -      -        -          4
first_k_dense_replace    -      -      -        -          3
decoder_sparse_step      -      -      -        1          -
q_lora_rank              -      -      -        -          1536
kv_lora_rank             -      -      -        -          512
qk_nope_head_dim         -      -      -        -          128
qk_rope_head_dim         -      -      -        -          64
v_head_dim               -      -      -        -          128
rope_interleave          -      -      -        -          yes
"""
NO_NUMBERS = {"smollm3": {"no_rope_layers": None}, "qwen3_moe": {"mlp_only_layers": None}}
# its class in transformers, and what newer files call a field
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_local_experts": "num_experts"}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    ),
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # Kimi K2 is DeepSeek V3 with other numbers, and transformers knows it as such
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FAMILY_DEFAULTS = {kind: fields | NO_NUMBERS.get(kind, {}) for kind, fields in read_table(DEFAULTS).items()}
NONE_BY_DEFAULT = {name for name, field in FIELDS.items() if field.default is None}
# of some families only: in the file of another they are refused
FAMILY_SPECIFIC = set().union(*FAMILY_DEFAULTS.values()) & NONE_BY_DEFAULT
FAMILY_SPECIFIC -= {"sliding_window", "bos_token_id", "eos_token_id"}
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["max_position_embeddings"]


def config_from_json(published):
    """A Config from what a config.json holds, in its older form (rope_theta, rope_scaling) or newer (rope_parameters).

    Raises ValueError where it asks for something this model does not have, or where values do not fit.
    """
    kind = str(published.get("model_type"))
    kind = ALIASES.get(kind, kind)
    if kind not in FAMILIES:
        raise ValueError(f"model_type {shown(kind)} is not one of {', '.join([*FAMILIES, *ALIASES])}")
    defaults, newer_names = FAMILY_DEFAULTS[kind], FAMILIES[kind][1]
    published = defaults | {newer_names.get(k, k): v for k, v in published.items()} | {"model_type": kind}
    if not published.get("use_sliding_window", True):
        published["sliding_window"] = None
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json cannot have rope_parameters = {shown(rope)}")
    plain = (rope.get("rope_type") or rope.get("type") or "default") == "default"
    published |= {"rope_scaling": None if plain else {k: v for k, v in rope.items() if k != "rope_theta"}}
    published |= {k: v for k, v in rope.items() if k == "rope_theta"}

    published |= {name: False for name in ("norm_topk_prob", "rope_interleave") if published.get(name, True) is None}
    fields = {field.name: checked(field, published.get(field.name)) for field in FIELDS.values()}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in FAMILY_SPECIFIC - defaults.keys():
        if fields.pop(name, None):
            raise ValueError(f"config.json asks for {name} = {shown(published[name])}, which a {kind} does not have")
    missing = [name for name in REQUIRED if not fields.get(name)]
    if missing:
        raise ValueError(f"config.json gives no {', '.join(missing)}")
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    fields.setdefault("num_key_value_heads", heads)
    if "kv_lora_rank" in fields:  # each head has keys of its own, whatever config.json says
        fields["num_key_value_heads"] = heads
    fields["head_dim"] = fields.get("qk_rope_head_dim") or fields.get("head_dim") or fields["hidden_size"] // heads
    if kind == "smollm3" and "no_rope_layers" not in fields:
        every = published.get("no_rope_layer_interval") or 4
        if type(every) is not int or every < 1:
            raise ValueError(f"config.json cannot have no_rope_layer_interval = {shown(every)}")
        fields["no_rope_layers"] = tuple(int((i + 1) % every != 0) for i in range(layers))
    if kind == "qwen3_moe" and published.get("use_sliding_window"):
        fields["layer_types"] = ("sliding_attention",) * layers
    if "sliding_attention" not in fields.get("layer_types", ()):
        fields.pop("sliding_window", None)
    config = Config(**fields)
    refuse_what_is_not_here(config, published, rope)
    check(config)
    return config


def check(config):
    """Raises ValueError where the sizes of a Config do not fit each other."""
    check_config(config, {"full_attention", "sliding_attention", *SPARSE})


def config_to_json(config):
    """The config.json, as a dict, that transformers reads."""
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    published = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    published |= {
        "bos_token_id": config.bos_token_id,  # written even if None: left out, transformers has defaults of its own
        "eos_token_id": config.eos_token_id,
        "architectures": [FAMILIES[config.model_type][0]],
        "hidden_act": "silu",
        "dtype": "float32",
    }
    if config.model_type != "llama":  # whose class has other defaults of these
        published |= {"use_sliding_window": any(windows), "pad_token_id": None}
    if config.kv_lora_rank is not None:  # written even if None: left out, it would mean 1536
        published["q_lora_rank"] = config.q_lora_rank
    if config.model_type == "deepseek_v3":  # how its router scores and chooses, by the names that llama.cpp looks for
        published |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return published


def save(folder, params, config, notes=None):
    """Writes config.json and model.safetensors, which transformers loads too, each atomically.

    notes: {name: text}, the metadata of model.safetensors, see engine/safetensors.py. config.json says float32, which
    is what `load` and transformers make of any other dtype.
    """
    os.makedirs(folder, exist_ok=True)
    arrays = {name: to_numpy(value) for name, value in params.items()}
    write(os.path.join(folder, "model.safetensors"), arrays, {"format": "pt"} | (notes or {}))
    with suppress(FileNotFoundError):  # of the shards of a previous model, which would be read instead
        os.remove(os.path.join(folder, "model.safetensors.index.json"))
    replace(
        os.path.join(folder, "config.json"),
        lambda path: write_text(path, json.dumps(config_to_json(config), indent=2) + "\n"),
    )


if __name__ == "__main__":
    from engine.cli import run
    from lab.export import main

    run(main)
