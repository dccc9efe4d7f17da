"""Prompts of different lengths in one array, checked: they come from whoever asks a model."""

from engine.backend import np
from engine.files import refuse


def left_padded(prompts, vocab_size, max_new_tokens, window):
    """Prompts, a list of lists of token ids, filled up on the left, so that all rows end together.

    window: the tokens that a prompt and its answer of max_new_tokens may have together. Returns tokens (batch, longest)
    and real, booleans of the same shape. ValueError for an empty prompt, one too long, or a token that there is not.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max(initial=0))
    refuse(lengths.min(initial=1) < 1 or not len(prompts), "a prompt needs at least one token")
    both = f"a prompt of {longest} tokens and an answer of {max_new_tokens}"
    refuse(longest + max_new_tokens > window, f"{both} do not fit into the context window of {window}")
    real, tokens = np.arange(longest) >= longest - lengths[:, None], np.zeros((len(prompts), longest), np.int64)
    tokens[real] = np.concatenate(prompts)
    outside = tokens.min() < 0 or tokens.max() >= vocab_size
    refuse(outside, f"a prompt has a token id outside the vocabulary of {vocab_size}")
    return tokens, real
