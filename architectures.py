"""Transformers actuales: six published architectures, as numbers.

Llama 3.2 1B, Qwen3 4B and SmolLM3 3B are dense: every token passes through every weight. Qwen3 235B-A22B,
DeepSeek V3 and Kimi K2 send each token to a few of many experts (moe.py), and the last two keep one small
latent vector per token instead of keys and values (attention.py). All six are one model (model.py) with
other sizes and switches, the fields of `Config`, which have their names in the published config.json.

`shapes` gives every weight by its published name, so sizes and costs are computed without allocating one.
"""

import dataclasses
import math
from dataclasses import dataclass

import posenc
from masks import PATTERNS, sparse


@dataclass(frozen=True)
class Config:
    """The sizes and switches of a model, named as in the published config.json. None: the model has no such thing."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # inside a dense feed-forward layer
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # with latent attention, the part of it that RoPE turns
    max_position_embeddings: int  # the context window: prompt and answer together
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # see posenc.rope_frequencies
    no_rope_layers: tuple | None = None  # a 0 for each layer without RoPE, a 1 for each with it
    layer_types: tuple | None = None  # for each layer full_attention, sliding_attention, or one of SPARSE
    sliding_window: int | None = None
    sparse_attention: dict | None = None  # stride, block, ... of masks.sparse, for the layers that are SPARSE
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False  # True: the head is the embedding table
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    causal: bool = True  # False: every token sees the whole text, for filling gaps

    # mixture of experts, see moe.py
    num_experts: int | None = None  # Qwen3's name
    n_routed_experts: int | None = None  # DeepSeek's name of the same
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None  # inside one expert
    n_shared_experts: int | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | None = None
    n_group: int | None = None
    topk_group: int | None = None
    first_k_dense_replace: int | None = None  # so many layers at the bottom are dense,
    decoder_sparse_step: int | None = None  # all but every n-th,
    mlp_only_layers: tuple | None = None  # and these

    # multi-head latent attention, see attention.py
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool | None = None

    num_nextn_predict_layers: int | None = None  # 1: a further layer that predicts the token after the next

    @property
    def experts(self):
        """The number of routed experts in a layer that has them."""
        return self.num_experts or self.n_routed_experts or 0

    def has_experts(self, layer):
        dense = layer < (self.first_k_dense_replace or 0) or layer in (self.mlp_only_layers or ())
        dense = dense or (layer + 1) % (self.decoder_sparse_step or 1) != 0
        return self.experts > 0 and (not dense or layer == self.num_hidden_layers)  # the MTP layer always

    def has_qk_norm(self):
        return self.model_type in ("qwen3", "qwen3_moe")

    def uses_rope(self, layer):
        return self.no_rope_layers is None or layer == self.num_hidden_layers or bool(self.no_rope_layers[layer])

    def layer_type(self, layer):
        of_all = self.layer_types is None or layer == self.num_hidden_layers  # the MTP layer sees everything
        return "full_attention" if of_all else self.layer_types[layer]

    def window(self, layer):
        """How many tokens the layer's queries see; None = all of them."""
        return self.sliding_window if self.layer_type(layer) == "sliding_attention" else None

    def pattern(self, layer):
        """The sparse pattern of the layer's attention, or None."""
        kind = SPARSE.get(self.layer_type(layer))
        return None if kind is None else sparse(kind, **self.sparse_attention or {})

    def attention_scale(self):
        """What latent attention multiplies its scores by: 1/√dim, and more where YaRN stretches the context."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        stretched = self.rope_scaling or {}
        return scale * posenc.sharpening(stretched.get("factor") or 1, stretched.get("mscale_all_dim")) ** 2

    def check(self):
        """Raises ValueError where the sizes do not fit each other, or posenc lacks what rope_scaling asks for."""
        layers, kv_heads = self.num_hidden_layers, self.num_key_value_heads
        if not kv_heads or self.num_attention_heads % kv_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {kv_heads} key-value heads")
        if not 0 < self.head_dim <= 2**16 or self.head_dim % 2:
            raise ValueError(f"RoPE cannot turn {self.head_dim} numbers: they must be pairs, and 65,536 at most")
        if layers * (self.experts + 1) > 200_000:
            raise ValueError(f"{layers:,} layers of {self.experts:,} experts are more than any machine holds")
        for name in "no_rope_layers", "layer_types":
            per_layer = getattr(self, name)
            if per_layer is not None and len(per_layer) != layers:
                raise ValueError(f"{name} has {len(per_layer)} entries for {layers} layers")
        unknown = set(self.layer_types or ()) - {"full_attention", "sliding_attention", *SPARSE}
        if unknown:
            raise ValueError(f"config.json asks for layer_types = {min(unknown)!r:.40}, which is not here")
        try:
            for layer in range(layers):
                self.pattern(layer)
            for name, size in (self.sparse_attention or {}).items():
                if type(size) is not int or not (name in ("stride", "block")) <= size <= 2**20:
                    raise TypeError
        except TypeError:
            raise ValueError(f"no pattern has sparse_attention = {self.sparse_attention!r:.40}") from None
        if any(map(self.has_experts, range(layers))):
            groups, used = self.n_group or 1, self.topk_group or 1
            in_group, left = divmod(self.experts, groups)
            if left or used > groups or (groups > 1 and in_group < 2):
                raise ValueError(f"{self.experts} experts cannot be in {groups} groups of which {used} are used")
            if not 1 <= (self.num_experts_per_tok or 0) <= used * in_group or not self.moe_intermediate_size:
                raise ValueError(
                    f"a token cannot be sent to {self.num_experts_per_tok} of {used * in_group} experts "
                    f"of size {self.moe_intermediate_size}"
                )
        if self.kv_lora_rank is not None:
            sizes = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
            sizes += [] if self.q_lora_rank is None else ["q_lora_rank"]
            for name in sizes:
                if not getattr(self, name):
                    raise ValueError(f"latent attention cannot have {name} = {getattr(self, name)}")
        posenc.rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling, self.max_position_embeddings)


SPARSE = {f"{kind}_attention": kind for kind in PATTERNS}  # see masks.PATTERNS

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK_SCALING = {
    "rope_type": "yarn",
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
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
    "qwen3-moe": Config(  # 235B-A22B
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        bos_token_id=151643,
        eos_token_id=151645,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    ),
    "deepseek-v3": Config(  # 671B
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        head_dim=64,
        max_position_embeddings=163840,
        rope_scaling=DEEPSEEK_SCALING,
        bos_token_id=0,
        eos_token_id=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_interleave=True,
        num_nextn_predict_layers=1,
    ),
    "kimi-k2": Config(  # 1 trillion
        model_type="deepseek_v3",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=5e4,
        rope_scaling=DEEPSEEK_SCALING | {"factor": 32.0, "beta_fast": 1.0},
        bos_token_id=163584,
        eos_token_id=163585,
        n_routed_experts=384,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.827,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_interleave=True,
        num_nextn_predict_layers=0,
    ),
}

# --------------------------------------------------------------------------------------- weights and their cost


def shapes(config):
    """The shape of every weight, by its published name: {name: (out, in) or (dim,)}."""
    hidden = config.hidden_size
    table = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers + (config.num_nextn_predict_layers or 0)):
        parts = {"input_layernorm": {"weight": (hidden,)}, "self_attn": _attention_shapes(config)}
        parts["post_attention_layernorm"] = {"weight": (hidden,)}
        parts["mlp"] = _mlp_shapes(config, i)
        if i == config.num_hidden_layers:  # reads the embedding of the next token beside the hidden state
            parts |= {name: {"weight": (hidden,)} for name in ("enorm", "hnorm", "shared_head.norm")}
            parts["eh_proj"] = {"weight": (hidden, 2 * hidden)}
        for part, weights in parts.items():
            table |= {f"model.layers.{i}.{part}.{name}": shape for name, shape in weights.items()}
    table["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (config.vocab_size, hidden)
    return table


def _attention_shapes(config):
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    table = {}

    def projection(name, out, into, bias=bias):
        table[f"{name}.weight"] = (out, into)
        if bias:
            table[f"{name}.bias"] = (out,)

    if config.kv_lora_rank is None:
        projection("q_proj", heads * config.head_dim, hidden)
        projection("k_proj", config.num_key_value_heads * config.head_dim, hidden)
        projection("v_proj", config.num_key_value_heads * config.head_dim, hidden)
        projection("o_proj", hidden, heads * config.head_dim)
        if config.has_qk_norm():
            table |= {f"{name}_norm.weight": (config.head_dim,) for name in "qk"}
        return table
    q_dim, rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        projection("q_proj", heads * q_dim, hidden, False)
    else:
        projection("q_a_proj", config.q_lora_rank, hidden)
        table["q_a_layernorm.weight"] = (config.q_lora_rank,)
        projection("q_b_proj", heads * q_dim, config.q_lora_rank, False)
    projection("kv_a_proj_with_mqa", rank + config.qk_rope_head_dim, hidden)
    table["kv_a_layernorm.weight"] = (rank,)
    projection("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank, False)
    projection("o_proj", hidden, heads * config.v_head_dim)
    return table


def _mlp_shapes(config, layer):
    hidden, inside, bias = config.hidden_size, config.moe_intermediate_size, config.mlp_bias

    def swiglu(prefix, size, bias=False):
        table = {}
        for name, out, into in ("gate", size, hidden), ("up", size, hidden), ("down", hidden, size):
            table[f"{prefix}{name}_proj.weight"] = (out, into)
            if bias:
                table[f"{prefix}{name}_proj.bias"] = (out,)
        return table

    if not config.has_experts(layer):
        return swiglu("", config.intermediate_size, bias and config.model_type in ("llama", "smollm3"))
    table = {"gate.weight": (config.experts, hidden)}
    if config.model_type == "deepseek_v3":
        table["gate.e_score_correction_bias"] = (config.experts,)
    for i in range(config.experts):
        table |= swiglu(f"experts.{i}.", inside)
    if config.n_shared_experts:
        table |= swiglu("shared_experts.", inside * config.n_shared_experts)
    return table


def costs(config, context=4096):
    """What the model needs, without the layer for the token after the next: a dict of

    parameters; active: those that one token is computed with, all but the experts it is not sent to;
    cache: numbers kept for each token of the context; forward, training: floating-point operations a token,
    where a multiplication and an addition are two, in a text of `context` tokens.
    """
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    matrices = {name: math.prod(shape) for name, shape in shapes(config).items() if len(shape) == 2}
    if not config.tie_word_embeddings:
        del matrices["model.embed_tokens.weight"]  # a row is looked up, nothing is multiplied
    unused = 0  # the experts a token is not sent to
    if config.experts:
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        unused = routed // config.experts * (config.experts - config.num_experts_per_tok)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if config.kv_lora_rank is None:
        score_and_value = 2 * config.head_dim
        cache = 2 * layers * config.num_key_value_heads * config.head_dim
    else:
        score_and_value = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        cache = layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    seen = sum(min(context / 2, config.window(i) or context) for i in range(layers))  # keys, in all layers
    forward = 2 * (sum(matrices.values()) - unused) + 2 * heads * score_and_value * seen
    return {
        "parameters": sum(sizes.values()),
        "active": sum(sizes.values()) - unused,
        "cache": cache,
        "forward": forward,
        "training": 3 * forward,  # the backward pass has two products for each one of the forward pass
    }


def describe(context=4096):
    """Prints the published architectures in numbers."""
    print(
        "                      parameters           KV cache, bytes   operations a token     memory of the weights\n"
        "architecture             in all    used a token    a token     forward    training     bfloat16       float32"
    )
    for name, config in ARCHITECTURES.items():
        c = costs(config, context)
        print(
            f"{name:12}{c['parameters']:19,}{c['active']:16,}{2 * c['cache']:11,}"
            f"{c['forward'] / 1e9:10.1f} G{c['training'] / 1e9:10.1f} G"
            f"{2 * c['parameters'] / 2**30:9,.1f} GiB{4 * c['parameters'] / 2**30:10,.1f} GiB"
        )
    print(
        "\nA token uses all parameters but the experts it is not sent to. The cache is in bfloat16. Operations:\n"
        f"10⁹ additions and multiplications for a token in a text of {context:,}, of which it sees half on average.\n"
        "DeepSeek V3 without its layer for the token after the next."
    )
