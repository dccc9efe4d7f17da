"""What a published config.json may say: one place that refuses what is of another type or size, what does not fit the
rest, and what the model does not have, each with one sentence (ValueError). A config is any object with the fields of
config.json.
"""

from engine.files import shown

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
        fits = (
            fits
            and len(value) <= MOST["num_hidden_layers"]
            and all(type(x) is (str if field.name == "layer_types" else int) for x in value)
        )
    if not fits:
        raise ValueError(f"{file} cannot have {field.name} = {shown(value)}")
    return value


def check_config(config, layer_types):
    """Whether the sizes fit each other. layer_types: those that there are."""
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    if not kv_heads or config.num_attention_heads % kv_heads:
        raise ValueError(f"{config.num_attention_heads} heads cannot share {kv_heads} key-value heads")
    if not 0 < config.head_dim <= 2**16 or config.head_dim % 2:
        raise ValueError(f"RoPE cannot turn {config.head_dim} numbers: they must be pairs, and 65,536 at most")
    if layers * (config.experts + 1) > 200_000:
        raise ValueError(f"{layers:,} layers of {config.experts:,} experts are more than any machine holds")
    for name in "no_rope_layers", "layer_types":
        per_layer = getattr(config, name)
        if per_layer is not None and len(per_layer) != layers:
            raise ValueError(f"{name} has {len(per_layer)} entries for {layers} layers")
    unknown = set(config.layer_types or ()) - layer_types
    if unknown:
        raise ValueError(f"config.json asks for layer_types = {min(unknown)!r:.40}, which is not here")
    try:
        for layer in range(layers):
            config.pattern(layer)
        for name, size in (config.sparse_attention or {}).items():
            if type(size) is not int or not (name in ("stride", "block")) <= size <= 2**20:
                raise TypeError
    except TypeError:
        raise ValueError(f"no pattern has sparse_attention = {config.sparse_attention!r:.40}") from None
    if any(map(config.has_experts, range(layers))):
        groups, used = config.n_group or 1, config.topk_group or 1
        in_group, left = divmod(config.experts, groups)
        if left or used > groups or (groups > 1 and in_group < 2):
            raise ValueError(f"{config.experts} experts cannot be in {groups} groups of which {used} are used")
        if not 1 <= (config.num_experts_per_tok or 0) <= used * in_group or not config.moe_intermediate_size:
            raise ValueError(
                f"a token cannot be sent to {config.num_experts_per_tok} of {used * in_group} experts "
                f"of size {config.moe_intermediate_size}"
            )
    if config.kv_lora_rank is not None:
        sizes = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        sizes += [] if config.q_lora_rank is None else ["q_lora_rank"]
        for name in sizes:
            if not getattr(config, name):
                raise ValueError(f"latent attention cannot have {name} = {getattr(config, name)}")
    check_rope(config.rope_theta, config.rope_scaling)


def check_rope(theta, scaling):
    """The base of RoPE's frequencies, and the dict that stretches them, see posenc.rope_frequencies."""
    if not 1 < theta < 1e30:
        raise ValueError(f"rope_theta must be more than 1, not {theta}")
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return
    if kind not in NEEDED:
        raise ValueError(f"RoPE scaling {kind!r:.40} is none of default, linear, llama3 and yarn")
    for key in NEEDED[kind] | OPTIONS | {"factor", "original_max_position_embeddings"}:
        value = scaling.get(key)
        if value is None and key in NEEDED[kind]:
            raise ValueError(f"RoPE scaling {kind!r} needs {key!r}")
        absent = value is None or key in OPTIONS and not value
        if not absent and (type(value) not in (int, float) or not 0 < value < 1e9):
            raise ValueError(f"RoPE scaling {kind!r} cannot have {key} = {value!r:.40}")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")


def refuse_what_is_not_here(config, published, rope):
    """rope: the dict rope_parameters or rope_scaling of the file."""

    def given(name, otherwise):
        return otherwise if published.get(name) is None else published[name]

    types = set(config.layer_types or ())
    quantization = published.get("quantization_config")
    lacking = {
        "hidden_act": given("hidden_act", "silu") not in ("silu", "swish"),
        "quantization_config": quantization and not is_block_fp8(quantization),
        "partial_rotary_factor": any((d.get("partial_rotary_factor") or 1.0) != 1.0 for d in (rope, published)),
        "use_sliding_window": published.get("use_sliding_window") and not types,
        "sliding_window": "sliding_attention" in types and not config.sliding_window,
        "scoring_func": given("scoring_func", "sigmoid") != "sigmoid",
        "topk_method": given("topk_method", "noaux_tc") != "noaux_tc",
        "moe_layer_freq": given("moe_layer_freq", 1) != 1,
        "num_nextn_predict_layers": (config.num_nextn_predict_layers or 0) > 1,
    }
    for name, wanted in lacking.items():
        if wanted:
            raise ValueError(f"config.json asks for {name} = {shown(published.get(name))}, which is not here")


def is_block_fp8(quantization):
    """Whether a quantization_config describes DeepSeek's 8-bit floats, with a scale for each block of a matrix."""
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
        and quantization.get("quant_method") == "fp8"
        and quantization.get("fmt", "e4m3") == "e4m3"
    )
