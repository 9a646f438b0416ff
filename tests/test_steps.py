"""Whole trainings of a few steps, once more by hand: SFT, DPO, the reward model, PPO and
REINFORCE++.

The oracle knows nothing of batches, masks and caches. It scores one text after another, takes each
loss from its formula, each gradient from autograd, and each step from the formula of Adam. Models
are tiny and in float64. Weights agree to 1e-9 where nothing else is said.
"""
import copy
import math

import pytest
import torch
from torch.func import functional_call

import data
import rlhf
import train
import world
from model import GPT, GPTConfig, response_logits
from support.files import read_jsonl
from support.likely import LikelyTokens
from support.machine import precision_of
from support.run import Run
from support.trie import exact_logps
from tools import assert_same


@pytest.fixture
def toy():
    """An untrained GPT that reads the toy world, and the tokenizer."""
    torch.manual_seed(5)
    tokenizer = data.get_tokenizer("toy")
    gpt = GPT(GPTConfig(block_size=40, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2,
                        n_embd=16, dropout=0.2)).double()
    return gpt.eval(), tokenizer


@pytest.fixture
def examples(toy):
    return data.tokenize(data.make_preferences(10, seed=4), toy[1])[0]


def token_logps(model, weights, prompt, response):
    """log pi(y_t | x, y_<t) of each token of a response, by the softmax of a whole forward."""
    ids = torch.tensor([prompt + response])  # (1, T)
    logps = functional_call(model, weights, ids)[0].softmax(-1).log()  # (T, V)
    return torch.stack([logps[len(prompt) - 1 + i, y] for i, y in enumerate(response)])


def likely_tokens(reference, examples, least):
    """A LikelyTokens, filled in batches of three pairs."""
    likely = LikelyTokens(least)
    for i in range(0, len(examples), 3):
        logits, _, row = response_logits(reference, **data.collate(examples[i:i + 3]))
        likely.keep(list(range(i, i + 3))[:len(examples) - i], logits, row)
    return likely


class Steps:
    """Adam by its formula, with betas 0.9 and 0.95. weights: {name: tensor}, as they are now.

    A gradient that is longer than clip is shortened to it first. norms: the lengths before that.
    """

    def __init__(self, weights, clip, eps=1e-8):
        self.weights, self.clip, self.eps = weights, clip, eps
        self.m, self.v, self.norms = {}, {}, []

    def step(self, loss, rate):
        """One step along the gradient of loss(weights)."""
        before = {name: w.detach().requires_grad_() for name, w in self.weights.items()}
        gradients = torch.autograd.grad(loss(before), list(before.values()), allow_unused=True)
        gradients = [g if g is not None else torch.zeros(()) for g in gradients]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        self.norms.append(norm)
        t, self.weights = len(self.norms), {}
        for (name, w), g in zip(before.items(), gradients):
            if self.clip is not None:
                g = g * min(1.0, self.clip / (norm + 1e-6))
            self.m[name] = 0.9 * self.m.get(name, 0.0) + 0.1 * g
            self.v[name] = 0.95 * self.v.get(name, 0.0) + 0.05 * g ** 2
            m, v = self.m[name] / (1 - 0.9 ** t), self.v[name] / (1 - 0.95 ** t)
            self.weights[name] = w.detach() - rate * m / (v.sqrt() + self.eps)


def follow(weights, losses, rates, clip):
    """The weights after a step along each loss, and the norms of the gradients."""
    state = Steps(weights, clip)
    for loss, rate in zip(losses, rates, strict=True):
        state.step(loss, rate)
    return state.weights, state.norms


def cosine(step, total, peak):
    """The learning rate of trainings too short for a warm-up of more than one step."""
    return peak * (1 + math.cos(math.pi * step / total)) / 2


def assert_same_weights(model, weights, tolerance=1e-9):
    for name, w in model.named_parameters():
        assert_same(w, weights[name], tolerance, what=f"the weight {name}")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_sft_is_four_steps_by_hand(toy, examples, tmp_path):
    """Texts of different lengths, in batches of 4, in 2 epochs. The loss of a batch is the mean
    over its texts of -log pi(y|x)."""
    gpt, _ = toy
    texts = [(e.prompt, e.chosen) for e in examples[:6]]
    texts[1] = texts[1][0], texts[1][1][:2]  # short texts weigh as much as long ones
    texts[2] = texts[2][0], 3 * texts[2][1]  # and a text of 32 tokens or more is sorted apart
    assert 32 <= len(texts[2][0]) + len(texts[2][1]) <= 40
    plan = data.epochs([len(x) + len(y) for x, y in texts], 4, 3, 2)
    before = weights_of(gpt)
    train.train_sft(gpt, texts, Run(tmp_path), epochs=2, batch_size=4, lr=0.02, seed=3)
    # dropout is on in SFT: this model has it, so the oracle cannot follow it to the digit
    assert gpt.training, "SFT is the one training with dropout"
    moved = [not torch.equal(p, before[name]) for name, p in gpt.named_parameters()]
    assert all(moved)

    gpt.load_state_dict(before | {"head.weight": before["wte.weight"]})
    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gpt.h[0].attn.dropout = 0.0
    train.train_sft(gpt, texts, Run(tmp_path / "2"), epochs=2, batch_size=4, lr=0.02, seed=3)

    def loss_of(indices):
        return lambda weights: -torch.stack(
            [token_logps(gpt, weights, *texts[i]).sum() for i in indices]).mean()
    losses = [loss_of(indices) for indices in plan]
    rates = [cosine(k, len(plan), 0.02) for k in range(len(plan))]
    weights, norms = follow(before, losses, rates, clip=10.0)
    assert max(norms) > 10, "no gradient was clipped: nothing is proved about the clip"
    assert_same_weights(gpt, weights)
    first = read_jsonl(tmp_path / "2" / "metrics.jsonl")[0]
    assert first["stage"] == "sft"
    assert_same(first["loss"], losses[0](before), 1e-9, what="the loss that is logged")
    assert_same(first["grad_norm"], norms[0], 1e-6, what="the norm before clipping")


BETA = 0.4
OBJECTIVES = {
    "Eq. 7 alone": {},
    "both remedies": {"stray_weight": 0.3, "nll_weight": 0.15},
    "conservative DPO": {"loss": "cdpo", "label_smoothing": 0.2},
    "conservative DPO that trusts the labels": {"loss": "cdpo"},
}


def stray(model, weights, ref, least, prompt, response):
    """The policy's probability of the next tokens to which ref gives less than `least`, at each
    token of a response, summed over them."""
    ids = torch.tensor([prompt + response])  # (1, T)
    p, q = [functional_call(model, w, ids)[0].softmax(-1) for w in (weights, ref)]  # (T, V) each
    return sum((p[t] * (q[t] < least)).sum()
               for t in range(len(prompt) - 1, len(prompt) + len(response) - 1))


def by_hand(gpt, weights, ref, examples, least, stray_weight=0, nll_weight=0, loss="",
            label_smoothing=0):
    """What is minimised over some pairs, and a dict of all that is logged of it, by the formulas:
    Eq. 7 with a share of flipped labels, + stray_weight x stray mass - nll_weight x log pi(y_w|x).
    """
    rows = []
    for e in examples:
        w = token_logps(gpt, weights, e.prompt, e.chosen).sum()
        l = token_logps(gpt, weights, e.prompt, e.rejected).sum()
        ref_w = token_logps(gpt, ref, e.prompt, e.chosen).sum().detach()
        ref_l = token_logps(gpt, ref, e.prompt, e.rejected).sum().detach()
        reward_w, reward_l = BETA * (w - ref_w), BETA * (l - ref_l)
        rows.append({
            "loss": (1 - label_smoothing) * torch.log1p((reward_l - reward_w).exp())
            + label_smoothing * torch.log1p((reward_w - reward_l).exp()),
            "stray_mass": sum(stray(gpt, weights, ref, least, e.prompt, y)
                              for y in (e.chosen, e.rejected)) / 2,
            "rewards/chosen": reward_w, "rewards/rejected": reward_l,
            "rewards/margins": reward_w - reward_l,
            "rewards/accuracies": 0.5 + 0.5 * torch.sign(reward_w - reward_l),
            "logps/chosen": w, "logps/rejected": l})
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    total = mean["loss"] + stray_weight * mean["stray_mass"] - nll_weight * mean["logps/chosen"]
    return total, mean


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dpo_is_six_steps_by_hand(toy, examples, tmp_path, objective):
    """10 pairs in batches of 4, in 2 epochs. Weights, and every number that is logged (1e-9; the
    norm of the gradient 1e-6). The policy is measured before the step that is named, and at the
    end. It arrives in train mode with dropout configured."""
    settings = OBJECTIVES[objective]
    reference, _ = toy
    ref = weights_of(reference)
    policy = copy.deepcopy(reference)  # it begins elsewhere, so that no pair is a tie
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn_like(p)
    start = weights_of(policy)
    plan = data.epochs([len(e) for e in examples], 4, 1, 2)
    assert [len(batch) for batch in plan].count(2) == 2, "the last batch of an epoch is smaller"
    chosen, rejected = torch.zeros(2, len(examples), dtype=torch.float64)
    for i, e in enumerate(examples):
        chosen[i] = token_logps(reference, ref, e.prompt, e.chosen).sum().detach()
        rejected[i] = token_logps(reference, ref, e.prompt, e.rejected).sum().detach()
    seen = []

    def measure(policy):
        seen.append(weights_of(policy))
        return {"measured": len(seen)}
    watched = {"ceiling": 0.75, "measure": measure, "measure_at": (0, 0.5, 1)}
    if objective == "Eq. 7 alone":
        watched = {}
    least = 1 / reference.config.vocab_size  # an untrained model finds about half of them likelier
    likely = likely_tokens(reference, examples, least)
    train.train_dpo(policy.train(), examples, (chosen, rejected), Run(tmp_path), likely=likely,
                    beta=BETA, epochs=2, batch_size=4, lr=0.002, seed=1, **settings, **watched)

    means, path = [], []

    def loss_of(indices):
        def loss(weights):
            path.append(weights)
            some = [examples[i] for i in indices]
            total, mean = by_hand(reference, weights, ref, some, least, **settings)
            means.append({name: value.item() for name, value in mean.items()})
            return total
        return loss
    rates = [cosine(k, 6, 0.002) for k in range(6)]
    weights, norms = follow(start, [loss_of(indices) for indices in plan], rates, clip=10.0)
    if objective == "both remedies":
        assert max(norms) > 10 and min(norms) < 10, "clipped and not clipped: both must be seen"
    assert_same_weights(policy, weights)

    rows = read_jsonl(tmp_path / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [0, 5]
    for row, steps in zip(logged, (range(1), range(1, 6))):
        for name in means[0]:
            want = sum(means[k][name] for k in steps) / len(steps)
            assert_same(row[name], want, 1e-9, what=f"{name}, step {row['step']}")
        want = sum(norms[k] for k in steps) / len(steps)
        assert_same(row["grad_norm"], want, 1e-6, what="the norm before clipping")
        assert row.get("rewards/ceiling") == (pytest.approx(0.75, abs=1e-12) if watched else None)
        assert row["lr"] == pytest.approx(rates[row["step"]], abs=1e-12)
    recorded = [(row["step"], row["measured"]) for row in rows if "measured" in row]
    assert recorded == ([(0, 1), (3, 2), (6, 3)] if watched else [])
    for got, want in zip(seen, (path[0], path[3], weights)):
        for name in got:
            assert_same(got[name], want[name], 1e-9, what=f"the policy that is measured, {name}")
    assert not policy.training, "dropout must be off: the policy is compared with the reference"


def test_a_training_in_bfloat16_is_one_in_float32_but_for_rounding(tmp_path):
    """24 steps of DPO on toy pairs, in both. The first loss is ln 2 in both: the reference was
    computed in the same way. In float32 to 1e-6. In bfloat16 to 1e-3, since how a product of
    matrices is rounded depends on how many rows they have. Weights stay float32. Each logged loss
    differs by less than 0.03, while the loss falls by more than 0.1. If autocast kept its copy of
    the weights, every step would see those of the first. The exact measurement is float32 in
    both."""
    torch.manual_seed(0)
    tokenizer = data.get_tokenizer("toy")
    some, _ = data.tokenize(data.make_preferences(64), tokenizer)
    reference = GPT(GPTConfig(64, tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)).eval()
    prompts, losses = world.prompts()[1][:1], {}
    for dtype in ("float32", "bfloat16"):
        policy = copy.deepcopy(reference)
        with precision_of(dtype, "cpu"):
            ref_logps = train.reference_logps(reference, some, 16)
            train.train_dpo(policy, some, ref_logps, Run(tmp_path / dtype), beta=0.5, epochs=6,
                            batch_size=16, lr=0.002, seed=0)
            measured = exact_logps(policy, prompts)
        assert torch.equal(measured, exact_logps(policy, prompts))
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        losses[dtype] = [row["loss"] for row in read_jsonl(tmp_path / dtype / "metrics.jsonl")]
        tolerance = {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
        assert losses[dtype][0] == pytest.approx(math.log(2), abs=tolerance)
        assert losses[dtype][-1] < losses[dtype][0] - 0.1, losses
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.03)


def test_a_pair_without_a_margin_is_half_right(toy, examples, tmp_path):
    """A model whose weights are 0 finds all tokens equally likely, and so does its reference. Every
    margin is 0: the accuracy is 1/2, and the loss is ln 2."""
    gpt = toy[0].float()
    with torch.no_grad():
        for p in gpt.parameters():
            p.zero_()
    ref_logps = train.reference_logps(gpt, examples, 4)
    train.train_dpo(gpt, examples, ref_logps, Run(tmp_path), beta=BETA, epochs=1, batch_size=10,
                    lr=1e-3, seed=0)
    first = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_weight_of_the_stray_mass_is_not_ignored(toy, examples, tmp_path):
    """What the reference finds likely must be there. Or the training would be plain DPO."""
    gpt, _ = toy
    some = torch.zeros(10, dtype=torch.float64)
    with pytest.raises(ValueError, match="stray_weight needs `likely`"):
        train.train_dpo(gpt, examples, (some, some), Run(tmp_path), stray_weight=1.0, beta=BETA,
                        epochs=1, batch_size=10, lr=1e-3, seed=0)


def test_likely_tokens_are_those_of_the_reference(toy, examples):
    """They were kept in batches of 3. Here come the pairs 7, 2 and 9: chosen, then rejected, each
    token to which a forward of its text alone gives at least 1/V."""
    gpt, tokenizer = toy
    least = 1 / tokenizer.n_vocab
    likely = likely_tokens(gpt, examples, least)
    some, want = [examples[i] for i in (7, 2, 9)], []
    for e, response in [(e, e.chosen) for e in some] + [(e, e.rejected) for e in some]:
        p = gpt(torch.tensor([e.prompt + response]))[0].softmax(-1)  # (T, V)
        want.append(p[len(e.prompt) - 1:-1] >= least)
    assert 0.2 < torch.cat(want).double().mean() < 0.8, "or a constant mask would do"
    assert torch.equal(likely.mask([7, 2, 9]), torch.cat(want))


# ---- RLHF

@pytest.mark.parametrize("read", ["tokens", "end"])
def test_a_reward_model_is_two_epochs_by_hand(toy, examples, tmp_path, capsys, read):
    """Eq. 2: -log sigma(r(x,y_w) - r(x,y_l)), over 10 pairs in batches of 4. r adds up one number
    for every token of the response, or it is the number at EOS. Then the mean score of the pairs is
    shifted to 0. Weights and all that is logged (1e-9; the norm of the gradient 1e-6)."""
    reference, tokenizer = toy
    for i in range(5):  # longer texts have longer gradients: one of 10 is clipped
        examples[i] = data.Example(examples[i].prompt, 2 * examples[i].chosen, [3])
    model = rlhf.train_reward_model(reference, examples, Run(tmp_path), seed=6, epochs=2, lr=0.01,
                                    batch_size=4, read=read)
    start = rlhf.RewardModel(reference)
    weights = weights_of(start)
    assert not weights["scalar.weight"].any() and not weights["scalar.bias"].any()

    def score(weights, prompt, response):
        of_response = numbers(start, weights, prompt, response)[len(prompt):]
        return of_response.sum() if read == "tokens" else of_response[-1]
    losses, right = [], []

    def loss_of(indices):
        def loss(weights):
            terms, ranks = [], []
            for e in [examples[i] for i in indices]:
                w, l = score(weights, e.prompt, e.chosen), score(weights, e.prompt, e.rejected)
                terms.append(torch.log1p((l - w).exp()))
                ranks.append(0.5 + 0.5 * torch.sign(w - l).item())
            loss = sum(terms) / len(terms)
            losses.append(loss.item())
            right.append(sum(ranks) / len(ranks))
            return loss
        return loss
    plan = data.epochs([len(e) for e in examples], 4, 6, 2)
    rates = [cosine(k, len(plan), 0.01) for k in range(len(plan))]
    weights, norms = follow(weights, [loss_of(indices) for indices in plan], rates, clip=10.0)
    assert read == "end" or max(norms) > 10 > min(norms), "clipped and not: both must be seen"
    assert_same_weights(model, weights)
    scores = torch.stack([score(weights, e.prompt, e.chosen) for e in examples]
                         + [score(weights, e.prompt, e.rejected) for e in examples])
    batch = data.collate(examples)
    assert_same(model(batch["tokens"], batch["response_mask"]), scores - scores.mean(), 1e-6, {
        "the mean is not shifted to 0": scores},  # the shift is in float32
        what="the scores of the fitted model")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    first, last = read_jsonl(tmp_path / "metrics.jsonl")
    assert (first["step"], first["stage"], first["accuracy"]) == (0, "reward", 0.5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-12)
    for row, steps in (first, slice(1)), (last, slice(1, None)):
        for name, values in ("loss", losses), ("accuracy", right), ("grad_norm", norms):
            want = sum(values[steps]) / len(values[steps])
            assert row[name] == pytest.approx(want, rel=1e-6 if name == "grad_norm" else 1e-9)
    shown = f"loss={last['loss']:.3f}, accuracy={last['accuracy']:.3f}"
    assert shown in capsys.readouterr().err, "the progress bar"


class Hidden(torch.nn.Module):
    """A GPT up to its head."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        return self.gpt.hidden(tokens)


def numbers(model, weights, prompt, response):
    """The number that a ScalarModel says at each token of a text. (T,)"""
    body = {f"gpt.{name[5:]}": w for name, w in weights.items() if name.startswith("body.")}
    ids = torch.tensor([prompt + response])  # (1, T)
    states = functional_call(Hidden(model.body), body, ids)[0]  # (T, C)
    return states @ weights["scalar.weight"][0] + weights["scalar.bias"]


def advantages_by_hand(rewards, values, gamma, lam):
    """The advantages of generalised advantage estimation, Eq. 16 of 1506.02438, as its double sum.
    Lists of floats."""
    values = [*values, 0.0]  # the end has value 0
    delta = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, len(delta)))
            for t in range(len(delta))]


CASES = {
    "PPO": dict(gamma=0.97, lam=0.9, clip=0.1, max_grad_norm=1.0, anneal_lr=True),
    "PPO with the other switches": dict(gamma=1.0, lam=1.0, clip=None, clip_values=0.02,
                                        scale_rewards=True, normalise_advantages=False,
                                        max_grad_norm=None, anneal_lr=False, target_kl=0.3),
    "REINFORCE++": dict(critic=False, clip=0.05, max_grad_norm=0.5, anneal_lr=True),
    "scores that are all alike": dict(critic=False, scale_rewards=True, max_grad_norm=None,
                                      normalise_advantages=False),
}


@pytest.mark.parametrize("name", CASES)
def test_policy_learning_is_two_batches_by_hand(toy, monkeypatch, name):
    """Two batches of 6 answers, two passes over each, in minibatches of 4 and 2: rewards,
    advantages, the critic's target and the losses from their formulas, answer by answer. Weights of
    policy and critic agree to 1e-7, since rounding grows where Adam divides by a small number."""
    reference, tokenizer = toy
    policy = copy.deepcopy(reference).requires_grad_(True)
    reference.requires_grad_(False)
    prompts = [tokenizer.encode_ordinary(x) for x in world.prompts()[0][:3]]
    s = rlhf.Settings(**{"beta": 0.3, "samples": 12, "batch_size": 6, "minibatch_size": 4,
                         "epochs": 2, "lr": 3e-3, "critic_lr": 5e-3} | CASES[name])
    answers, critics, announced = [], [], []
    generate, critic_init = GPT.generate, rlhf.ScalarModel.__init__

    def keep_answers(self, prompts, *args, **kwargs):
        assert self is policy, "the answers of another model are learned from"
        assert torch.initial_seed() == 2, "the same seed must be the same run"
        answers.append((prompts, generate(self, prompts, *args, **kwargs)))
        return answers[-1][1]

    def keep_critic(self, gpt):
        critic_init(self, gpt)
        critics.append(self)
    monkeypatch.setattr(GPT, "generate", keep_answers)
    monkeypatch.setattr(rlhf.ScalarModel, "__init__", keep_critic)

    def score(prompts, responses):
        spread = 1 if name == "scores that are all alike" else 7
        return torch.tensor([sum(y) % spread - 3.0 for y in responses], dtype=torch.float64)
    start = weights_of(policy)
    if name == "PPO":
        history = rlhf.learn(policy, reference, score, prompts, s, seed=2,
                             at_step=announced.append)
        assert announced == [0, 6, 12]
    else:
        history = rlhf.learn(policy, reference, score, prompts, s, seed=2)
    assert len(critics) == s.critic
    assert_same_weights(reference, start, 0)  # it stays as it was

    # the order is that of a generator with the seed
    order = torch.Generator().manual_seed(2)
    ref, beta, variances = weights_of(reference), s.beta, []
    states = {"policy": Steps(start, s.max_grad_norm, eps=1e-5)}
    if s.critic:
        zero = rlhf.ScalarModel(reference)
        states["critic"] = Steps(weights_of(zero), s.max_grad_norm, eps=1e-5)
    for k in range(2):
        which = torch.randint(3, (6,), generator=order).tolist()
        asked, responses = answers[k]
        assert asked == [prompts[i] for i in which]
        assert all(len(y) <= 16 for y in responses)
        pi = states["policy"].weights
        batch, kls, totals = [], [], []
        scores = score(asked, responses).tolist()
        for x, y, r in zip(asked, responses, scores):
            old = token_logps(policy, pi, x, y).detach()
            ratio = (old - token_logps(policy, ref, x, y)).tolist()
            rewards = [-beta * c for c in ratio]
            rewards[-1] += r
            kls.append(sum(ratio))
            totals.append(sum(rewards))
            batch.append({"x": x, "y": y, "old": old, "rewards": rewards})
        if s.scale_rewards:
            mean = sum(totals) / 6
            variances.append(sum((total - mean) ** 2 for total in totals) / 6)
            deviation = max(0.1, math.sqrt(sum(variances) / len(variances)))
            for b in batch:
                b["rewards"] = [r / deviation for r in b["rewards"]]
        for b in batch:
            values = [0.0] * len(b["y"])
            gamma, lam = 1.0, 1.0
            if s.critic:
                gamma, lam = s.gamma, s.lam
                values = values_of(zero, states["critic"].weights, b["x"], b["y"]).tolist()
            b["advantages"] = advantages_by_hand(b["rewards"], values, gamma, lam)
            b["values"], b["targets"] = values, [a + v for a, v in zip(b["advantages"], values)]
        every = [a for b in batch for a in b["advantages"]]
        if s.normalise_advantages:
            mean = sum(every) / len(every)
            deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1))
            for b in batch:
                b["advantages"] = [(a - mean) / (deviation + 1e-8) for a in b["advantages"]]
        share = 1 - k / 2 if s.anneal_lr else 1.0
        for _ in range(2):
            places = torch.randperm(6, generator=order).tolist()
            for part in (places[:4], places[4:]):
                some = [batch[i] for i in part]
                states["policy"].step(lambda w: policy_loss(policy, w, some, s.clip), s.lr * share)
                if s.critic:
                    states["critic"].step(lambda w: critic_loss(zero, w, some, s.clip_values),
                                          s.critic_lr * share)
        row = history[k]
        assert row["generated"] == 6 * (k + 1)
        assert row["score"] == pytest.approx(sum(scores) / 6, abs=1e-9)
        assert row["kl"] == pytest.approx(sum(kls) / 6, abs=1e-6)
        assert row["beta"] == pytest.approx(beta, abs=1e-9)
        if s.target_kl is not None:
            beta *= 1 + 0.1 * max(-0.2, min(0.2, sum(kls) / 6 / s.target_kl - 1))
    assert_same_weights(policy, states["policy"].weights, 1e-7)
    if s.critic:
        assert_same_weights(critics[0], states["critic"].weights, 1e-7)


def values_of(critic, weights, prompt, response):
    """The critic's value of the state before each token of the response."""
    return numbers(critic, weights, prompt, response)[len(prompt) - 1:-1]


def policy_loss(policy, weights, batch, clip):
    """PPO's Eq. 7, summed over the tokens of an answer, a mean over answers."""
    total = 0.0
    for b in batch:
        ratios = (token_logps(policy, weights, b["x"], b["y"]) - b["old"]).exp()
        for ratio, a in zip(ratios, b["advantages"]):
            gain = ratio * a
            if clip is not None:
                gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * a)
            total = total - gain
    return total / len(batch)


def critic_loss(critic, weights, batch, clip):
    """Half the squared distance to the critic's target, a mean over the tokens of all answers."""
    terms = []
    for b in batch:
        now = values_of(critic, weights, b["x"], b["y"])
        for value, old, target in zip(now, b["values"], b["targets"]):
            error = (value - target) ** 2
            if clip is not None:
                near = old + (value - old).clamp(-clip, clip)
                error = torch.maximum(error, (near - target) ** 2)
            terms.append(error / 2)
    return sum(terms) / len(terms)
