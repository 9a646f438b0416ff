"""RLHF from scratch: the pipeline that DPO replaces, as small and as real as dpo.py.

    python rlhf.py DIR        DIR: a finished toy run of train.py; ends in the comparison table, writes DIR/rlhf.json

1. A REWARD MODEL is fitted to the same fixed pairs that DPO uses (Eq. 2).
2. POLICY LEARNING: sample a prompt, let the current policy answer, have the answer scored, update the policy, again and
   again (Eq. 3). PPO (https://arxiv.org/abs/1707.06347) does it with a critic and a clipped ratio, REINFORCE++
   (https://arxiv.org/abs/2501.03262) without a critic. Who scores is a function: the learned reward, the true one, an AI judge.
3. The paper's other baselines (section 6): Preferred-FT, Unlikelihood, best-of-N.

Equation numbers are those of the DPO paper, https://arxiv.org/abs/2305.18290v3, unless another is named.

Shapes: B responses, T tokens, S = T - 1 predictions: entry t of a (B,S) tensor is about token t+1, as in dpo.token_logps.
mask (B,S) is true where that token belongs to the response, EOS included. Every response token is an action; the state
before it is the prompt and the response so far.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import tabular
import train
import world
from dpo import pair_logps
from model import atomic_save, load_model, save_model

MAX_NEW_TOKENS = 16          # the longest review has 14, EOS included
UNFINISHED = world.ILL_FORMED_REWARD      # the score of a response that did not end: a reward model has never seen one


class ScalarModel(nn.Module):
    """A GPT's body with one number at every position where the GPT has logits: a critic. Starts from the GPT's weights and says 0."""

    def __init__(self, gpt):
        super().__init__()
        self.body = copy.deepcopy(gpt).requires_grad_(True)
        self.scalar = nn.Linear(gpt.config.n_embd, 1).to(gpt.wte.weight)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens):
        """tokens (B,T) -> (B,T)"""
        return self.scalar(self.body.hidden(tokens)).squeeze(-1)


# --------------------------------------------------------------------------------------------------------------------
# 1. The reward model

class RewardModel(ScalarModel):
    """r(x, y): one number for a whole response.

    read = "tokens": the sum of the numbers at all its tokens. read = "end": the number at its last token, EOS, the only place
    that has seen all of it, as is usual. A large model can do with the end. A model of one layer cannot: at EOS it sees a bag of words,
    and which of them a "not" belonged to the layer before it should have found out. Summed, every token says what it
    changes, in sight of what stands before it; so does DPO's implicit reward, a sum of log-ratios.
    """

    def __init__(self, gpt, read="tokens"):
        super().__init__(gpt)
        self.read = read
        self.register_buffer("shift", torch.zeros(()))                 # see train_reward_model

    def forward(self, tokens, response_mask):
        """tokens, response_mask (B,T) -> (B,)"""
        values = super().forward(tokens)                                                              # (B, T)
        if self.read == "tokens":
            return torch.where(response_mask, values, 0.0).sum(1) - self.shift                        # (B,)
        last = tokens.size(1) - 1 - response_mask.flip(1).float().argmax(1)                           # (B,)
        return values.gather(1, last[:, None]).squeeze(1) - self.shift                                # (B,)


def reward_model_loss(chosen_scores, rejected_scores):
    """-log sigma(r(x, y_w) - r(x, y_l)), Eq. 2, for each pair. (B,), (B,) -> (B,); ln 2 where the model sees no difference."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def train_reward_model(reference, examples, folder, seed, epochs=4, lr=1.5e-3, batch_size=64, read="tokens"):
    """Fit a RewardModel, begun at the reference's weights, to data.Example pairs: Eq. 2. Returns it frozen, its scores shifted to
    mean 0 over some of the pairs: the loss knows differences only, and UNFINISHED must mean something on the same scale."""
    model = RewardModel(reference, read)
    device = model.scalar.weight.device

    def scores_of(indices):
        batch = {k: v.to(device) for k, v in data.collate([examples[i] for i in indices]).items()}
        return model(batch["tokens"], batch["response_mask"]).chunk(2)                 # (B,), (B,)

    def loss_of(indices):
        chosen, rejected = scores_of(indices)
        loss = reward_model_loss(chosen, rejected).mean()
        return loss, {"loss": loss, "accuracy": ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()}

    model.eval()
    train.fit("reward", model, [len(e) for e in examples], loss_of, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
              accumulate=1, out_dir=folder, log=train.Log(folder / "metrics.jsonl"), bar_keys=["loss", "accuracy"])
    with torch.no_grad():
        model.shift += torch.cat(scores_of(range(min(len(examples), 4096)))).mean()
    return model.requires_grad_(False)


@torch.no_grad()
def all_scores(reward_model, prompts):
    """The reward model's score of every well-formed response to every prompt, (P, N) float64."""
    tokenizer, device = data.get_tokenizer("toy"), reward_model.scalar.weight.device
    responses = [tokenizer.encode_ordinary(y) + [tokenizer.eot_token] for y in world.responses()]
    rows = [reward_model(*(t.to(device) for t in data.pad([tokenizer.encode_ordinary(x)] * len(responses), responses)))
            for x in prompts]
    return torch.stack(rows).cpu().double()


# --------------------------------------------------------------------------------------------------------------------
# 2. Policy learning: from scores to a gradient

def response_token_logps(model, tokens, mask):
    """log pi(y_t | x, y_<t) of every response token: dpo.token_logps where mask (B,S) is true and 0 elsewhere, cheaper: the head
    runs only where a response token is predicted. (B,T), (B,S) -> (B,S)"""
    logits = model.head(model.hidden(tokens[:, :-1])[mask])                                           # (N, V)
    logps = -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:][mask], reduction="none")
    return torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device).masked_scatter(mask, logps)


def token_rewards(scores, logps, ref_logps, mask, beta):
    """The objective of Eq. 3 as a reward for every token: -beta log(pi/ref) of the token, and the response's score at its
    last one. Their sum over a response is r(x,y) - beta log(pi(y|x)/ref(y|x)).

    scores (B,), logps, ref_logps (B,S), of the policy that generated; mask (B,S). Returns (B,S), 0 outside the mask."""
    rewards = torch.where(mask, -beta * (logps - ref_logps), 0.0)                                     # (B, S)
    last = mask.size(1) - 1 - mask.flip(1).float().argmax(1)                                          # (B,)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, https://arxiv.org/abs/1506.02438, Eq. 16: sums of the TD errors
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t), each later one weighted by a further gamma lam.

    rewards, values, mask (B,S); values[t] is V of the state before token t+1; after the last token the value is 0.
    lam = 0: the TD error, biased where V is wrong; lam = gamma = 1: return - V, unbiased whatever V is.
    Returns (B,S) advantages, 0 outside the mask."""
    values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    advantage, next_value, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(mask.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                                     # (B,)
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        next_value = values[:, t]
        out.append(advantage)
    return torch.stack(out[::-1], 1)                                                                  # (B, S)


def reward_to_go(rewards, mask):
    """Everything still to come, gamma = 1: REINFORCE++'s token advantage before normalisation, and `gae` with V = 0 and
    lam = 1. (B,S), (B,S) -> (B,S)"""
    return torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1) * mask


def normalise(advantages, mask):
    """Mean 0 and standard deviation 1 over the batch's response tokens. (B,S), (B,S) -> (B,S), 0 outside the mask."""
    inside = advantages[mask]
    return torch.where(mask, (advantages - inside.mean()) / (inside.std() + 1e-8), 0.0)


def ppo_loss(logps, old_logps, advantages, mask, clip=0.2):
    """-min(rho A, clip(rho, 1-clip, 1+clip) A), summed over a response's tokens, mean over responses; 1707.06347, Eq. 7.

    rho = pi/pi_old. At rho = 1 the gradient is the policy gradient; where the policy has already gone further than clip in
    the direction of A it is 0. clip = None: rho A alone. logps (B,S) with gradient; the rest (B,S) without. A scalar."""
    ratio = (logps - old_logps).exp()                                                                 # (B, S)
    gain = ratio * advantages
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -torch.where(mask, gain, 0.0).sum(-1).mean()


def value_loss(values, old_values, returns, mask, clip=None):
    """Half the squared error of the critic, mean over response tokens. (B,S) each -> a scalar.

    clip: the critic may not profit from moving further than this from the values it had when the batch was generated."""
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * error[mask].mean()


# --------------------------------------------------------------------------------------------------------------------
# Policy learning: the loop

@dataclass
class Settings:
    """How the policy is learned. From `gamma` on: the details that are said to matter, each a switch. The values are those that came
    closest to the optimum for the training prompts in about fifteen trials, two or three seeds each, on the true reward."""
    beta: float = 1.0                      # the leash, Eq. 3: larger is a smaller KL
    target_kl: float | None = None         # nats a response: beta is steered so that the KL comes to this
    samples: int = 40_960                  # responses generated in all
    batch_size: int = 512                  # responses generated with one policy before it is updated
    minibatch_size: int = 64               # responses an update
    epochs: int = 2                        # passes over a batch: more is learned from a sample, from staler samples
    lr: float = 2e-3                       # little to spare: with a reward model from 2,500 labels one run of three falls apart
    critic: bool = True                    # False: REINFORCE++, the advantage is the reward to go
    critic_lr: float = 3e-3
    gamma: float = 1.0                     # below 1 it is not Eq. 3's objective any more
    lam: float = 1.0                       # see `gae`; responses are short, so that the return's noise costs less than the critic's bias
    clip: float | None = 0.1               # of the ratio; None: none
    normalise_advantages: bool = True
    clip_values: float | None = None
    scale_rewards: bool = False            # divide rewards by the running deviation of the returns
    anneal_lr: bool = True                 # linearly to 0
    max_grad_norm: float | None = 1.0      # of the policy's and of the critic's gradient; None: no clipping


def by_text(score):
    """A scoring function for `learn` from a function of texts, such as world.true_reward(prompt, response)."""
    tokenizer = data.get_tokenizer("toy")
    score = lru_cache(maxsize=None)(score)

    def scores(prompts, responses):
        return torch.tensor([score(tokenizer.decode(x), tokenizer.decode(y[:-1])) if y[-1] == tokenizer.eot_token else UNFINISHED
                             for x, y in zip(prompts, responses)])
    return scores


def by_model(reward_model):
    """A scoring function for `learn` from a reward model."""
    device, eos = reward_model.scalar.weight.device, data.get_tokenizer("toy").eot_token

    @torch.no_grad()
    def scores(prompts, responses):
        ended = torch.tensor([y[-1] == eos for y in responses])
        return torch.where(ended, reward_model(*(t.to(device) for t in data.pad(prompts, responses))).cpu(), UNFINISHED)
    return scores


@torch.no_grad()
def rollout(policy, reference, critic, score, prompts, beta):
    """Generate a response to each of the prompts (lists of token ids) and have it scored.

    Returns a dict of tensors: tokens (B,T); mask, logps, rewards (see token_rewards) and, with a critic, values (B,S); scores and
    kl (B,), kl an estimate of KL(policy || reference) from each response, log pi - log ref."""
    device = next(policy.parameters()).device
    responses = policy.generate(prompts, MAX_NEW_TOKENS, eos_id=data.get_tokenizer("toy").eot_token)
    tokens, response_mask = (t.to(device) for t in data.pad(prompts, responses))                      # (B, T), (B, T)
    mask = response_mask[:, 1:]                                                                       # (B, S)
    scores = score(prompts, responses).to(device)                                                     # (B,)
    logps, ref_logps = (response_token_logps(m, tokens, mask) for m in (policy, reference))           # (B, S)
    rewards = token_rewards(scores, logps, ref_logps, mask, beta)                                     # (B, S)
    batch = {"tokens": tokens, "mask": mask, "logps": logps, "scores": scores, "kl": (logps - ref_logps).sum(-1), "rewards": rewards}
    if critic is not None:
        batch["values"] = critic(tokens[:, :-1])                                                      # (B, S)
    return batch


def learn(policy, reference, score, prompts, settings, seed=0, at_step=None, name="learn"):
    """Sample prompts -> generate -> score -> update, again and again: as many whole batches as there are in settings.samples.

    policy: a GPT, changed in place; reference: a GPT, frozen. score(prompts, responses) -> (B,), of two lists of token ids: who
    judges. prompts: a list of token ids. at_step(generated): called before the first batch and after every one.
    Returns a dict for every batch, means over its responses: what one watches while it runs. Raises ValueError for a frozen policy
    and for fewer samples than a batch.
    """
    if not all(p.requires_grad for p in policy.parameters()):      # a copy of a frozen reference is frozen too
        raise ValueError("the policy's parameters take no gradient: learn changes them; policy.requires_grad_(True) first")
    if settings.samples < settings.batch_size:
        raise ValueError(f"samples={settings.samples} is less than one batch, batch_size={settings.batch_size}")
    s, device = settings, next(policy.parameters()).device
    choose = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)                                            # of generation
    critic = ScalarModel(reference).to(device) if s.critic else None
    groups = [{"params": list(policy.parameters()), "lr": s.lr}]
    if critic is not None:
        groups.append({"params": list(critic.parameters()), "lr": s.critic_lr})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)
    beta, history, return_squares = s.beta, [], []
    batches = s.samples // s.batch_size
    if at_step:
        at_step(0)
    bar = tqdm(range(batches), desc=f"{name:>16}", unit="batch", dynamic_ncols=True)
    for k in bar:
        x = [prompts[i] for i in torch.randint(len(prompts), (s.batch_size,), generator=choose).tolist()]
        batch = rollout(policy, reference, critic, score, x, beta)
        mask, rewards = batch["mask"], batch["rewards"]
        if s.scale_rewards:                                            # all rewards alike: the optimum stays where it is
            return_squares.append((rewards.sum(-1) - rewards.sum(-1).mean()).square().mean())
            rewards = rewards / torch.stack(return_squares).mean().sqrt().clamp(min=0.1)      # scores that are all alike have none
        if critic is not None:
            advantages = gae(rewards, batch["values"], mask, s.gamma, s.lam)                          # (B, S)
            batch["returns"] = advantages + batch["values"]                                           # (B, S)
        else:
            advantages = reward_to_go(rewards, mask)
        batch["advantages"] = normalise(advantages, mask) if s.normalise_advantages else advantages

        for group, lr in zip(optimizer.param_groups, (s.lr, s.critic_lr)):
            group["lr"] = lr * (1 - k / batches) if s.anneal_lr else lr
        for _ in range(s.epochs):
            for part in torch.randperm(s.batch_size, generator=choose).split(s.minibatch_size):
                b = {key: value[part.to(device)] for key, value in batch.items()}
                logps = response_token_logps(policy, b["tokens"], b["mask"])                          # (b, S)
                loss = ppo_loss(logps, b["logps"], b["advantages"], b["mask"], s.clip)
                if critic is not None:                                 # two networks: the sum trains each by its own term
                    loss = loss + value_loss(critic(b["tokens"][:, :-1]), b["values"], b["returns"], b["mask"], s.clip_values)
                optimizer.zero_grad()
                loss.backward()
                for group in groups if s.max_grad_norm else []:
                    torch.nn.utils.clip_grad_norm_(group["params"], s.max_grad_norm)
                optimizer.step()

        history.append({"generated": (k + 1) * s.batch_size, "score": batch["scores"].mean().item(), "kl": batch["kl"].mean().item(),
                        "beta": beta})
        bar.set_postfix({key: f"{history[-1][key]:.3f}" for key in ("score", "kl", "beta")}, refresh=False)
        if s.target_kl is not None:                                    # https://arxiv.org/abs/1909.08593, section 2.2
            beta *= 1 + 0.1 * max(-0.2, min(0.2, history[-1]["kl"] / s.target_kl - 1))
        if at_step:
            at_step((k + 1) * s.batch_size)
    return history


# --------------------------------------------------------------------------------------------------------------------
# 3. The other baselines of section 6

def preferred_ft(policy, examples, folder, seed, epochs=1, lr=1e-3):
    """Preferred-FT: supervised learning on the chosen responses. Its optimum is tabular.preferred_ft's, and has no beta."""
    return fit_pairs("preferred", policy, examples, lambda chosen, rejected: -chosen, folder, seed, epochs, lr)


def unlikelihood(policy, examples, folder, seed, alpha=0.1, epochs=1, lr=1e-3):
    """Unlikelihood: raise log pi(y_w|x), lower alpha log pi(y_l|x). The loss has no least value once some response loses more
    than 1/alpha times as often as it wins; then the policy falls apart, and only the number of steps says how far."""
    return fit_pairs("unlikelihood", policy, examples, lambda chosen, rejected: -chosen + alpha * rejected, folder, seed, epochs, lr)


def fit_pairs(name, policy, examples, loss_of_logps, folder, seed, epochs, lr, batch_size=64):
    """Minimise a loss of (log pi(y_w|x), log pi(y_l|x)), each (B,), over the pairs. policy is changed in place and returned."""
    device = next(policy.parameters()).device

    def loss_of(indices):
        batch = {k: v.to(device) for k, v in data.collate([examples[i] for i in indices]).items()}
        chosen, rejected = pair_logps(policy, batch)
        loss = loss_of_logps(chosen, rejected).mean()
        return loss, {"loss": loss, "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()}

    policy.eval()
    train.fit(name, policy, [len(e) for e in examples], loss_of, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
              accumulate=1, out_dir=folder, log=train.Log(folder / "metrics.jsonl"), bar_keys=["loss"])
    return policy


# --------------------------------------------------------------------------------------------------------------------
# How good is a reward model?

def accuracy(grammar_logps, scores, reward):
    """How often a judge with these scores ranks a pair as its Bradley-Terry label does, ties 1/2, exact: pairs are two
    independent responses of the grammar, labels are drawn from reward. (N,) each -> a scalar; scores = reward gives
    world.label_ceiling."""
    p = grammar_logps.exp()
    prefers = 0.5 + 0.5 * torch.sign(scores[:, None] - scores[None, :])                                # (N, N): 1, 0, ties 1/2
    return 2 * p @ (prefers * tabular.preferences(reward)) @ p


def spearman(a, b):
    """Rank correlation of two vectors, equal values sharing their mean rank. (N,), (N,) -> a scalar."""
    def ranks(x):
        _, place, count = torch.unique(x.round(decimals=9), return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place].double()                                    # (N,)
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]


def calibration(grammar_logps, scores, reward, bins=10):
    """(predicted, true, share), each (bins,): the pairs of the grammar sorted by the judge's probability sigma(s_i - s_j) into
    equal bins of it; its mean in the bin, the mean of the true probability sigma(r_i - r_j), and the bin's share of the pairs."""
    p = grammar_logps.exp()
    weight = (p[:, None] * p[None, :]).flatten()                                                      # (N*N,)
    predicted, true = tabular.preferences(scores).flatten(), tabular.preferences(reward).flatten()
    which = (predicted * bins).long().clamp_(max=bins - 1)
    total = lambda v: torch.bincount(which, weights=v, minlength=bins)
    share = total(weight)
    return total(weight * predicted) / share, total(weight * true) / share, share


def judge_quality(score_rows, prompts):
    """What a judge is worth on these prompts, means over them, exact. score_rows: its score of every well-formed response, (P, N)."""
    grammar, reward = world.grammar_logps(prompts), world.rewards(prompts, world.responses())
    mean = lambda f: sum(f(*row).item() for row in zip(grammar, score_rows, reward)) / len(prompts)
    curve = torch.stack([torch.stack(calibration(*row)) for row in zip(grammar, score_rows, reward)])           # (P, 3, bins)
    share = curve[:, 2].mean(0)
    predicted, true = ((curve[:, k] * curve[:, 2]).nansum(0) / curve[:, 2].sum(0) for k in (0, 1))
    return {"accuracy": mean(accuracy), "ceiling": mean(lambda p, s, r: world.label_ceiling(p, r)),
            "spearman": mean(lambda p, s, r: spearman(s, r)), "calibration_error": ((predicted - true).abs() * share).nansum().item(),
            "predicted": predicted.tolist(), "true": true.tolist(), "share": share.tolist()}


# --------------------------------------------------------------------------------------------------------------------
# The comparison: from a finished train.py run to one table

# What is trained, in chains whose members need what stands before them. Chains run side by side, one process each.
CHAINS = [["reward-human", "ppo-human", "reinforce-human"], ["reward-ai", "ppo-ai", "dpo-ai"],
          ["ppo-true", "unlikelihood"], ["ppo-judge", "preferred-ft"]]
STAGES = [name for chain in CHAINS for name in chain]


class Run:
    """A finished toy run of train.py, and what the stages share: reference, prompts, pairs."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = Path(folder), device
        self.flags, self.tokenizer, self.models = evaluate.load_run(folder, device)
        if self.flags["data"] is not None or self.flags["annotator"] != "human":
            raise SystemExit(f"{folder} was trained with --{'data' if self.flags['data'] else 'annotator ' + self.flags['annotator']}; the "
                             "comparison needs the toy world, where the true reward is known, and human labels")
        self.seed, self.beta, self.reference = self.flags["seed"], self.flags["beta"], self.models["sft"].requires_grad_(False)
        self.train_prompts, self.held_out = world.prompts()
        self.prompt_ids = [self.tokenizer.encode_ordinary(x) for x in self.train_prompts]

    def examples(self, annotator):
        """The run's own pairs, labelled by an annotator; the responses compared are the same whoever labels."""
        return data.tokenize(data.make_preferences(self.flags["pairs"], annotator, self.seed), self.tokenizer)[0]

    def stage_folder(self, name):
        return self.folder / "rlhf" / name

    def result(self, name):
        file = self.stage_folder(name) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    @cached_property
    def ref_logps(self):
        return evaluate.exact_logps(self.reference, self.held_out)

    def measure(self, policy):
        """evaluate.measure of a GPT, exact, on the held-out prompts."""
        return evaluate.measure(evaluate.exact_logps(policy, self.held_out), self.ref_logps, self.beta)

    def new_policy(self):
        return copy.deepcopy(self.reference).requires_grad_(True)

    def policy(self, name):
        return load_model(self.stage_folder(name) / "policy.pt", self.device)[0].eval()

    def reward_model(self, name):
        model = RewardModel(self.reference).to(self.device)
        model.load_state_dict(torch.load(self.stage_folder(name) / "reward.pt", map_location=self.device, weights_only=True))
        return model.requires_grad_(False).eval()


def dpo_policy(run, examples, folder, beta, annotator="human", reference=None, at_step=None, **weights):
    """DPO exactly as train.py does it, with the run's own flags, on other pairs or with another beta, reference or weights.
    at_step(policy, step, total): called before every step and after the last."""
    reference = reference or run.reference
    args = argparse.Namespace(**run.flags | {"beta": beta, "annotator": annotator, "out_dir": folder} | weights)
    policy = copy.deepcopy(reference).requires_grad_(True)
    train.train_dpo("dpo", policy, examples, train.reference_logps(reference, examples, 512, run.device), args,
                    train.Log(folder / "metrics.jsonl"), args.norm_weight, args.nll_weight,
                    (lambda step, total: at_step(policy, step, total)) if at_step else None)
    return policy


def run_stage(run, name, settings):
    """Train one stage and leave reward.pt or policy.pt and, last, result.json in its folder."""
    folder, start = run.stage_folder(name), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    method, _, who = name.partition("-")
    labels, generated, models = run.flags["pairs"], 0, 1
    torch.manual_seed(run.seed)
    if method == "reward":
        model = train_reward_model(run.reference, run.examples(who), folder, run.seed)
        atomic_save(model.state_dict(), folder / "reward.pt")
    elif method in ("ppo", "reinforce"):
        known = {"true": by_text(world.true_reward), "judge": by_text(world.ai_score)}
        score = known.get(who) or by_model(run.reward_model(f"reward-{who}"))
        policy = run.new_policy()
        history = learn(policy, run.reference, score, run.prompt_ids, Settings(**settings, critic=method == "ppo"), run.seed, name=name)
        evaluate.write_json(history, folder / "history.json")
        labels, generated = labels if who in ("human", "ai") else 0, history[-1]["generated"]
        models = 2 + (method == "ppo") + (who != "true")               # policy and reference, critic, judge
    elif method == "dpo":
        policy = dpo_policy(run, run.examples(who), folder, run.beta, who)
    else:
        baseline = {"preferred": preferred_ft, "unlikelihood": unlikelihood}[method]
        policy = baseline(run.new_policy(), run.examples("human"), folder, run.seed)
    seconds = time.time() - start
    if method == "reward":
        measured = judge_quality(all_scores(model, run.held_out), run.held_out)
    else:
        save_model(policy, folder / "policy.pt", reference=evaluate.fingerprint(run.reference))
        measured = run.measure(policy)
    evaluate.write_json({"cost": {"labels": labels, "generated": generated, "models": models, "seconds": seconds}, "measured": measured},
                        folder / "result.json")


def run_chain(folder, names, settings, device):
    torch.set_num_threads(1)                                           # a process a core: twice as fast as two threads each
    run = Run(folder, device)
    for name in names:
        if run.result(name) is None:
            run_stage(run, name, settings)


def run_chains(run, settings):
    """Run what is not there yet, a process a core, and say what is done."""
    missing = [name for name in STAGES if run.result(name) is None]
    if not missing:
        return
    with processes() as pool, tqdm(total=len(missing), desc="stages", unit="stage", dynamic_ncols=True, disable=False) as bar:
        jobs = [pool.submit(run_chain, run.folder, chain, settings, run.device) for chain in CHAINS]
        while missing:
            concurrent.futures.wait(jobs, timeout=1, return_when=concurrent.futures.FIRST_EXCEPTION)
            for job in jobs:
                if job.done():
                    job.result()                                       # raises what the child raised
            for name in [n for n in missing if run.result(n) is not None]:
                missing.remove(name)
                bar.update()
            bar.set_postfix_str("still to do: " + ", ".join(missing))


@contextlib.contextmanager
def processes():
    """A pool of processes, one a core, without progress bars of their own: the parent's stands for them.

    MALLOC_...: where the C library is glibc, it hands every large buffer back to the system and gets it again for the next
    operation, which costs these small models a twentieth of their time; elsewhere the settings mean nothing."""
    settings = {"TQDM_DISABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2 ** 25), "MALLOC_TRIM_THRESHOLD_": str(2 ** 32)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)                                        # read by the children as they start
    try:
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def dpo_seconds(run):
    """How long train.py's DPO stage took, from its own log of speeds."""
    seconds, before = 0.0, -1
    for r in evaluate.read_jsonl(run.folder / "metrics.jsonl"):
        if r["stage"] == "dpo" and "pairs_per_second" in r:
            seconds, before = seconds + (r["step"] - before) * run.flags["batch_size"] / r["pairs_per_second"], r["step"]
    return seconds


TITLES = {"reference": "reference (SFT)",
          "ppo-human": "RLHF: human labels, reward model, PPO", "ppo-ai": "RLAIF: AI labels, reward model, PPO",
          "ppo-judge": "d-RLAIF: PPO on the judge's scores", "dpo": "DPO on human labels", "plain": "DPO on human labels, Eq. 7 alone",
          "dpo-ai": "DPO on AI labels", "reinforce-human": "REINFORCE++ on the reward model", "ppo-true": "PPO on the true reward",
          "preferred-ft": "Preferred-FT", "unlikelihood": "Unlikelihood, alpha = 0.1", "best-of-16": "best of 16 by the reward model",
          "best-of-128": "best of 128 by the reward model", "optimum-learned": "optimum for the reward model",
          "optimum-judge": "optimum for the AI judge", "optimum": "optimum (pi*)"}


def compare(run):
    """Every row of the comparison, {name: measurements}, and what the reward models are worth. Exact, on held-out prompts."""
    ref = run.ref_logps
    measure = lambda logps: evaluate.measure(logps, ref, run.beta)
    none = {"labels": 0, "generated": 0, "models": 1, "seconds": 0.0}
    label = none | {"labels": run.flags["pairs"]}
    rows = {"reference": measure(ref) | none}
    for name in ("dpo", "plain"):
        if name in run.models:
            rows[name] = run.measure(run.models[name]) | label | {"seconds": dpo_seconds(run)}
    for name in STAGES:
        if name.startswith("reward"):
            continue
        rows[name] = run.result(name)["measured"] | run.result(name)["cost"]
        if name in ("ppo-human", "ppo-ai", "reinforce-human"):         # with their reward model's time
            rows[name]["seconds"] += run.result("reward-" + name.rpartition("-")[2])["cost"]["seconds"]
    scores = all_scores(run.reward_model("reward-human"), run.held_out)
    for n in (16, 128):                                                # over the reference's well-formed text
        best = torch.stack([tabular.best_of_n(q, s, n) for q, s in zip(world.normalise(ref), scores)])
        seconds = run.result("reward-human")["cost"]["seconds"]
        rows[f"best-of-{n}"] = measure(best) | label | {"models": 2, "generated": n, "seconds": seconds}
    judge = world.rewards(run.held_out, world.responses(), world.ai_score)
    for name, tilt, labels in (("optimum-learned", scores, run.flags["pairs"]), ("optimum-judge", judge, 0)):
        tilted = world.optimal_policy(world.normalise(ref), tilt, run.beta)
        rows[name] = measure(tilted) | none | {"labels": labels, "models": 0}
    rows["optimum"] = evaluate.optimum(ref, run.beta, run.beta) | none | {"models": 0}
    quality = {who: run.result(f"reward-{who}")["measured"] for who in ("human", "ai")}
    quality["judge"] = judge_quality(judge, run.held_out)
    return {"beta": run.beta, "rows": rows, "reward_models": quality}


def comparison_table(comparison):
    rows, best = comparison["rows"], comparison["rows"]["optimum"]["objective"]
    lines = [f"{'held-out prompts, exact':<40}{'labels':>8}{'samples':>9}{'models':>8}{'seconds':>9}{'reward':>9}{'KL':>8}{'J':>8}"
             f"{'J/J*':>8}{'well-f.':>9}{'J, all':>9}"]
    for name, title in TITLES.items():
        if name in rows:
            r = rows[name]
            samples = f"{r['generated']:,}" + ("/ans" if name.startswith("best") else "")
            lines.append(f"{title:<40}{r['labels']:>8,}{samples:>9}{r['models']:>8}{r['seconds']:>9.0f}{r['reward']:>9.3f}{r['kl']:>8.3f}"
                         f"{r['objective']:>8.3f}{r['objective'] / best:>8.1%}{r['wellformed']:>9.1%}{r['objective_all']:>9.3f}")
    q = comparison["reward_models"]
    lines += ["", "labels: pairs compared by the annotator. samples: responses generated (best-of-N: for every answer). models: in memory",
              "while training. seconds: with the reward model's, chains side by side. reward, KL (nats), J = E[r*] - beta KL: over",
              "well-formed text. J, all: ill-formed text counted at its low reward."]
    judges = {"human": "The reward model, human labels,", "ai": "The reward model, AI labels,", "judge": "The AI judge itself"}
    for who, name in judges.items():
        lines.append(f"{name:<32} ranks {q[who]['accuracy']:.1%} of human labels rightly (ceiling {q[who]['ceiling']:.1%}); "
                     f"Spearman with r* {q[who]['spearman']:.3f}; calibration error {q[who]['calibration_error']:.3f}")
    return "\n".join(lines)


def plot_plane(comparison, ref_logps, path):
    """Every row on the reward-KL plane, under the exact frontier."""
    plt = evaluate.plotting()
    r, ref, rows = evaluate.held_out_rewards(), world.normalise(ref_logps), comparison["rows"]
    far = 1.25 * max(row["kl"] for row in rows.values())
    kl, reward = world.frontier(ref, r, torch.logspace(2, math.log10(world.beta_at_kl(ref, r, far)), 80).tolist())
    fig, (whole, near) = plt.subplots(1, 2, figsize=(10.5, 5.6), layout="constrained")
    look = {"reference": ("D", "#000000"), "ppo-human": ("o", "#E69F00"), "ppo-ai": ("o", "#56B4E9"), "ppo-judge": ("s", "#56B4E9"),
            "dpo": ("o", "#0072B2"), "plain": ("s", "#D55E00"), "dpo-ai": ("^", "#0072B2"), "reinforce-human": ("^", "#E69F00"),
            "ppo-true": ("P", "#009E73"), "preferred-ft": ("v", "#CC79A7"), "unlikelihood": ("X", "#CC79A7"),
            "best-of-16": ("<", "#999999"), "best-of-128": (">", "#999999"), "optimum": ("*", "#009E73")}
    for ax in (whole, near):
        ax.plot(kl, reward, color=evaluate.COLOURS["optimum"], lw=2, label="frontier: no policy is above it (exact)")
        for name, (marker, colour) in look.items():
            if name in rows:
                row = rows[name]
                ax.plot(row["kl"], row["reward"], marker, ms=13 if marker == "*" else 7, color=colour, mec="white", mew=0.6, ls="",
                        zorder=2 if marker == "*" else 3, label=f"{TITLES[name]} ({row['wellformed']:.0%} well-formed)")
        ax.set_xlabel("KL(policy || reference), nats a response")
    whole.set_ylabel("true reward E[r*]")
    whole.set_title("held-out prompts, well-formed text, exact", fontsize=9)
    star = rows["optimum"]
    near.set_xlim(0.3 * star["kl"], 1.3 * star["kl"])
    near.set_ylim(0.5 * star["reward"], 1.15 * star["reward"])
    near.set_title("the same, near the optimum", fontsize=9)
    fig.legend(*whole.get_legend_handles_labels(), fontsize=7.5, loc="outside lower center", ncols=3)
    evaluate.save_figure(fig, path)
    plt.close(fig)


def main(argv=None):
    start = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="the folder of a finished toy run of train.py (its --out-dir)")
    parser.add_argument("--samples", type=int, default=Settings.samples,
                        help="responses generated in each policy learning: more comes closer to the optimum and takes longer "
                             "(default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="cpu",
                        help="for a model this small the CPU is the fastest (default: cpu)")
    args = parser.parse_args(argv)
    if args.samples < Settings.batch_size:
        parser.error(f"--samples {args.samples} must be at least {Settings.batch_size}, one batch")
    run = Run(args.dir, train.pick_device(args.device))
    asked = {"samples": args.samples, "beta": run.beta}
    settings, file = asdict(Settings(**asked)), run.folder / "rlhf" / "settings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    different = [f"{key} = {before.get(key)}, not {value}" for key, value in settings.items() if before.get(key) != value]
    if different:
        raise SystemExit(f"{file.parent} holds stages made with {'; '.join(different)}: remove that folder to begin anew")
    file.parent.mkdir(exist_ok=True)
    evaluate.write_json(settings, file)
    run_chains(run, asked)
    comparison = compare(run) | {"settings": asked}
    print("\n" + comparison_table(comparison))
    plot_plane(comparison, run.ref_logps, run.folder / "rlhf.png")
    torch.manual_seed(run.seed)
    evaluate.show_answers({"sft": run.reference, "dpo": run.models["dpo"], "ppo": run.policy("ppo-human")}, run.tokenizer, run.held_out[2])
    comparison["seconds"] = time.time() - start
    evaluate.write_json(comparison, run.folder / "rlhf.json")
    print(f"\nFigure: {run.folder / 'rlhf.png'}. Done in {comparison['seconds']:.0f} s.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command continues with the stages that are not finished.")
