"""Transformers actuales: a decoder-only language model, from tokens to logits and back.

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))      (pre-norm)
    logits = norm(x) W_headᵀ

The six published architectures (architectures.py) are this model. They differ in sizes, in what attention is,
grouped-query or latent (attention.py), and in what feed_forward is, one SwiGLU (layers.py) or many experts
(moe.py). `params` is one flat dict from the names that published checkpoints use to arrays, so a checkpoint
loads as it is and gradients are a dict with the same keys.

    python model.py                              the published architectures in numbers
    python model.py --load DIR --prompt TEXT     continue a text with a trained model
    python model.py --load DIR --chat            talk to one that was trained to converse

Shapes: tokens (batch, time), hidden states (batch, time, hidden_size), logits (batch, time, vocab_size).
"""

import os
import sys

import numpy as np

import posenc
from architectures import ARCHITECTURES, Config, describe, shapes  # noqa: F401  part of this module's interface
from attention import KVCache, latent_attention, self_attention
from checkpoint import load, save  # noqa: F401  part of this module's interface
from engine import cli, to_numpy, xp
from layers import embedding, linear, linear_cross_entropy, linear_log_likelihood, rms_norm, swiglu
from moe import mixture_of_experts

# -------------------------------------------------------------------------------------- forward, backward


def block(x, weights, config, rope, observed=None, real=None, **options):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    x: (batch, time, hidden). weights: {module: {name: array}}, as `by_layer` makes them. rope: (cos, sin), or None
    for no positions. observed: a dict, or None, that is filled with what attention and experts observe. real: (batch,
    time) booleans, False for padding, which no expert computes, or None. options: cache, causal, window, pattern,
    padding and segments of the attention.
    Returns ((y, aux_loss), backward): y like x; the load-balancing loss of the layer's router, 0 without one; and
    backward(dy, daux_loss=0) -> (dx, dweights).
    """
    normed, norm1_backward = rms_norm(x, weights["input_layernorm"]["weight"], config.rms_norm_eps)
    attended, attention_backward = attend(normed, weights["self_attn"], config, rope, observed=observed, **options)
    middle = x + attended
    normed, norm2_backward = rms_norm(middle, weights["post_attention_layernorm"]["weight"], config.rms_norm_eps)
    (fed, aux_loss), feed_backward = feed_forward(normed, weights["mlp"], config, observed, real)

    def backward(dy, daux_loss=0.0):
        dnormed, dmlp = feed_backward(dy, daux_loss)
        dmiddle, dnorm2 = norm2_backward(dnormed)
        dmiddle += dy  # the residual connection passes the gradient on unchanged
        dnormed, dattention = attention_backward(dmiddle)
        dx, dnorm1 = norm1_backward(dnormed)
        dx += dmiddle
        dnorms = {"input_layernorm": {"weight": dnorm1}, "post_attention_layernorm": {"weight": dnorm2}}
        return dx, dnorms | {"self_attn": dattention, "mlp": dmlp}

    return (middle + fed, aux_loss), backward


def attend(x, weights, config, rope, **options):
    """Grouped-query attention, or latent attention where the config has its sizes."""
    heads = config.num_attention_heads
    if config.kv_lora_rank is None:
        return self_attention(x, weights, heads, config.num_key_value_heads, rope, config.rms_norm_eps, **options)
    scale = config.attention_scale()
    return latent_attention(x, weights, heads, config.v_head_dim, rope, config.rope_interleave, scale, **options)


def feed_forward(x, weights, config, observed=None, real=None):
    """A mixture of experts, or one SwiGLU where the layer has no router. Returns and takes what `block` does."""
    if "gate.weight" in weights:
        routing = {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
        scale = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor
        routing |= {"normalise": config.norm_topk_prob, "scale": scale}
        return mixture_of_experts(x, weights, config.num_experts_per_tok, observed, real, **routing)
    y, swiglu_backward = swiglu(x, weights)
    return (y, 0.0), lambda dy, daux_loss=0.0: swiglu_backward(dy)


def by_layer(params):
    """The weights of the blocks, a nested dict for each: model.layers.3.mlp.up_proj.weight is
    by_layer(params)[3]["mlp"]["up_proj.weight"].
    """
    nested = {}
    for name, value in params.items():
        if name.startswith("model.layers."):
            _, _, layer, module, rest = name.split(".", 4)
            nested.setdefault(int(layer), {}).setdefault(module, {})[rest] = value
    return nested


def with_layer(i, dweights):
    """The gradients of a block's weights under their full names."""
    return {f"model.layers.{i}.{module}.{name}": g for module, grads in dweights.items() for name, g in grads.items()}


def rope_for(config, positions, dtype):
    """cos and sin at the positions, as the config asks for them."""
    frequencies, factor = posenc.rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    return posenc.rope_tables(positions, frequencies, factor, dtype)


def transformer(params, config, tokens, cache=None, padding=None, observed=None, segments=None):
    """Everything but the head.

    tokens: (batch, time) integers. cache: a list of one KVCache per layer, appended to, for generation.
    padding: (batch, earlier and new tokens) booleans, False where a row is filled up on its left; None = nowhere.
    observed: a dict, or None, in which observed[layer] becomes a dict of what the layer observed: "max_logits"
    of its heads and the "load" of its experts. segments: (batch, time) integers, the number of the text a token
    belongs to, from 1 on, where a row holds several that must not see each other, and 0 for padding; None = one text a
    row.
    Returns ((hidden, aux_loss), backward): (batch, time, hidden_size), the sum of the load-balancing losses, and
    backward(dhidden, daux_loss=0) -> grads. With a cache the activations are freed on the way, and backward is None.
    """
    start = cache[0].length if cache else 0
    time = tokens.shape[1]
    positions = xp.arange(start, start + time)  # (time,)
    real = None if segments is None else segments > 0
    if padding is not None:  # a row's first real token is at position 0
        real = padding[:, start:]
        positions = (xp.cumsum(padding, axis=1) - 1).clip(0)[:, None, start:]  # (batch, 1, time)
    table = params["model.embed_tokens.weight"]
    rope = rope_for(config, positions, table.dtype)
    layers = by_layer(params)

    x, embed_backward = embedding(tokens, table)
    backwards, aux_loss = [], 0.0
    for i in range(config.num_hidden_layers):
        (x, layer_aux_loss), block_backward = block(
            x,
            layers[i],
            config,
            rope if config.uses_rope(i) else None,
            observed if observed is None else observed.setdefault(i, {}),
            real,
            cache=cache[i] if cache else None,
            causal=config.causal,
            window=config.window(i),
            pattern=config.pattern(i),
            padding=padding,
            segments=segments,
        )
        aux_loss += layer_aux_loss
        if cache is None:
            backwards.append(block_backward)
    hidden, norm_backward = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)

    def backward(dhidden, daux_loss=0.0):
        grads = {}
        dx, grads["model.norm.weight"] = norm_backward(dhidden)
        for i in reversed(range(config.num_hidden_layers)):
            dx, dweights = backwards[i](dx, daux_loss)
            grads |= with_layer(i, dweights)
        grads["model.embed_tokens.weight"] = embed_backward(dx)
        return grads

    return (hidden, aux_loss), backward if cache is None else None


def head_name(config):
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def added(params, *parts):
    """The sum of dicts of gradients, with a gradient for every weight, in the order of params."""
    grads = {}
    for part in parts:
        for name, g in part.items():
            grads[name] = grads[name] + g if name in grads else g
    return {name: grads[name] if name in grads else xp.zeros_like(w) for name, w in params.items()}


def forward(params, config, tokens):
    """tokens (batch, time) -> logits (batch, time, vocab_size), and backward(dlogits) -> grads."""
    (hidden, _), body_backward = transformer(params, config, tokens)
    logits, head_backward = linear(hidden, params[head_name(config)])

    def backward(dlogits):
        dhidden, dhead = head_backward(dlogits)
        return added(params, body_backward(dhidden), {head_name(config): dhead})

    return logits, backward


def loss(params, config, tokens, targets):
    """Mean cross-entropy in nats over the targets that are not -100, without holding the logits.

    tokens, targets: (batch, time) integers. Returns the loss, a float, and backward(dloss=1) -> grads.
    """
    (value, _, _), backward = losses(params, config, tokens, targets)
    return value, backward


def log_likelihood(params, config, tokens, targets):
    """The log-likelihood of each target, log p(target | the tokens up to its place): what a policy is in RLHF.

    tokens, targets: (batch, time) integers, a target of -100 is ignored.
    Returns log_p (batch, time) in nats, 0 where ignored, and backward(dlog_p) -> grads.
    """
    (hidden, _), body_backward = transformer(params, config, tokens)
    log_p, head_backward = linear_log_likelihood(hidden, params[head_name(config)], targets)

    def backward(dlog_p):
        dhidden, dhead = head_backward(dlog_p)
        return added(params, body_backward(dhidden), {head_name(config): dhead})

    return log_p, backward


def losses(params, config, tokens, targets, mtp=False, observed=None, segments=None):
    """What training minimises, in its parts: the cross-entropy, the load-balancing loss of the routers (0 without
    any), and the cross-entropy of the token after the next (0 if not `mtp`).

    tokens, targets: (batch, time) integers, a target of -100 is ignored. observed, segments: as in `transformer`.
    Returns three floats and backward(dloss=1, daux_loss=0, dmtp=0) -> grads.
    """
    (hidden, aux_loss), body_backward = transformer(params, config, tokens, observed=observed, segments=segments)
    head = params[head_name(config)]
    value, head_backward = linear_cross_entropy(hidden, head, targets)
    mtp_value, mtp = 0.0, mtp and tokens.shape[1] > 1  # a single token has none after the next
    if mtp:
        further = multi_token_prediction(params, config, tokens, hidden, observed, segments)
        (mtp_hidden, mtp_aux_loss), mtp_backward = further
        aux_loss += mtp_aux_loss
        mtp_value, mtp_head_backward = linear_cross_entropy(mtp_hidden, head, targets[:, 1:])

    def backward(dloss=1.0, daux_loss=0.0, dmtp=0.0):
        dhidden, dhead = head_backward(dloss)
        parts = [{head_name(config): dhead}]
        if mtp:
            dmtp_hidden, dhead = mtp_head_backward(dmtp)
            dhidden_too, grads = mtp_backward(dmtp_hidden, daux_loss)
            dhidden += dhidden_too
            parts += [{head_name(config): dhead}, grads]
        return added(params, body_backward(dhidden, daux_loss), *parts)

    return (value, aux_loss, mtp_value), backward


def multi_token_prediction(params, config, tokens, hidden, observed=None, segments=None):
    """The MTP layer of DeepSeek V3 (DeepSeek-AI 2024b, section 2.2): a further layer predicts the token after the
    next, from the hidden state at a position and the token that follows it. A second target for the same text,
    which makes the hidden states plan ahead; after training the layer may be dropped.

        x = W [norm(embed(token p+1)) ; norm(hidden p)],  mtp_hidden p = norm(block(x))

    Embedding and head are the model's own. The order in the product is that of the published weights (the paper
    writes it the other way round), and hidden is normalised for the second time, as in the published code.
    hidden: (batch, time, hidden_size), what `transformer` returns.
    Returns ((mtp_hidden, aux_loss), backward): (batch, time - 1, hidden_size), the load-balancing loss of the layer,
    and backward(dmtp_hidden, daux_loss=0) -> (dhidden, grads).
    """
    i, eps = config.num_hidden_layers, config.rms_norm_eps
    weights = by_layer(params)[i]
    table = params["model.embed_tokens.weight"]
    embedded, embed_backward = embedding(tokens[:, 1:], table)
    e, enorm_backward = rms_norm(embedded, weights["enorm"]["weight"], eps)
    h, hnorm_backward = rms_norm(hidden[:, :-1], weights["hnorm"]["weight"], eps)
    x, project_backward = linear(xp.concatenate([e, h], axis=-1), weights["eh_proj"]["weight"])
    rope = rope_for(config, xp.arange(1, tokens.shape[1]), table.dtype)
    observed = observed if observed is None else observed.setdefault(i, {})
    segments = None if segments is None else segments[:, :-1]  # what follows the last token of a text is of another
    options = {"causal": config.causal, "segments": segments, "real": None if segments is None else segments > 0}
    (x, aux_loss), block_backward = block(x, weights, config, rope, observed, **options)
    mtp_hidden, norm_backward = rms_norm(x, weights["shared_head"]["norm.weight"], eps)

    def backward(dmtp_hidden, daux_loss=0.0):
        dx, dnorm = norm_backward(dmtp_hidden)
        dx, dweights = block_backward(dx, daux_loss)
        deh, dproject = project_backward(dx)
        dembedded, denorm = enorm_backward(deh[..., : embedded.shape[-1]])
        dhidden = xp.zeros_like(hidden)
        dhidden[:, :-1], dhnorm = hnorm_backward(deh[..., embedded.shape[-1] :])
        dweights |= {"enorm": {"weight": denorm}, "hnorm": {"weight": dhnorm}, "eh_proj": {"weight": dproject}}
        dweights["shared_head"] = {"norm.weight": dnorm}
        return dhidden, with_layer(i, dweights) | {"model.embed_tokens.weight": embed_backward(dembedded)}

    return (mtp_hidden, aux_loss), backward


def init(config, seed=0, dtype=np.float32):
    """New weights: normal with standard deviation `initializer_range`; the matrices that write into the
    residual stream smaller by √(2 layers), so that its variance does not grow with depth (GPT-2,
    Radford et al. 2019); norms 1 and biases 0. Returns params, of the given dtype.
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
    order = np.arange(logits.shape[-1])[None]
    if top_k is not None or top_p is not None:  # the likeliest first
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]  # [:None] is all of them
        logits = np.take_along_axis(logits, order, axis=-1)
    p = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0  # what comes before already has p; the first stays
        p /= p.sum(axis=-1, keepdims=True)
    below = np.cumsum(p, axis=-1)
    drawn = (below < rng.random((len(p), 1)) * below[:, -1:]).sum(axis=-1)  # whatever p rounds to in sum
    return np.take_along_axis(np.broadcast_to(order, p.shape), drawn[:, None], axis=-1)[:, 0]


def generate_batch(
    params, config, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=None, rng=None
):
    """Continues prompts of different lengths together.

    prompts: a list of lists of token ids. stop: ids that end a row, the config's eos_token_id if None;
    temperature, top_k, top_p, rng: as in `sample`, with default_rng(0) if rng is None.
    Returns an iterator over steps, each an array (batch,): the new tokens, a stop token being a row's
    last, and -1 for the rows that ended before. Raises ValueError for an empty prompt, a token out of
    the vocabulary, where the longest prompt and its answer do not fit into the context window, or for prompts of
    different lengths with sparse attention.
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
    if any(map(config.pattern, range(config.num_hidden_layers))) and lengths.min() < longest:
        raise ValueError("sparse attention counts blocks from the first token, so all prompts must be of one length")
    if stop is None:
        stop = config.eos_token_id
    stop = [] if stop is None else np.atleast_1d(stop)
    rng = rng or np.random.default_rng(0)

    def steps(tokens):
        padding = np.arange(longest) >= longest - lengths[:, None]  # (batch, longest)
        ended = np.zeros(len(prompts), bool)
        cache = [KVCache(config.window(i)) for i in range(config.num_hidden_layers)]
        for _ in range(max_new_tokens):
            seen = None if padding.all() else xp.asarray(padding)
            (hidden, _), _ = transformer(params, config, xp.asarray(tokens), cache, seen)
            logits, _ = linear(hidden[:, -1], params[head_name(config)])
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


# ---------------------------------------------------------------------------------------------- command line


def main(argv=None):
    import bpe

    parser = cli.Parser(description="Continue a text with a trained model, talk to it, or print the architectures.")
    parser.add_argument("--load", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, or with <mask> for each gap to fill")
    parser.add_argument("--chat", action="store_true", help="talk, a line at a time, until an empty line")
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with: how the assistant should be")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="200, or what fits, if not given")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.load is None) != (args.prompt is None and not args.chat):
        parser.error("--load goes together with --prompt or --chat")
    if args.prompt is not None and args.chat:
        parser.error("--prompt continues a text and --chat converses: name one of them")
    if args.system is not None and not args.chat:
        parser.error("--system begins a --chat")
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
    stop = [] if config.eos_token_id is None else list(np.atleast_1d(config.eos_token_id))
    rng, window = np.random.default_rng(args.seed), config.max_position_embeddings

    def answer(ids):
        """Prints the continuation as it comes, and returns it."""
        length = args.max_new_tokens or max(1, min(200, window - len(ids)))
        drawing = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "rng": rng}
        tokens, text = generate(params, config, ids, length, stop=stop, **drawing), ""
        for piece in tokenizer.stream(token for token in tokens if token not in stop):
            print(piece, end="", flush=True)
            text += piece
        print()
        return text

    if args.chat and (args.max_new_tokens or 0) >= window:
        parser.error(f"--max-new-tokens must be below the {window} tokens that the model sees at once")
    if args.chat:
        return converse(tokenizer, answer, stop, window - (args.max_new_tokens or min(200, window // 2)), args.system)
    ids = tokenizer.encode(args.prompt, allow_special=True)
    if not config.causal:
        if "<mask>" not in tokenizer.special:
            raise ValueError(f"{args.load} fills gaps, but its tokenizer has no <mask>")
        return print(tokenizer.decode(fill(params, config, ids, tokenizer.special["<mask>"])))
    if ids[: len(tokenizer.bos)] != tokenizer.bos:
        ids = tokenizer.bos + ids
    print(args.prompt, end="", flush=True)
    answer(ids)


def converse(tokenizer, answer, stop, room, system=None):
    """A conversation in the terminal, until an empty line or the end of the input. Where it outgrows the context window
    the oldest turns are forgotten.

    answer(ids) -> text: the model. stop: ids that end its turn, to which the chat's own is added. room: tokens for all
    that was said.
    """
    import chat

    stop.append(chat.end_token(tokenizer))
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            return print()
        if not said.strip():
            return
        kept = [*turns, {"role": "user", "content": said}]
        while len(ids := chat.prompt(tokenizer, first + kept)) > room and len(kept) > 1:
            del kept[:2]
        if len(ids) > room:
            print(f"that is {len(ids)} tokens, and there is room for {room}: say less at a time", file=sys.stderr)
            continue
        turns = [*kept, {"role": "assistant", "content": answer(ids)}]


if __name__ == "__main__":
    cli.run(main)
