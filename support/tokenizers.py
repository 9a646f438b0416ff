"""Tokenizers. All are tiktoken Encodings, and encoding.eot_token is EOS."""
import re
from functools import lru_cache

import tiktoken

import world
from support.preferences import DataError

EOS = "<|endoftext|>"


def get_tokenizer(name):
    """The tokenizer of a name in TOKENIZERS."""
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is none of {list(TOKENIZERS)}")
    return TOKENIZERS[name]()


def gpt2_tokenizer():
    """tiktoken's own. It downloads the vocabulary once (1.5 MB). With TIKTOKEN_CACHE_DIR set to a
    folder that holds it, nothing is downloaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # the exceptions of requests are OSErrors
        raise DataError(f"tiktoken could not download its gpt2 vocabulary "
                        f"({type(error).__name__}). Connect to the network once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that holds it, or use "
                        "--tokenizer toy.") from error


@lru_cache(maxsize=None)
def toy_tokenizer():
    """One token for every word of the toy world, and one for every byte, for any other text."""
    pattern = r" ?\w+|\s|[^\w\s]"  # a word takes the space before it along, as in GPT-2
    train, held_out = world.prompts()
    pieces = set()
    for text in train + held_out + world.responses():
        pieces.update(re.findall(pattern, text))
    ranks = {bytes([b]): b for b in range(256)}
    for piece in sorted(pieces):
        ranks.setdefault(piece.encode("utf-8"), len(ranks))
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOS: len(ranks)})


TOKENIZERS = {"toy": toy_tokenizer, "gpt2": gpt2_tokenizer}
