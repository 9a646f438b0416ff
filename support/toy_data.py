"""The data of the toy world, as support/own_data.py loads a user's."""
from functools import lru_cache

import data
import world


def load(tokenizer, sft_texts, pairs, annotator, seed):
    """(SFT texts, examples) in tokens: so many texts and pairs, compared by the annotator."""
    encode = lru_cache(maxsize=None)(tokenizer.encode_ordinary)  # few texts are different
    texts = []
    for prompt, response in data.make_sft_corpus(sft_texts, seed):
        texts.append((encode(prompt), encode(response) + [tokenizer.eot_token]))
    examples, _ = data.tokenize(data.make_preferences(pairs, annotator, seed), tokenizer)
    return texts, examples


@lru_cache(maxsize=None)
def ceiling(annotator):
    """How often an annotator's own score agrees with its labels, for pairs of the grammar and the
    train prompts. No model is more accurate, except by learning the labels' noise."""
    prompts, _ = world.prompts()
    scores = world.rewards(prompts, world.responses(), world.ANNOTATORS[annotator])  # (P, N)
    return world.label_ceiling(world.grammar_logps(prompts), scores).mean().item()
