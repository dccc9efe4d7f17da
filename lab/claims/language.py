"""Small trained models that several claims look into."""

from functools import lru_cache

import model
import train
from architectures import sibling
from attention import attention, causal, flash_attention, join_heads, query_or_key, split_heads
from engine import np, rows_of, to_numpy, xp
from layers import embedding, linear, linear_log_likelihood, rms_norm
from optim import Optimizer, clip, warm_up_and_decay
from posenc import alibi, learned
from train import SPECIAL


def one_layer(params, tokens, targets, bias):
    """The smallest model that shows what positions are for: embedding, one layer of attention, head. With a bias on the
    scores, or with params["table"], learned positions, added to the embedding.

    Returns the log-likelihood of each target (batch, time) and backward(dlog_p) -> grads.
    """
    x, embed_backward = embedding(tokens, params["embed"])
    if bias is None:
        rows, table_backward = learned(xp.arange(tokens.shape[1]), params["table"])
        x = x + rows
    projected = [linear(x, params[name]) for name in "qkv"]
    heads = 4
    y, attend_backward = flash_attention(*(split_heads(p, heads) for p, _ in projected), bias=bias)
    y, o_backward = linear(join_heads(y), params["o"])
    log_p, head_backward = linear_log_likelihood(x + y, params["head"], targets)

    def backward(dlog_p):
        grads = {}
        dsum, grads["head"] = head_backward(dlog_p)
        dy, grads["o"] = o_backward(dsum)
        dx = dsum.copy()
        for name, d, (_, project_backward) in zip("qkv", attend_backward(split_heads(dy, heads)), projected):
            dx_part, grads[name] = project_backward(join_heads(d))
            dx += dx_part
        if bias is None:
            grads["table"] = table_backward(dx.sum(axis=0))
        grads["embed"] = embed_backward(dx)
        return grads

    return log_p, backward


def next_tokens_loss(kind, trained, length, steps, seed, vocab=16, dim=64):
    """The loss at each position of a text `length` long, of a model with "learned" positions or "ALiBi" that was
    trained on texts of `trained` tokens. In these the last but one tells nine of ten tokens: order counts.
    """
    rng = np.random.default_rng(seed)
    rule = rng.permutation(vocab)
    bias = alibi(4) if kind == "ALiBi" else None

    def texts(rows, size):
        tokens = rng.integers(0, vocab, (rows, size + 1))
        for i in range(2, size + 1):
            tokens[:, i] = np.where(rng.random(rows) < 0.9, rule[tokens[:, i - 2]], tokens[:, i])
        return xp.asarray(tokens)

    shapes = dict.fromkeys("qkvo", (dim, dim)) | {"embed": (vocab, dim), "table": (length, dim), "head": (vocab, dim)}
    params = {n: xp.asarray(rng.standard_normal(s, np.float32) * s[-1] ** -0.5) for n, s in shapes.items()}
    optimizer = Optimizer("adamw", 0.01, weight_decay=0.0)
    for step in range(steps):
        tokens = texts(32, trained)
        log_p, backward = one_layer(params, tokens[:, :-1], tokens[:, 1:], bias)
        grads = backward(xp.full_like(log_p, -1 / log_p.size))
        optimizer.step(params, grads, warm_up_and_decay(step / steps))
    tokens = texts(256, length)
    return to_numpy(-one_layer(params, tokens[:, :-1], tokens[:, 1:], bias)[0].mean(axis=0))


# ---------------------------------------------------------------------------------- sentences that have to agree

NOUNS = "gato gata perro perra niño niña abuelo abuela maestro maestra médico médica vecino vecina hijo hija".split()
ADJECTIVES = "cansado cansada contento contenta perdido perdida enfermo enferma dormido dormida sentado sentada".split()
VERBS = "ve busca sigue llama espera".split()
WORDS = [*SPECIAL, "el", "la", "mi", "que", "a", "está", ".", *NOUNS, *ADJECTIVES, *VERBS]
GENDERS = {word: i % 2 for words in (NOUNS, ADJECTIVES) for i, word in enumerate(words)} | {"el": 0, "la": 1}


def sentence_of(rng):
    """A sentence in which article and adjective agree with the noun, often across another noun: la gata que busca a mi
    perro está cansada .
    """
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    article = lambda of: "mi" if rng.random() < 0.4 else ("el", "la")[GENDERS[of]]
    between = ["que", rng.choice(VERBS), "a", article(other), other] if rng.random() < 0.7 else []
    return [
        article(noun),
        noun,
        *between,
        "está",
        ADJECTIVES[2 * rng.integers(len(ADJECTIVES) // 2) + GENDERS[noun]],
        ".",
    ]


def ids_of(words):
    return [WORDS.index(word) for word in words]


def fit(params, config, batch, steps, lr):
    """Trains in place, on batch(step) -> inputs, targets, documents. Returns the loss of each step."""
    optimizer, losses = Optimizer("muon", lr), []
    for step in range(steps):
        loss, grads, _ = train.gradient(params, config, rows_of(batch(step), slice(None)), observe=False)
        clip(grads)
        optimizer.step(params, grads, warm_up_and_decay(step / steps))
        losses.append(loss)
    return losses


@lru_cache
def trained(objective, seed=0, steps=300, context=32):
    """A small model, pre-trained by one of train.OBJECTIVES on such sentences. Returns params, config and losses."""
    rng = np.random.default_rng(seed)
    tokens = np.array(ids_of([word for _ in range(4000) for word in sentence_of(rng)]))
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "feed_forward": 128, "context": context}
    config = sibling("llama3.2", len(WORDS), **sizes, causal=objective == "causal", rope_scaling=None)
    params = model.init(config, seed)
    batch = lambda step: (*train.windows(tokens, objective, context, 16, rng, len(WORDS)), None)
    losses = fit(params, config, batch, steps, 0.01)
    return params, config, losses


def attention_weights(params, config, ids, layer):
    """Who attends to whom in a layer, (heads, queries, keys): with the identity for v, attention is its own weights."""
    tokens, blocks = xp.asarray([ids]), model.by_layer(params)
    options = model.layer_options(config, tokens, xp.float32)
    x, _ = embedding(tokens, params["model.embed_tokens.weight"])
    for i in range(layer):
        x, _ = model.block(x, blocks[i], config, options[i])
    x, _ = rms_norm(x, blocks[layer]["input_layernorm"]["weight"], config.rms_norm_eps)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    q, k = (
        query_or_key(x, blocks[layer]["self_attn"], n, h, options[layer], config.rms_norm_eps)[0]
        for n, h in heads.items()
    )
    values = xp.broadcast_to(xp.eye(len(ids), dtype=x.dtype), (1, k.shape[1], len(ids), len(ids)))
    return to_numpy(attention(q, k, values, causal)[0][0])
