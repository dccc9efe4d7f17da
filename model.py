"""Transformers actuales: a decoder-only language model, from tokens to logits and back.

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))      (pre-norm)
    logits = norm(x) W_headᵀ

The six published architectures (architectures.py) are this model. They differ in sizes, in what attention is,
grouped-query (attention.py) or latent (latent.py), and in what feed_forward is, one SwiGLU (layers.py) or many experts
(moe.py). `params` is one flat dict from the names that published checkpoints use to arrays, so a checkpoint loads as it
is and gradients are a dict with the same keys.

    python model.py                              the published architectures in numbers
    python model.py --load DIR                   what a trained model needs of this machine
    python model.py --load DIR --prompt TEXT     continue a text with a trained model
    python model.py --load DIR --chat            talk to one that was trained to converse

Shapes: tokens (batch, time), hidden states (batch, time, hidden_size), logits (batch, time, vocab_size).
"""

from architectures import ARCHITECTURES, Config, shapes  # noqa: F401  part of this module's interface
from attention import KVCache, layer_options, self_attention
from checkpoint import load, save  # noqa: F401  part of this module's interface
from engine import np, to_numpy, xp
from engine.prompts import left_padded
from engine.weights import added, by_layer, with_layer
from latent import latent_attention
from layers import embedding, linear, linear_cross_entropy, linear_log_likelihood, rms_norm, swiglu
from moe import mixture_of_experts

# -------------------------------------------------------------------------------------- forward, backward


def attend(x, weights, config, options):
    """Grouped-query attention, or latent attention where the config has its sizes."""
    heads = config.num_attention_heads
    if config.kv_lora_rank is None:
        return self_attention(x, weights, heads, config.num_key_value_heads, options, config.rms_norm_eps)
    scale = config.attention_scale()
    return latent_attention(x, weights, heads, config.v_head_dim, options, config.rope_interleave, scale)


def feed_forward(x, weights, config, options):
    """A mixture of experts, or one SwiGLU where the layer has no router (gate.weight)."""
    if "gate.weight" not in weights:
        return swiglu(x, weights)
    routing = {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
    scale = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor
    routing |= {"normalise": config.norm_topk_prob, "scale": scale}
    routing |= {"real": options.real, "observe": options.observe, "balance": options.balance}
    return mixture_of_experts(x, weights, config.num_experts_per_tok, **routing)


def block(x, weights, config, options):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)); in training with dropout of what is added.

    x: (batch, time, hidden). weights: {module: {name: array}}, as `by_layer` makes them. options: an attention.Options.
    Returns y, like x, and backward(dy) -> (dx, dweights).
    """
    normed, norm1_backward = rms_norm(x, weights["input_layernorm"]["weight"], config.rms_norm_eps)
    attended, attention_backward = attend(normed, weights["self_attn"], config, options)
    attended, drop_attended_backward = options.dropout(attended)
    middle = x + attended
    normed, norm2_backward = rms_norm(middle, weights["post_attention_layernorm"]["weight"], config.rms_norm_eps)
    fed, feed_backward = feed_forward(normed, weights["mlp"], config, options)
    fed, drop_fed_backward = options.dropout(fed)

    def backward(dy):
        dnormed, dmlp = feed_backward(drop_fed_backward(dy))
        dmiddle, dnorm2 = norm2_backward(dnormed)
        dmiddle += dy  # the residual connection passes the gradient on unchanged
        dnormed, dattention = attention_backward(drop_attended_backward(dmiddle))
        dx, dnorm1 = norm1_backward(dnormed)
        dx += dmiddle
        dnorms = {"input_layernorm": {"weight": dnorm1}, "post_attention_layernorm": {"weight": dnorm2}}
        return dx, dnorms | {"self_attn": dattention, "mlp": dmlp}

    return middle + fed, backward


def transformer(params, config, tokens, options=None):
    """Everything but the head.

    tokens: (batch, time) integers. options: for each layer, as of attention.layer_options; None: the
    plain case, one text a row, causal unless config.causal is False.
    Returns hidden (batch, time, hidden_size) and backward(dhidden) -> grads. With a cache nothing is kept for a
    backward pass, which is None.
    """
    layers, table = by_layer(params), params["model.embed_tokens.weight"]
    options, backwards = options or layer_options(config, tokens, table.dtype), []
    x, embed_backward = embedding(tokens, table)
    for i in range(config.num_hidden_layers):
        x, block_backward = block(x, layers[i], config, options[i])
        backwards.append(block_backward if options[i].cache is None else None)
    hidden, norm_backward = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)

    def backward(dhidden):
        grads = {}
        dx, grads["model.norm.weight"] = norm_backward(dhidden)
        for i in reversed(range(config.num_hidden_layers)):
            dx, dweights = backwards[i](dx)
            grads |= with_layer(i, dweights)
        grads["model.embed_tokens.weight"] = embed_backward(dx)
        return grads

    return hidden, backward if options[0].cache is None else None


# ------------------------------------------------------------------------------------- what a model is asked


def head_name(config):
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


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


def with_head(params, config, tokens, head):
    """Runs the transformer and then head(hidden, weight) -> (y, its backward). The head's gradient is added to that of
    the embeddings where they are tied. Returns y and backward(dy) -> grads.
    """
    hidden, body_backward = transformer(params, config, tokens)
    y, head_backward = head(hidden, params[head_name(config)])

    def backward(dy):
        dhidden, dhead = head_backward(dy)
        return added(params, body_backward(dhidden), {head_name(config): dhead})

    return y, backward


def forward(params, config, tokens):
    """tokens (batch, time) -> logits (batch, time, vocab_size), and backward(dlogits) -> grads."""
    return with_head(params, config, tokens, linear)


def log_likelihood(params, config, tokens, targets):
    """The log-likelihood of each target, log p(target | the tokens up to its place): what a policy is in RLHF.

    tokens, targets: (batch, time) integers, a target of -100 is ignored.
    Returns log_p (batch, time) in nats, 0 where ignored, and backward(dlog_p) -> grads.
    """
    return with_head(params, config, tokens, lambda hidden, head: linear_log_likelihood(hidden, head, targets))


def loss(params, config, tokens, targets, terms=(), count=None, **around):
    """What training minimises: the mean cross-entropy in nats, the load-balancing losses and further terms.

    tokens, targets: (batch, time) integers, a target of -100 is ignored. terms: functions term(params, config, tokens,
    targets, hidden) -> (value, backward() -> (dhidden, grads)), such as mtp.term's; the function's name is that of its
    value. count: the number of targets of the whole batch, where these rows are a micro-batch of it (gradient
    accumulation), so that losses and gradients add up; balance is to be scaled by its share of the rows then.
    around: documents, observe, balance, dropout, as of attention.layer_options; observe["losses"] is set to the values
    of the terms.
    Returns the loss, a float, and backward(dloss=1) -> grads.
    """
    options = layer_options(config, tokens, params["model.embed_tokens.weight"].dtype, **around)
    hidden, body_backward = transformer(params, config, tokens, options)
    head = head_name(config)
    cross_entropy, head_backward = linear_cross_entropy(hidden, params[head], targets, count)
    values = {"cross_entropy": cross_entropy, "balance": balance_loss(options[: config.num_hidden_layers])}
    backwards = []
    for term in terms:
        values[term.__name__], term_backward = term(params, config, tokens, targets, hidden)
        backwards.append(term_backward)
    if around.get("observe") is not None:
        around["observe"]["losses"] = values

    def backward(dloss=1.0):
        dhidden, dhead = head_backward()
        parts = [{head: dhead}]
        for term_backward in backwards:
            dhidden_too, grads = term_backward()
            dhidden += dhidden_too
            parts.append(grads)
        grads = added(params, body_backward(dhidden), *parts)
        return grads if dloss == 1 else {name: dloss * g for name, g in grads.items()}

    return sum(values.values()), backward


def balance_loss(options):
    """The load-balancing losses of layers, times their weight."""
    return sum(o.balance * o.observe.get("balance", 0.0) for o in options if o.balance)


# ---------------------------------------------------------------------------------------------- generate


def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Draws a token for each row of logits (batch, vocab); temperature 0 takes the likeliest.

    top_k: only among the k likeliest (Fan et al. 2018). top_p: only among the fewest of the likeliest that together
    have at least probability top_p, 0 < top_p ≤ 1 (nucleus sampling, Holtzman et al. 2020). rng: a numpy Generator,
    needed where temperature > 0.
    Returns (batch,) integers.
    """
    logits = to_numpy(logits).astype(np.float64)
    if temperature <= 0:
        return logits.argmax(axis=1)
    order = np.arange(logits.shape[-1])[None]
    if top_k is not None or top_p is not None:  # the likeliest first
        order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # [:None] is all of them
        logits = np.take_along_axis(logits, order, axis=1)
    p = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    p /= p.sum(axis=1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=1) - p >= top_p] = 0  # what comes before already has top_p
        p /= p.sum(axis=1, keepdims=True)
    below = np.cumsum(p, axis=1)
    drawn = (below < rng.random((len(p), 1)) * below[:, -1:]).sum(axis=1)  # p may round to not quite 1
    return np.take_along_axis(np.broadcast_to(order, p.shape), drawn[:, None], axis=1)[:, 0]


def penalised(logits, seen, penalty):
    """The logits of tokens that were there before, made smaller: divided by the penalty or, where that would make them
    larger, multiplied by it (Keskar et al. 2019, section 4.1). logits, seen: (batch, vocab) numbers and booleans.
    """
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


PROMPT_PART = 1024  # tokens of a prompt that are read at once: of a long one, all at once would take more memory


def generate_batch(params, config, prompts, max_new_tokens, repetition_penalty=1.0, stop=None, rng=None, **drawing):
    """Continues prompts of different lengths together.

    prompts: a list of lists of token ids. stop: ids that end a row, the config's eos_token_id if None, and [] for none.
    drawing, rng: temperature, top_k and top_p, as of `sample`, with default_rng(0) if rng is None.
    repetition_penalty: of the tokens that a row has already, its prompt too, see `penalised`; 1 is none.
    Returns an iterator over steps, each an array (batch,): the new tokens, a stop token being a row's last, and -1 for
    the rows that ended before. Raises ValueError for an empty prompt, a token out of the vocabulary, where the longest
    prompt and its answer do not fit into the context window, or for prompts of different lengths with sparse attention.
    """
    if not config.causal:
        raise ValueError("this model was trained to fill gaps and cannot continue a text")
    tokens, real = left_padded(prompts, config.vocab_size, max_new_tokens, config.max_position_embeddings)
    if any(map(config.pattern, range(config.num_hidden_layers))) and not real.all():
        raise ValueError("sparse attention counts blocks from the first token, so all prompts must be of one length")
    stop = config.eos_token_id if stop is None else stop
    stop = [] if stop is None else np.atleast_1d(stop)
    rng = rng or np.random.default_rng(0)

    def steps(tokens, real):
        head, ended = params[head_name(config)], np.zeros(len(prompts), bool)
        seen = np.zeros((len(prompts), config.vocab_size), bool)
        seen[np.nonzero(real)[0], tokens[real]] = True
        cache = [KVCache(config.window(i)) for i in range(config.num_hidden_layers)]
        for _ in range(max_new_tokens):
            for part in np.split(tokens, range(PROMPT_PART, tokens.shape[1], PROMPT_PART), axis=1):
                read = cache[0].length
                so_far = None if real.all() else xp.asarray(real[:, : read + part.shape[1]])
                options = layer_options(config, part, head.dtype, read, cache, so_far)
                hidden, _ = transformer(params, config, xp.asarray(part), options)
            logits = to_numpy(linear(hidden[:, -1], head)[0])
            if repetition_penalty != 1:
                logits = penalised(logits, seen, repetition_penalty)
            drawn = sample(logits, rng=rng, **drawing)
            seen[np.arange(len(seen)), drawn] = True
            yield np.where(ended, -1, drawn)
            ended |= np.isin(drawn, stop)
            if ended.all():
                return
            tokens = drawn[:, None]
            real = np.pad(real, ((0, 0), (0, 1)), constant_values=True)

    return steps(tokens, real)


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


if __name__ == "__main__":
    from engine.cli import run
    from lab.talk import main

    run(main)
