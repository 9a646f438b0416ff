"""The data of the toy world, as support/own_data.py loads a user's."""
from functools import lru_cache

import data


def load(tokenizer, sft_texts, pairs, annotator, seed):
    """(SFT texts, examples) in tokens: so many texts and pairs, compared by the annotator."""
    encode = lru_cache(maxsize=None)(tokenizer.encode_ordinary)  # few texts are different
    texts = []
    for prompt, response in data.make_sft_corpus(sft_texts, seed):
        texts.append((encode(prompt), encode(response) + [tokenizer.eot_token]))
    examples, _ = data.tokenize(data.make_preferences(pairs, annotator, seed), tokenizer)
    return texts, examples
