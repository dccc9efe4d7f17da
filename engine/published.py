"""What a published config.json may say: one place that refuses what is of another type or size, what does not fit the
rest, and what the model does not have, each with one sentence (ValueError). A config is any object with the fields of
config.json.
"""

from engine.files import refuse, shown

MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000, "n_routed_experts": 100_000}  # what no file can ask for
NEEDED = {"linear": {"factor"}, "llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": set()}  # to stretch RoPE
OPTIONS = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}  # of which 0 is none


def checked(field, value, file="config.json"):
    """The value of a field, with lists as tuples; ValueError where it is of another type or no size."""
    value = tuple(value) if isinstance(value, list) else value
    if field.type in (float, float | None) and type(value) is int:
        value = float(min(value, 10**30))
    wanted_bool = field.type in (bool, bool | None)
    fits = value is None or (wanted_bool if type(value) is bool else isinstance(value, field.type))
    if type(value) in (int, float):
        fits = fits and 0 <= value < MOST.get(field.name, 2**31)  # which no NaN is
    if type(value) is tuple:
        item = str if field.name == "layer_types" else int
        fits = fits and len(value) <= MOST["num_hidden_layers"] and {*map(type, value)} <= {item}
    refuse(not fits, f"{file} cannot have {field.name} = {shown(value)}")
    return value


def check_config(config, layer_types):
    """Whether the sizes fit each other. layer_types: those that there are."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layers, experts, used = config.num_hidden_layers, config.experts, config.num_experts_per_tok
    refuse(not kv_heads or heads % kv_heads, f"{heads} heads cannot share {kv_heads} key-value heads")
    bad = not 0 < config.head_dim <= 2**16 or config.head_dim % 2
    refuse(bad, f"RoPE cannot turn {config.head_dim} numbers: they must be pairs, and 65,536 at most")
    sizes = f"{layers:,} layers of {experts:,} experts"
    refuse(layers * (experts + 1) > 200_000, f"{sizes} are more than any machine holds")
    for name in "no_rope_layers", "layer_types":
        per_layer = getattr(config, name)
        count = layers if per_layer is None else len(per_layer)
        refuse(count != layers, f"{name} has {count} entries for {layers} layers")
    for kind in sorted(set(config.layer_types or ()) - layer_types):
        raise ValueError(f"config.json asks for layer_types = {kind!r:.40}, which is not here")
    try:
        for layer in range(layers):
            config.pattern(layer)
        for name, size in (config.sparse_attention or {}).items():
            if type(size) is not int or not (name in ("stride", "block")) <= size <= 2**20:
                raise TypeError
    except TypeError:
        raise ValueError(f"no pattern has sparse_attention = {config.sparse_attention!r:.40}") from None
    if any(map(config.has_experts, range(layers))):
        groups, used_groups = config.n_group or 1, config.topk_group or 1
        in_group, left = divmod(experts, groups)
        bad = left or used_groups > groups or (groups > 1 and in_group < 2)
        refuse(bad, f"{experts} experts cannot be in {groups} groups of which {used_groups} are used")
        most, size = used_groups * in_group, config.moe_intermediate_size
        bad = not 1 <= (used or 0) <= most or not size
        refuse(bad, f"a token cannot be sent to {used} of {most} experts of size {size}")
    if config.kv_lora_rank is not None:
        for name in "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim":
            size = getattr(config, name)
            missing = size is None and name != "q_lora_rank" or size == 0
            refuse(missing, f"latent attention cannot have {name} = {size}")
    check_rope(config.rope_theta, config.rope_scaling)


def check_rope(theta, scaling):
    """The base of RoPE's frequencies, and the dict that stretches them, see posenc.rope_frequencies."""
    refuse(not 1 < theta < 1e30, f"rope_theta must be more than 1, not {theta}")
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return
    refuse(kind not in NEEDED, f"RoPE scaling {kind!r:.40} is none of default, linear, llama3 and yarn")
    for key in NEEDED[kind] | OPTIONS | {"factor", "original_max_position_embeddings"}:
        value = scaling.get(key)
        refuse(value is None and key in NEEDED[kind], f"RoPE scaling {kind!r} needs {key!r}")
        absent = value is None or key in OPTIONS and not value
        bad = not absent and (type(value) not in (int, float) or not 0 < value < 1e9)
        refuse(bad, f"RoPE scaling {kind!r} cannot have {key} = {value!r:.40}")
    low, high = map(scaling.get, ("low_freq_factor", "high_freq_factor"))
    refuse(kind == "llama3" and low >= high, f"low_freq_factor {low} must be below high_freq_factor {high}")


def refuse_what_is_not_here(config, published, rope):
    """rope: the dict rope_parameters or rope_scaling of the file."""
    types, asked = set(config.layer_types or ()), {k: v for k, v in published.items() if v is not None}
    lacking = {
        "hidden_act": asked.get("hidden_act", "silu") not in ("silu", "swish"),
        "quantization_config": asked.get("quantization_config") and not is_block_fp8(asked["quantization_config"]),
        "partial_rotary_factor": any((d.get("partial_rotary_factor") or 1.0) != 1.0 for d in (rope, published)),
        "use_sliding_window": asked.get("use_sliding_window") and not types,
        "sliding_window": "sliding_attention" in types and not config.sliding_window,
        "scoring_func": asked.get("scoring_func", "sigmoid") != "sigmoid",
        "topk_method": asked.get("topk_method", "noaux_tc") != "noaux_tc",
        "moe_layer_freq": asked.get("moe_layer_freq", 1) != 1,
        "num_nextn_predict_layers": (config.num_nextn_predict_layers or 0) > 1,
    }
    for name, wanted in lacking.items():
        refuse(wanted, f"config.json asks for {name} = {shown(published.get(name))}, which is not here")


def is_block_fp8(quantization):
    """Whether a quantization_config describes DeepSeek's 8-bit floats, with a scale for each block of a matrix."""
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return False
    return quantization.get("quant_method") == "fp8" and quantization.get("fmt", "e4m3") == "e4m3"
