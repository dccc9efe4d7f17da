"""Byte-pair encoding at speed: learning merges from counts that are kept up to date, and replaying them in a word."""

import sys
from collections import defaultdict
from heapq import heapify, heappop, heappush, heapreplace
from itertools import repeat
from operator import add

from engine.tokenizer_json import BYTE_CHARS

CACHED_WORDS, CACHED_LENGTH = 1 << 17, 64
LONG_WORD = 200  # tokens from which a heap is faster than looking through the list
NO_MERGE = sys.maxsize


def learn_merges(words, alphabet, vocab_size):
    """Merges the most frequent pair, of equals the one with the smallest ids, until there are vocab_size tokens.

    words: {text: count}; alphabet: the tokens before any merge, among them the 256 byte characters, in which all are
    spelled. Returns (tokens in order of id, merges as pairs of tokens), which are those of the Hugging Face trainer.

    A merge changes only the counts of the pairs beside it. A word is a string whose characters are chr(token id): to
    find, cut and compare pairs, in order of their ids, are then string operations, done in C. The heap has the count of
    each pair when it was pushed; one that has fallen since is put right when it comes to the top.
    """
    tokens, known, merges = list(alphabet), set(alphabet), []
    table = [chr(tokens.index(char)) for char in BYTE_CHARS]
    counts, words = list(words.values()), [word.encode().decode("latin-1").translate(table) for word in words]
    total, where = defaultdict(int), defaultdict(list)  # pair -> how often it occurs; the words where it may be
    for n, (word, count) in enumerate(zip(words, counts)):
        for pair in map(add, word, word[1:]):
            total[pair] += count
            where[pair].append(n)
    heap = [(-total[pair], pair, place) for pair, place in where.items()]
    heapify(heap)
    while heap and len(tokens) < vocab_size:
        count, pair, place = heap[0]
        if -count != total[pair]:
            heapreplace(heap, (-total[pair], pair, place))
            continue
        heappop(heap)
        left, right = pair
        token = tokens[ord(left)] + tokens[ord(right)]
        if not count or token in known:  # a special token: ordinary text must not make its id
            continue
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        new = chr(len(tokens))
        tokens.append(token)
        known.add(token)
        where = defaultdict(list)  # the pairs that this merge makes
        for n in place:
            word, count = words[n], counts[n]
            i = 0
            while (i := word.find(pair, i)) >= 0:
                if i:
                    before = word[i - 1]
                    total[before + left] -= count
                    total[before + new] += count
                    where[before + new].append(n)
                word = word[:i] + new + word[i + 2 :]
                i += 1
                if i < len(word):
                    after = word[i]
                    total[right + after] -= count
                    total[new + after] += count
                    where[new + after].append(n)
            words[n] = word
        for made, place in where.items():
            if total[made] > 0:
                heappush(heap, (-total[made], made, place))
    return tokens, merges


def merge_word(ids, ranks, results):
    """While two neighbours can merge, merges the pair that was learned first, the leftmost of equals.

    ranks: {(left, right): rank}; results: the new id of each rank. ids is changed in place and returned. Only the pairs
    that stand in the word are looked at, and the rank of each is kept beside it.
    """
    if len(ids) > LONG_WORD:
        return merge_long_word(ids, ranks, results)
    get = ranks.get
    rank_at = [*map(get, zip(ids, ids[1:]), repeat(NO_MERGE)), NO_MERGE]
    while (rank := min(rank_at)) < NO_MERGE:
        i = rank_at.index(rank)
        del ids[i + 1], rank_at[i]
        ids[i] = new = results[rank]
        if i:
            rank_at[i - 1] = get((ids[i - 1], new), NO_MERGE)
        if i + 1 < len(ids):
            rank_at[i] = get((new, ids[i + 1]), NO_MERGE)
    return ids


def merge_long_word(ids, ranks, results):
    """The same in n log n steps: a doubly linked list of tokens, and a heap of (rank, position) of their pairs."""
    n = len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = after[i]
        if j == n or ranks.get((ids[i], ids[j])) != rank:  # one of the two was merged meanwhile
            continue
        ids[i], ids[j] = results[rank], None
        after[i] = k = after[j]
        if k < n:
            before[k] = i
            if (ids[i], ids[k]) in ranks:
                heappush(heap, (ranks[ids[i], ids[k]], i))
        if (h := before[i]) >= 0 and (ids[h], ids[i]) in ranks:
            heappush(heap, (ranks[ids[h], ids[i]], h))
    return [token for token in ids if token is not None]


class Cache(dict):
    """word -> its ids, filled as it is asked; bounded, so that a long text needs no more memory than a short one."""

    def __init__(self, encode_word):
        self.encode_word = encode_word

    def __missing__(self, word):
        ids = self.encode_word(word)
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = tuple(ids)  # which, unlike a list, the garbage collector stops looking at
        return ids
