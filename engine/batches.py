"""Answers of many lengths as batches: rows of prompt and answer, and pieces of about one length, which threads take one
at a time. What is computed of a piece is a function that the caller hands over.

Shapes: batch answers, one a row, of at most time tokens with their prompts.
"""

from engine.backend import np, to_numpy, xp


def copied(params):
    return {name: xp.array(w, order="C") for name, w in params.items()}


def shuffled(count, size, rng):
    """Yields lists of `size` of the numbers below count, without end; each comes once before any comes again."""
    order = []
    while True:
        while len(order) < size:
            order += rng.permutation(count).tolist()
        yield order[:size]
        order = order[size:]


def as_rows(prompts, answers):
    """Prompts and answers, lists of lists of ids, as inputs and targets (batch, time): the answers are the targets, and
    -100 stands where there is none.
    """
    time = max(len(p) + len(a) for p, a in zip(prompts, answers)) - 1
    inputs, targets = np.zeros((len(prompts), time), np.int64), np.full((len(prompts), time), -100)
    for row, target, p, a in zip(inputs, targets, prompts, answers):
        row[: len(p) + len(a) - 1] = (p + a)[:-1]
        target[len(p) - 1 : len(p) + len(a) - 1] = a
    return inputs, targets


def flat(comparisons):
    """Comparisons, (prompt, answers, pairs) each, with a row for every answer to a question that has a pair: inputs and
    targets as of `as_rows`, and the rows of what was preferred and of what was not, (pairs,) each.
    """
    prompts, answers, rows = [], [], []
    for prompt, some, pairs in comparisons:
        if pairs:
            rows += [(len(answers) + better, len(answers) + worse) for better, worse in pairs]
            prompts, answers = prompts + [prompt] * len(some), answers + some
    return *as_rows(prompts, answers), *np.array(rows, np.int64).reshape(-1, 2).T


def comparison_batches(comparisons, batch, rng):
    """Yields, without end, `batch` of the questions that have a pair, in four parts of (rows, inputs, targets, better,
    worse, weight). rows: which these answers are in flat(comparisons); better and worse: which of these answers were
    preferred to which; weight: 1 over the number of pairs in the whole batch.

    All answers to a question come together, however many pairs they are in (Ouyang et al. 2022, section 3.5).
    """
    comparisons = [question for question in comparisons if question[2]]
    first = np.cumsum([0] + [len(answers) for _, answers, _ in comparisons])
    for which in shuffled(len(comparisons), batch, rng):
        which.sort(key=lambda i: len(comparisons[i][0]))
        weight = 1 / sum(len(comparisons[i][2]) for i in which)
        parts = [which[k::4] for k in range(min(4, batch))]
        rows = [np.concatenate([np.arange(first[i], first[i + 1]) for i in part]) for part in parts]
        arrays = [map(xp.asarray, flat([comparisons[i] for i in part])) for part in parts]
        yield [(own, *some, weight) for own, some in zip(rows, arrays)]


def pieces(inputs, targets, *others, size=32):
    """The rows in pieces of about one length, each cut off behind its longest: (rows, inputs, targets, *others), where
    rows are their numbers. others: arrays (batch, time), or (batch, 1).
    """
    lengths = targets.shape[1] - (targets >= 0)[:, ::-1].argmax(axis=1)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, *(xp.asarray(x[rows, : lengths[rows].max()]) for x in (inputs, targets, *others))


def evaluate(function, params, config, inputs, targets, parallel_map=map):
    """The value of function(params, config, inputs, targets) -> (value, backward) for all rows: (batch,) or (batch,
    time), a NumPy array; a list of them where the value is a tuple.
    """

    def part(piece):
        rows, *arguments = piece
        value, _ = function(params, config, *arguments)
        return rows, value if isinstance(value, tuple) else (value,)

    wholes = []
    for rows, values in parallel_map(part, pieces(inputs, targets)):
        wholes = wholes or [np.zeros(inputs.shape[: value.ndim], value.dtype) for value in values]
        for whole, value in zip(wholes, map(to_numpy, values)):
            whole[(rows, slice(value.shape[1])) if value.ndim == 2 else rows] = value
    return wholes if len(wholes) > 1 else wholes[0]


def sampled(generate, prompts, rng=None, parallel_map=map, size=64):
    """Answers to prompts, `size` at a time: a list of lists of ids.

    generate(prompts, rng) -> steps, each an array (batch,): the next tokens, and -1 for those that ended before.
    """
    rng = rng or np.random.default_rng(0)
    parts = [(prompts[start : start + size], rng.integers(2**63)) for start in range(0, len(prompts), size)]

    def part(job):
        asked, seed = job
        steps = np.stack(list(generate(asked, np.random.default_rng(seed))), axis=1)
        return [row[row >= 0].tolist() for row in steps]

    return [answer for answers in parallel_map(part, parts) for answer in answers]
