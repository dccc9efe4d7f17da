"""Transformers actuales: multi-token prediction (DeepSeek V3, DeepSeek-AI 2024b, section 2.2; Kimi K2).

A further layer predicts the token after the next, from the hidden state h at a position p and the token that follows
it: a denser training signal, which may make the hidden states plan ahead.

    x_p = W [norm(embed(token p+1)) ; norm(h_p)],    logits of token p+2 = head(norm(block(x)_p))

Embedding and head are the model's own. In training it is one more term of the loss; afterwards the layer may be
dropped, or draft tokens (speculative decoding, which is not here):

    value, backward = model.loss(params, config, tokens, targets, terms=[mtp.term(0.3)])

The order in the product is that of the published weights (the paper writes it the other way round), and h is normalised
for the second time, as in the published code.

Shapes: tokens and targets (batch, time), h (batch, time, hidden_size); the token after the next has time - 1 places.
"""

from attention import layer_options
from engine import xp
from engine.weights import by_layer, summed, with_layer
from layers import IGNORE, embedding, linear, linear_cross_entropy, rms_norm
from model import balance_loss, block, head_name


def term(weight, count=None, documents=None, **around):
    """The term of the loss: weight · the mean cross-entropy of the token after the next.

    weight: the paper's λ, 0.3 for most of V3's training. count, documents, around: as of model.loss; count is without
    the first target of each row. Returns a function, whose name is that of its value in observe["losses"],
    mtp(params, config, tokens, targets, hidden) -> (value, backward() -> (dhidden, grads)).
    """

    def mtp(params, config, tokens, targets, hidden):
        if tokens.shape[1] < 2:  # a single token has none after the next
            return 0.0, lambda: (xp.zeros_like(hidden), {})
        own, later = None, targets[:, 1:]
        if documents is not None:  # place p mixes h_p with token p+1: at the end of a text with another text's
            own, later = documents[:, :-1], xp.where(documents[:, 1:] == documents[:, :-1], later, IGNORE)
        options = layer_options(config, tokens[:, 1:], hidden.dtype, start=1, documents=own, **around)[-1]
        further, body_backward = next_hidden(params, config, tokens, hidden, options)
        head = head_name(config)
        value, head_backward = linear_cross_entropy(further, params[head], later, count)

        def backward():
            dfurther, dhead = head_backward(weight)
            dhidden, grads = body_backward(dfurther)
            return dhidden, summed(grads, {head: dhead})

        return weight * value + balance_loss([options]), backward

    return mtp


def next_hidden(params, config, tokens, hidden, options):
    """The hidden states from which the head predicts the token after the next. options: of the layer (model.py).

    Returns them, (batch, time - 1, hidden_size), and backward(dy) -> (dhidden, grads).
    """
    i, eps, weights = config.num_hidden_layers, config.rms_norm_eps, by_layer(params)[config.num_hidden_layers]
    table = params["model.embed_tokens.weight"]
    embedded, embed_backward = embedding(tokens[:, 1:], table)
    e, enorm_backward = rms_norm(embedded, weights["enorm"]["weight"], eps)
    h, hnorm_backward = rms_norm(hidden[:, :-1], weights["hnorm"]["weight"], eps)
    x, project_backward = linear(xp.concatenate([e, h], axis=-1), weights["eh_proj"]["weight"])
    x, block_backward = block(x, weights, config, options)
    y, norm_backward = rms_norm(x, weights["shared_head"]["norm.weight"], eps)

    def backward(dy):
        dx, dnorm = norm_backward(dy)
        dx, dweights = block_backward(dx)
        deh, dproject = project_backward(dx)
        de, dh = deh[..., : e.shape[-1]], deh[..., e.shape[-1] :]
        dembedded, denorm = enorm_backward(de)
        dhidden = xp.zeros_like(hidden)
        dhidden[:, :-1], dhnorm = hnorm_backward(dh)
        dweights |= {"enorm": {"weight": denorm}, "hnorm": {"weight": dhnorm}, "eh_proj": {"weight": dproject}}
        dweights["shared_head"] = {"norm.weight": dnorm}
        return dhidden, with_layer(i, dweights) | {"model.embed_tokens.weight": embed_backward(dembedded)}

    return y, backward
