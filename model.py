"""Transformers actuales: a decoder-only language model, from tokens to logits and back.

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))      (pre-norm)
    logits = norm(x) W_headᵀ

Llama 3.2, Qwen3 and SmolLM3 are this model with other sizes and a few switches, all of them fields of
`Config`. `params` is one flat dict from the names that published checkpoints use to arrays, so a
checkpoint loads as it is and gradients are a dict with the same keys.

    python model.py                              the published architectures in numbers
    python model.py --load DIR --prompt TEXT     continue a text with a trained model

Shapes: tokens (batch, time), hidden states (batch, time, hidden_size), logits (batch, time, vocab_size).
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass

import numpy as np

import posenc
from attention import KVCache, self_attention
from backend import to_numpy, xp
from layers import embedding, linear, linear_cross_entropy, rms_norm, swiglu

# -------------------------------------------------------------------------------------- forward, backward


def block(x, weights, config, **attention_options):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    x: (batch, time, hidden). weights: {module: {name: array}}, as `by_layer` makes them.
    Returns y, shaped like x, and backward(dy) -> (dx, dweights).
    """
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    normed, norm1_backward = rms_norm(x, weights["input_layernorm"]["weight"], eps)
    attended, attention_backward = self_attention(
        normed, weights["self_attn"], heads, kv_heads, eps=eps, **attention_options
    )
    middle = x + attended
    normed, norm2_backward = rms_norm(middle, weights["post_attention_layernorm"]["weight"], eps)
    fed, feed_backward = swiglu(normed, weights["mlp"])

    def backward(dy):
        dnormed, dmlp = feed_backward(dy)
        dmiddle, dnorm2 = norm2_backward(dnormed)
        dmiddle += dy  # the residual connection passes the gradient on unchanged
        dnormed, dattention = attention_backward(dmiddle)
        dx, dnorm1 = norm1_backward(dnormed)
        dx += dmiddle
        dnorms = {"input_layernorm": {"weight": dnorm1}, "post_attention_layernorm": {"weight": dnorm2}}
        return dx, dnorms | {"self_attn": dattention, "mlp": dmlp}

    return middle + fed, backward


def by_layer(params, layers):
    """The weights of the blocks, a nested dict for each: model.layers.3.mlp.up_proj.weight is
    by_layer(params, layers)[3]["mlp"]["up_proj.weight"].
    """
    nested = [{} for _ in range(layers)]
    for name, value in params.items():
        if name.startswith("model.layers."):
            _, _, layer, module, rest = name.split(".", 4)
            nested[int(layer)].setdefault(module, {})[rest] = value
    return nested


def transformer(params, config, tokens, cache=None, padding=None):
    """Everything but the head.

    tokens: (batch, time) integers. cache: a list of one KVCache a layer, appended to, for generation.
    padding: (batch, earlier and new tokens) booleans, False where a row is filled up on its left; None = nowhere.
    Returns hidden (batch, time, hidden_size) and backward(dhidden) -> grads. With a cache the activations
    are freed on the way, and there is no backward.
    """
    start = cache[0].length if cache else 0
    time = tokens.shape[1]
    positions = xp.arange(start, start + time)  # (time,)
    if padding is not None:  # a row's first real token is at position 0
        positions = (xp.cumsum(padding, axis=1) - 1).clip(0)[:, None, start:]  # (batch, 1, time)
    frequencies, factor = posenc.rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    table = params["model.embed_tokens.weight"]
    rope = posenc.rope_tables(positions, frequencies, factor, table.dtype)

    x, embed_backward = embedding(tokens, table)
    backwards = []
    for i, weights in enumerate(by_layer(params, config.num_hidden_layers)):
        x, block_backward = block(
            x,
            weights,
            config,
            rope=rope if config.uses_rope(i) else None,
            cache=cache[i] if cache else None,
            causal=config.causal,
            window=config.window(i),
            padding=padding,
        )
        if cache is None:
            backwards.append(block_backward)
    hidden, norm_backward = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)

    def backward(dhidden):
        grads = {}
        dx, grads["model.norm.weight"] = norm_backward(dhidden)
        for i in reversed(range(config.num_hidden_layers)):
            dx, dweights = backwards[i](dx)
            for module, dmodule in dweights.items():
                grads |= {f"model.layers.{i}.{module}.{name}": g for name, g in dmodule.items()}
        grads["model.embed_tokens.weight"] = embed_backward(dx)
        return grads

    return hidden, backward


def _head_name(config):
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def _through_head(params, config, body_backward, dhidden, dhead):
    """The gradient of every weight, in the order of params; a tied head adds to the embedding's."""
    grads = body_backward(dhidden)
    name = _head_name(config)
    grads[name] = grads[name] + dhead if name in grads else dhead
    return {name: grads[name] for name in params}


def forward(params, config, tokens):
    """tokens (batch, time) -> logits (batch, time, vocab_size), and backward(dlogits) -> grads."""
    hidden, body_backward = transformer(params, config, tokens)
    logits, head_backward = linear(hidden, params[_head_name(config)])

    def backward(dlogits):
        return _through_head(params, config, body_backward, *head_backward(dlogits))

    return logits, backward


def loss(params, config, tokens, targets):
    """Mean cross-entropy in nats over the targets that are not -100, without holding the logits.

    tokens, targets: (batch, time) integers. Returns the loss, a float, and backward(dloss=1) -> grads.
    """
    hidden, body_backward = transformer(params, config, tokens)
    value, head_backward = linear_cross_entropy(hidden, params[_head_name(config)], targets)

    def backward(dloss=1.0):
        return _through_head(params, config, body_backward, *head_backward(dloss))

    return value, backward


# ---------------------------------------------------------------------------------------------- Config


@dataclass(frozen=True)
class Config:
    """The sizes and switches of a model, named as in the published config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # the context window: prompt and answer together
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # see posenc.rope_frequencies
    no_rope_layers: tuple | None = None  # a 0 for each layer without RoPE, a 1 for each with it
    layer_types: tuple | None = None  # full_attention or sliding_attention for each layer
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False  # True: the head is the embedding table
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    causal: bool = True  # False: every token sees the whole text, for filling gaps

    @classmethod
    def from_dict(cls, published):
        """Reads a config.json, in its older form (rope_theta, rope_scaling) or newer (rope_parameters).

        Raises ValueError where it asks for something this model does not have.
        """
        kind = published.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"model_type {kind!r} is not one of {', '.join(FAMILIES)}")
        published = FAMILIES[kind][1] | published
        fields = {}
        for field in dataclasses.fields(cls):
            value = published.get(field.name)
            if value is not None:
                value = tuple(value) if isinstance(value, list) else value
                value = float(value) if field.type is float and type(value) is int else value
                if not isinstance(value, field.type) or (type(value) is int and value < 0):
                    raise ValueError(f"config.json cannot have {field.name} = {value!r}")
                fields[field.name] = value
        missing = [name for name in REQUIRED if not fields.get(name)]
        if missing:
            raise ValueError(f"config.json gives no {', '.join(missing)}")
        heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        fields.setdefault("num_key_value_heads", heads)
        fields.setdefault("head_dim", fields["hidden_size"] // heads)
        rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config.json cannot have rope_parameters = {rope!r}")
        if rope:
            fields["rope_theta"] = rope.get("rope_theta", published.get("rope_theta", 10000.0))
            plain = rope.get("rope_type", rope.get("type", "default")) == "default"
            fields["rope_scaling"] = None if plain else {k: v for k, v in rope.items() if k != "rope_theta"}
        if kind == "smollm3" and "no_rope_layers" not in fields:
            every = published.get("no_rope_layer_interval", 4)
            fields["no_rope_layers"] = tuple(int((i + 1) % every != 0) for i in range(layers))

        sliding = "sliding_attention" in fields.get("layer_types", ())
        lacking = {
            "hidden_act": published.get("hidden_act", "silu") not in ("silu", "swish"),
            "quantization_config": published.get("quantization_config"),
            "partial_rotary_factor": {d.get("partial_rotary_factor", 1.0) for d in (rope, published)} != {1.0},
            "use_sliding_window": published.get("use_sliding_window") and "layer_types" not in fields,
            "layer_types": set(fields.get("layer_types", ())) - {"full_attention", "sliding_attention"},
            "sliding_window": sliding and "sliding_window" not in fields,
        }
        for name, wanted in lacking.items():
            if wanted:
                raise ValueError(f"config.json asks for {name} = {published.get(name)!r}, which is not here")
        kv_heads, head_dim = fields["num_key_value_heads"], fields["head_dim"]
        if not kv_heads or heads % kv_heads or not head_dim or head_dim % 2:
            raise ValueError("the heads must be a multiple of the key-value heads, and head_dim even")
        for name in "no_rope_layers", "layer_types":
            if name in fields and len(fields[name]) != layers:
                raise ValueError(f"{name} has {len(fields[name])} entries for {layers} layers")
        config = cls(**fields)
        posenc.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)  # refuses what it lacks
        return config

    def uses_rope(self, layer):
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    def window(self, layer):
        """How many tokens the layer's queries see; None = all of them."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    def to_dict(self):
        """The config.json that transformers reads."""
        published = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        published |= {
            "architectures": [FAMILIES[self.model_type][0]],
            "hidden_act": "silu",
            "dtype": "float32",
        }
        if self.model_type != "llama":  # there these have other defaults, or None switches the window off
            published |= {"use_sliding_window": self.sliding_window is not None, "pad_token_id": None}
        return published


FAMILIES = {  # model_type: its class in transformers, and what a field that config.json leaves out means there
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "qwen3": ("Qwen3ForCausalLM", {"max_position_embeddings": 32768, "head_dim": 128}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
}
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ARCHITECTURES = {
    "llama3.2": Config(  # 1B
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=LLAMA3_SCALING,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "qwen3": Config(  # 4B
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "smollm3": Config(  # 3B
        model_type="smollm3",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=65536,
        rope_theta=5e6,
        no_rope_layers=(1, 1, 1, 0) * 9,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128012,
    ),
}


def shapes(config):
    """The shape of every weight, by its published name: {name: (out, in) or (dim,)}."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    layer = {"input_layernorm.weight": (hidden,)}
    for name, out, into, bias in [
        ("self_attn.q_proj", q_dim, hidden, config.attention_bias),
        ("self_attn.k_proj", kv_dim, hidden, config.attention_bias),
        ("self_attn.v_proj", kv_dim, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, q_dim, config.attention_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ]:
        layer[f"{name}.weight"] = (out, into)
        if bias:
            layer[f"{name}.bias"] = (out,)
    if config.model_type == "qwen3":  # QK-norm
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    layer["post_attention_layernorm.weight"] = (hidden,)

    table = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        table |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    table["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (config.vocab_size, hidden)
    return table


def init(config, seed=0, dtype=np.float32):
    """New weights: normal with standard deviation `initializer_range`; the matrices that write into the
    residual stream smaller by √(2 layers), so that its variance does not grow with depth (GPT-2,
    Radford et al. 2019); norms 1 and biases 0.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            params[name] = np.full(shape, float(name.endswith("norm.weight")), dtype)
        else:
            std = config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * config.num_hidden_layers) ** 0.5
            params[name] = (std * rng.standard_normal(shape, np.float32)).astype(dtype)
    return {name: xp.asarray(value) for name, value in params.items()}


# ---------------------------------------------------------------------------------------------- generate


def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Draws a token for each row of logits (batch, vocab); temperature 0 takes the likeliest.

    top_k: only among the k likeliest (Fan et al. 2018). top_p: only among the likeliest that together have
    probability p (nucleus sampling, Holtzman et al. 2020). rng: a numpy Generator, needed where temperature > 0.
    Returns (batch,) integers.
    """
    logits = to_numpy(logits).astype(np.float64)
    if temperature <= 0:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]  # [:None] is all of them
    logits = np.take_along_axis(logits, order, axis=-1) / temperature
    p = np.exp(logits - logits[:, :1])
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0  # what comes before already has p; the first stays
        p /= p.sum(axis=-1, keepdims=True)
    drawn = (np.cumsum(p, axis=-1) < rng.random((len(p), 1))).sum(axis=-1)
    drawn = np.minimum(drawn, (p > 0).sum(axis=-1) - 1)  # a sum of p that rounds to less than 1
    return np.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def generate_batch(
    params, config, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=None, rng=None
):
    """Continues prompts of different lengths together.

    prompts: a list of lists of token ids. stop: ids that end a row, the config's eos_token_id if None;
    temperature, top_k, top_p, rng: as in `sample`, with default_rng(0) if rng is None.
    Returns an iterator over steps, each an array (batch,): the new tokens, a stop token being a row's
    last, and -1 for the rows that ended before. Raises ValueError for an empty prompt, a token out of
    the vocabulary, or where the longest prompt and its answer do not fit into the context window.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest, window = int(lengths.max(initial=0)), config.max_position_embeddings
    if lengths.min(initial=1) < 1 or not len(prompts):
        raise ValueError("a prompt needs at least one token")
    if longest + max_new_tokens > window:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {max_new_tokens} "
            f"do not fit into the context window of {window}"
        )
    if not config.causal:
        raise ValueError("this model was trained to fill gaps and cannot continue a text")
    tokens = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = prompt  # filled up on the left, so that all rows end together
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"a prompt has a token id outside the vocabulary of {config.vocab_size}")
    if stop is None:
        stop = config.eos_token_id
    stop = [] if stop is None else np.atleast_1d(stop)
    rng = rng or np.random.default_rng(0)

    def steps(tokens):
        padding = np.arange(longest) >= longest - lengths[:, None]  # (batch, longest)
        ended = np.zeros(len(prompts), bool)
        cache = [KVCache() for _ in range(config.num_hidden_layers)]
        for _ in range(max_new_tokens):
            seen = None if padding.all() else xp.asarray(padding)
            hidden, _ = transformer(params, config, xp.asarray(tokens), cache, seen)
            logits, _ = linear(hidden[:, -1], params[_head_name(config)])
            drawn = sample(logits, temperature, top_k, top_p, rng)
            yield np.where(ended, -1, drawn)
            ended |= np.isin(drawn, stop)
            if ended.all():
                return
            tokens = drawn[:, None]
            padding = np.pad(padding, ((0, 0), (0, 1)), constant_values=True)

    return steps(tokens)


def generate(params, config, prompt_ids, max_new_tokens, **options):
    """Continues one prompt: an iterator over token ids; options and errors as in `generate_batch`."""
    return (int(step[0]) for step in generate_batch(params, config, [list(prompt_ids)], max_new_tokens, **options))


def fill(params, config, tokens, mask_id):
    """The likeliest token for each gap, for a model trained with the masked objective.

    tokens: a list of ids with mask_id at the gaps. Returns the list with the gaps filled. Raises ValueError for
    a causal model, and for more tokens than the context window.
    """
    if config.causal:
        raise ValueError("this model was trained to continue a text and cannot fill gaps")
    if len(tokens) > config.max_position_embeddings:
        window = config.max_position_embeddings
        raise ValueError(f"{len(tokens)} tokens do not fit into the context window of {window}")
    tokens = np.asarray(tokens)
    logits, _ = forward(params, config, xp.asarray(tokens[None]))
    logits = to_numpy(logits[0])
    logits[:, mask_id] = -np.inf
    return np.where(tokens == mask_id, logits.argmax(axis=-1), tokens).tolist()


# --------------------------------------------------------------------------------------------- load, save

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_safetensors(path):
    """The arrays of a safetensors file, memory-mapped where NumPy has the dtype: {name: array}. Changing them
    does not change the file.

    The format: the header's length in 8 bytes, a JSON header {name: {dtype, shape, data_offsets}}, the data.
    bfloat16, which NumPy lacks, is the upper half of a float32. Raises ValueError for a damaged file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{path} is truncated or no safetensors file")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            entries = [(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} has a damaged safetensors header") from None
    arrays = {}
    for name, kind, shape, begin, end in entries:
        if kind not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {kind}, which is not one of {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[kind])
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not whole or end - begin != dtype.itemsize * int(np.prod(shape, dtype=object)) or start + end > size:
            raise ValueError(f"{path} is truncated or damaged at {name}")
        if begin == end:
            arrays[name] = np.zeros(shape, dtype)
            continue
        array = np.memmap(path, dtype, "c", start + begin, shape)
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = array
    return arrays


def load(folder, dtype=np.float32):
    """Reads config.json and *.safetensors, in one file or in shards with an index: (params, config).

    Raises ValueError or OSError, with one sentence, where something is missing, damaged or does not fit.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder with a checkpoint")
    published = _read_json(os.path.join(folder, "config.json"))
    generation = os.path.join(folder, "generation_config.json")  # knows all the tokens that end an answer
    if os.path.exists(generation):
        published["eos_token_id"] = _read_json(generation).get("eos_token_id", published.get("eos_token_id"))
    config = Config.from_dict(published)
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    stored = {}
    for file in files:
        if os.path.basename(file) != file:
            raise ValueError(f"{index} names a file outside its folder")
        stored |= read_safetensors(os.path.join(folder, file))
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder} has no weight {name}")
        if stored[name].shape != shape:
            raise ValueError(f"{folder}: {name} has shape {stored[name].shape}, and config.json makes it {shape}")
    unknown = set(stored) - set(wanted) - {"lm_head.weight"}  # a tied head is sometimes stored a second time
    if unknown:
        raise ValueError(f"{folder} has a weight {min(unknown)}, which this model does not have")
    # Generating a token takes as long as reading all weights. They are read fastest from one large array, whose
    # memory pages are large too, and along the longer side of each matrix (a fifth to a third faster for SmolLM2).
    memory, params, start = xp.empty(sum(math.prod(shape) for shape in wanted.values()), dtype), {}, 0
    for name, shape in wanted.items():
        stop = start + math.prod(shape)
        if len(shape) == 2 and shape[0] >= shape[1]:
            params[name] = memory[start:stop].reshape(shape[::-1]).T
        else:
            params[name] = memory[start:stop].reshape(shape)
        params[name][...] = xp.asarray(stored.pop(name))
        start = stop
    return params, config


def _read_json(path):
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except ValueError:
            raise ValueError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def save(folder, params, config):
    """Writes config.json and model.safetensors, which transformers loads too; each replaces its forerunner whole."""
    from safetensors.numpy import save_file

    os.makedirs(folder, exist_ok=True)
    arrays = {name: np.ascontiguousarray(to_numpy(value)) for name, value in params.items()}
    weights = os.path.join(folder, "model.safetensors")
    replace(weights, lambda path: save_file(arrays, path, metadata={"format": "pt"}))
    replace(
        os.path.join(folder, "config.json"),
        lambda path: write_text(path, json.dumps(config.to_dict(), indent=2) + "\n"),
    )


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def replace(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old file or the new, never a part of one."""
    temporary = f"{path}.new"
    write(temporary)
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- command line


def describe():
    """The published architectures in numbers, computed from the shapes without allocating a weight."""
    print("architecture       parameters  layers  hidden  heads  key heads  context  KV cache, bytes a token in bf16")
    for name, c in ARCHITECTURES.items():
        parameters = sum(int(np.prod(shape, dtype=object)) for shape in shapes(c).values())
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
        print(
            f"{name:12}{parameters:17,}{c.num_hidden_layers:8}{c.hidden_size:8}{c.num_attention_heads:7}"
            f"{c.num_key_value_heads:11}{c.max_position_embeddings:9}{cache:10,}"
        )


def main(argv=None):
    import bpe

    parser = Parser(description="Continue a text with a trained model, or print the architectures.")
    parser.add_argument("--load", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, or with <mask> for each gap to fill")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="200, or what fits, if not given")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.load is None) != (args.prompt is None):
        parser.error("--load and --prompt go together")
    if args.load is None:
        return describe()
    for name, wrong in {
        "max-new-tokens": args.max_new_tokens is not None and args.max_new_tokens < 1,
        "temperature": not 0 <= args.temperature < float("inf"),
        "top-k": args.top_k is not None and args.top_k < 1,
        "top-p": not 0 < args.top_p <= 1,
    }.items():
        if wrong:
            parser.error(f"--{name} is out of its range")
    params, config = load(args.load)
    tokenizer = bpe.load(os.path.join(args.load, "tokenizer.json"))
    ids = tokenizer.encode(args.prompt, allow_special=True)
    if not config.causal:
        if "<mask>" not in tokenizer.special:
            raise ValueError(f"{args.load} fills gaps, but its tokenizer has no <mask>")
        return print(tokenizer.decode(fill(params, config, ids, tokenizer.special["<mask>"])))
    stop = [] if config.eos_token_id is None else list(np.atleast_1d(config.eos_token_id))
    if ids[: len(tokenizer.bos)] != tokenizer.bos:
        ids = tokenizer.bos + ids
    answer = generate(
        params,
        config,
        ids,
        args.max_new_tokens or max(1, min(200, config.max_position_embeddings - len(ids))),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        rng=np.random.default_rng(args.seed),
    )
    print(args.prompt, end="", flush=True)
    for piece in tokenizer.stream(token for token in answer if token not in stop):
        print(piece, end="", flush=True)
    print()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence too, without the list of all options."""

    def error(self, message):
        raise ValueError(message)


def run(main):
    """Runs a command line: what the user can mend is one sentence on standard error, and exit status 1."""
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
