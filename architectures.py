"""Transformers actuales: six published architectures.

All six are one model (model.py): pre-norm decoders of attention and SwiGLU, with RMSNorm and RoPE. They differ in

                     query : key-value heads  RoPE          feed-forward layer                 parameters   active
    Llama 3.2 1B     32 : 8                   stretched     one SwiGLU                              1.2 B
    Qwen3 4B         32 : 8, QK-norm          as it is      one SwiGLU                              4.0 B
    SmolLM3 3B       16 : 4                   in 3 of 4     one SwiGLU                              3.1 B
    Qwen3 235B-A22B  64 : 4, QK-norm          as it is      8 of 128 experts                        235 B     22 B
    DeepSeek V3      128, latent              stretched     8 of 256 experts, in 8 groups, and      671 B     38 B
                                                            one shared; the first 3 layers dense
    Kimi K2          64, latent               stretched     8 of 384 experts and one shared;      1,026 B     33 B
                                                            the first layer dense

`ARCHITECTURES` has their numbers, by the names of the published config.json; `shapes` every weight by its published
name, so that sizes and `costs` are computed without allocating one; `sibling` makes a small one of the same kind.
"""

import dataclasses
import math
from dataclasses import dataclass

import posenc
from masks import PATTERNS, sparse

SPARSE = {f"{kind}_attention": kind for kind in PATTERNS}  # see masks.PATTERNS


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
    causal: bool = True  # False: every token sees the whole text, for masked language modelling

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
    first_k_dense_replace: int | None = None  # the first n layers are dense
    decoder_sparse_step: int | None = None  # only every n-th layer has experts
    mlp_only_layers: tuple | None = None  # layers that are dense in any case

    # multi-head latent attention, see latent.py
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool | None = None

    num_nextn_predict_layers: int | None = None  # 1: a layer for multi-token prediction (MTP), see mtp.py

    @property
    def experts(self):
        """The number of routed experts in a layer that has them."""
        return self.num_experts or self.n_routed_experts or 0

    @property
    def shared(self):
        return self.n_shared_experts or 0

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
        """The softmax scale of latent attention: 1/√(nope_dim + rope_dim), where YaRN stretches the context times
        (0.1 · mscale_all_dim · ln factor + 1)², which is 1.87 in DeepSeek V3.
        """
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        stretched = self.rope_scaling or {}
        return scale * posenc.yarn_mscale(stretched.get("factor") or 1, stretched.get("mscale_all_dim")) ** 2


# ------------------------------------------------------------------------------------------------ the numbers

NUMBERS = """
                         llama3.2   qwen3      smollm3    qwen3-moe  deepseek-v3  kimi-k2
model_type               llama      qwen3      smollm3    qwen3_moe  deepseek_v3  deepseek_v3
vocab_size               128256     151936     128256     151936     129280       163840
hidden_size              2048       2560       2048       4096       7168         7168
intermediate_size        8192       9728       11008      12288      18432        18432
num_hidden_layers        16         36         36         94         61           61
num_attention_heads      32         32         16         64         128          64
num_key_value_heads      8          8          4          4          128          64
head_dim                 64         128        128        128        64           64
max_position_embeddings  131072     40960      65536      40960      163840       131072
rms_norm_eps             1e-5       1e-6       1e-6       1e-6       1e-6         1e-6
rope_theta               5e5        1e6        5e6        1e6        1e4          5e4
tie_word_embeddings      yes        yes        yes        no         no           no
bos_token_id             128000     151643     128000     151643     0            163584
eos_token_id             128001     151645     128012     151645     1            163585
num_experts              -          -          -          128        -            -
n_routed_experts         -          -          -          -          256          384
num_experts_per_tok      -          -          -          8          8            8
moe_intermediate_size    -          -          -          1536       2048         2048
n_shared_experts         -          -          -          -          1            1
norm_topk_prob           -          -          -          yes        yes          yes
routed_scaling_factor    -          -          -          -          2.5          2.827
n_group                  -          -          -          -          8            1
topk_group               -          -          -          -          4            1
first_k_dense_replace    -          -          -          -          3            1
decoder_sparse_step      -          -          -          1          -            -
q_lora_rank              -          -          -          -          1536         1536
kv_lora_rank             -          -          -          -          512          512
qk_nope_head_dim         -          -          -          -          128          128
qk_rope_head_dim         -          -          -          -          64           64
v_head_dim               -          -          -          -          128          128
rope_interleave          -          -          -          -          yes          yes
num_nextn_predict_layers -          -          -          -          1            0
"""
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
OTHERS = {  # what no single number says; of Kimi K2 config.json calls the type kimi_k2, see checkpoint.ALIASES
    "llama3.2": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
    "smollm3": {"no_rope_layers": (1, 1, 1, 0) * 9},
    "deepseek-v3": {"rope_scaling": YARN | {"original_max_position_embeddings": 4096}},
    "kimi-k2": {"rope_scaling": YARN | {"original_max_position_embeddings": 4096, "factor": 32.0, "beta_fast": 1.0}},
}


def read_table(table):
    """{column: {row: value}} of a table like the one above; "-" is left out."""
    names, *rows = (line.split() for line in table.strip().splitlines())
    columns = {name: [(row[0], row[i]) for row in rows] for i, name in enumerate(names, 1)}
    return {name: {field: read_cell(x) for field, x in cells if x != "-"} for name, cells in columns.items()}


def read_cell(text):
    if text in ("yes", "no"):
        return text == "yes"
    return int(text) if text.isdigit() else float(text) if text[0].isdigit() else text


ARCHITECTURES = {name: Config(**fields, **OTHERS.get(name, {})) for name, fields in read_table(NUMBERS).items()}

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


def _linear(projections, bias=False):
    """{name: (out, in)} of linear layers as the shapes of their weights, and biases where there are some."""
    table = {}
    for name, (out, into) in projections.items():
        table |= {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})
    return table


def _attention_shapes(config):
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    if config.kv_lora_rank is None:
        q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        projections = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        norms = {f"{name}_norm.weight": (config.head_dim,) for name in "qk" if config.has_qk_norm()}
        return _linear(projections, bias) | norms
    q, rank = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), config.kv_lora_rank
    kv, low = heads * (config.qk_nope_head_dim + config.v_head_dim), config.q_lora_rank
    if low is None:
        table = _linear({"q_proj": (q, hidden)})
    else:
        table = _linear({"q_a_proj": (low, hidden)}, bias) | {"q_a_layernorm.weight": (low,)}
        table |= _linear({"q_b_proj": (q, low)})
    table |= _linear({"kv_a_proj_with_mqa": (rank + config.qk_rope_head_dim, hidden)}, bias)
    table |= {"kv_a_layernorm.weight": (rank,)} | _linear({"kv_b_proj": (kv, rank)})
    return table | _linear({"o_proj": (hidden, heads * config.v_head_dim)}, bias)


def _mlp_shapes(config, layer):
    hidden, inside = config.hidden_size, config.moe_intermediate_size

    def swiglu(size, prefix="", bias=False):
        out = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
        return _linear({f"{prefix}{name}_proj": shape for name, shape in out.items()}, bias)

    if not config.has_experts(layer):
        return swiglu(config.intermediate_size, bias=config.mlp_bias and config.model_type in ("llama", "smollm3"))
    table = {"gate.weight": (config.experts, hidden)}
    if config.model_type == "deepseek_v3":
        table["gate.e_score_correction_bias"] = (config.experts,)
    for i in range(config.experts):
        table |= swiglu(inside, f"experts.{i}.")
    return table | (swiglu(inside * config.shared, "shared_experts.") if config.shared else {})


def costs(config, context=4096):
    """What the model costs, without its MTP layer: a dict of

    parameters; active: the active parameters, what one token is computed with: all but the experts it is not routed to;
    cache: numbers kept for each token of the context; forward, training: FLOPs a token, where a multiplication and an
    addition are two, in a text of `context` tokens, of which a causal token sees half on average. Sparse patterns and
    bidirectional models are counted as causal full attention.
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


# ------------------------------------------------------------------------------------------------ small siblings


def sibling(name, vocab_size, layers, hidden, heads, kv_heads, feed_forward, context, experts=8, experts_per_token=2,
            attention=None, **others):  # fmt: skip
    """The published architecture `name` at another size: all its switches, fewer and smaller layers, and of the experts
    and latent vectors a size that suits them.

    feed_forward: size inside a dense layer; None: 8/3 of hidden, rounded up to a multiple of 32 (two thirds of 4 ·
    hidden, as SwiGLU has three matrices: Shazeer 2020). attention: of every other layer, "sliding", a window in tokens,
    or a pattern of blocks of masks.PATTERNS; None: as published. others: fields of the Config, which take precedence.
    """
    published, head_dim = ARCHITECTURES[name], hidden // heads
    feed_forward = feed_forward or round_up(hidden * 8 / 3, 32)
    rope = published.no_rope_layers  # its pattern goes on where the sibling has more layers
    switches = {"no_rope_layers": rope and tuple(rope[i % len(rope)] for i in range(layers))}
    if attention:
        root = max(1, math.isqrt(context // 16))  # √(number of blocks): strided and fixed patterns are O(n √n) by it
        kinds = f"{attention}_attention", "full_attention"
        switches |= {"layer_types": tuple(kinds[i % 2] for i in range(layers))}
        switches |= {"sliding_window": context // 4 + 1 if attention == "sliding" else None}
        # the others' stride, of their neighbours, stays 2 however long the text: O(n)
        switches |= {"sparse_attention": {"block": 16, "stride": root if attention in ("strided", "fixed") else 2}}
    if published.experts:
        # a group is judged by its two best experts, so it has at least two
        divisors = [g for g in range(2, (published.n_group or 1) + 1) if experts % g == 0 and experts // g >= 2]
        groups = max([1, *divisors])
        switches |= {name: experts for name in ("num_experts", "n_routed_experts") if getattr(published, name)}
        switches |= {
            "num_experts_per_tok": experts_per_token,
            "norm_topk_prob": published.norm_topk_prob and experts_per_token > 1,  # one gate alone would always be 1
            # a token passes through as many numbers as in a dense layer
            "moe_intermediate_size": round_up(feed_forward / (experts_per_token + published.shared), 16),
            "n_group": published.n_group and groups,
            "topk_group": published.n_group and max(1, groups * published.topk_group // published.n_group),
            "first_k_dense_replace": published.first_k_dense_replace and min(1, layers - 1),
        }
    if published.kv_lora_rank:
        switches |= {"q_lora_rank": hidden * 3 // 4, "kv_lora_rank": hidden // 4, "qk_nope_head_dim": head_dim}
        switches |= {"qk_rope_head_dim": head_dim // 2, "v_head_dim": head_dim}
        head_dim, kv_heads = head_dim // 2, heads
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": feed_forward, "head_dim": head_dim}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return dataclasses.replace(published, max_position_embeddings=context, **(sizes | switches | others))


def round_up(size, multiple):
    return math.ceil(size / multiple) * multiple
