"""support/trie.py: every response of the toy world against whole forwards, and what is read."""
from collections import Counter

import torch

import world
from model import GPT, GPTConfig
from support.tokenizers import get_tokenizer
from support.trie import exact_logps


def test_every_response_is_scored_and_every_prefix_is_read_once():
    """All responses to two prompts, by a GPT in training with dropout. The oracle is a softmax of
    a whole forward without a cache, for one text at a time: 20 texts of each prompt, 1e-5 in
    float32. The model reads the prompt, and then each prefix that goes on, once."""
    tokenizer = get_tokenizer("toy")
    gpt = GPT(GPTConfig(32, tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    responses = [tokenizer.encode_ordinary(y) + [tokenizer.eot_token] for y in world.responses()]
    prompts = world.prompts()[1][:2]
    read = []
    hook = gpt.register_forward_pre_hook(lambda _, args: read.append(list(args[0].shape)))
    exact = exact_logps(gpt.train(), prompts)
    hook.remove()
    assert exact.shape == (2, len(responses)) and exact.dtype == torch.float64
    assert gpt.training, "the model keeps its mode"

    prefixes = {tuple(y[:i]) for y in responses for i in range(1, len(y))}
    sizes = Counter(map(len, prefixes))
    want = []
    gpt.eval()
    for logps, x in zip(exact, map(tokenizer.encode_ordinary, prompts)):
        want += [[1, len(x)]] + [[sizes[d], 1] for d in sorted(sizes)]
        for i in torch.randperm(len(responses))[:20].tolist():
            ids = x + responses[i]
            p = gpt(torch.tensor([ids]))[0].softmax(-1)  # (T, V)
            by_hand = sum(p[t - 1, ids[t]].log().item() for t in range(len(x), len(ids)))
            assert abs(logps[i].item() - by_hand) < 1e-5, "dropout is on, or a token is not scored"
    assert read == want, "a prefix is read twice, or one that does not go on is read"
