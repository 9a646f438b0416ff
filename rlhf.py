"""RLHF: the pipeline that DPO replaces, as small and as real as dpo.py.

    python rlhf.py DIR     DIR: a finished toy run of train.py

1. A reward model is fitted to the pairs that DPO uses (Eq. 2).
2. Policy learning goes through a loop (Eq. 3): sample a prompt, let
   the policy answer, score the answer, update the policy. PPO,
   https://arxiv.org/abs/1707.06347, does it with a critic and a
   clipped ratio; REINFORCE++, 2501.03262, without a critic. The
   mathematics of both is in ppo.py.
Equation numbers are those of the DPO paper, 2305.18290v3.

B responses, T tokens, S = T - 1 predictions: entry t of a (B,S)
tensor is about token t+1. mask (B,S) is true where that token belongs
to the response, EOS included. Every response token is an action. Its
state is the prompt and the response so far.
"""
import argparse
import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import evaluate
import world
from model import response_logits
from ppo import gae, last_true, normalise, ppo_loss, reward_to_go, token_rewards, value_loss
from support import checkpoints, command, show
from support.flags import number
from support.run import Run, load_toy_run

MAX_NEW_TOKENS = 16  # the longest review has 14 tokens, EOS included
UNFINISHED = world.ILL_FORMED_REWARD  # the score of a response without EOS: no judge knows one


class ScalarModel(nn.Module):
    """A critic: a GPT's body with one number at each position. It begins
    with the GPT's weights and says 0 everywhere."""

    def __init__(self, gpt):
        super().__init__()
        self.body = copy.deepcopy(gpt).requires_grad_(True)
        self.scalar = nn.Linear(gpt.config.n_embd, 1).to(gpt.wte.weight)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens, needed=None):
        """tokens (B,T) -> (B,T), see `GPT.hidden`"""
        return self.scalar(self.body.hidden(tokens, needed=needed)).squeeze(-1)


# ---- 1. The reward model

class RewardModel(ScalarModel):
    """r(x, y): one number for a whole response.

    read = "tokens" sums the numbers at all tokens of the response.
    read = "end" takes the number at EOS, as is usual. A large model can
    be read at the last token alone. A one-layer model cannot: its last
    position attends to all words at once and does not know which of
    them a "not" came before. Summing over positions lets each token
    contribute where its context is visible. DPO's implicit reward, a sum
    of log-ratios, is of this kind too.
    """

    def __init__(self, gpt, read="tokens"):
        super().__init__(gpt)
        self.read = read
        self.register_buffer("shift", torch.zeros(()))  # set by train_reward_model

    def forward(self, tokens, response_mask):
        """tokens, response_mask (B,T) -> (B,)"""
        values = super().forward(tokens, response_mask)  # (B, T)
        if self.read == "tokens":
            return torch.where(response_mask, values, 0.0).sum(1) - self.shift
        last = last_true(response_mask)  # (B,)
        return values.gather(1, last[:, None]).squeeze(1) - self.shift


def reward_model_loss(chosen_scores, rejected_scores):
    """-log sigma(r(x,y_w) - r(x,y_l)), Eq. 2, of each pair, in nats. (B,), (B,) -> (B,)"""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def train_reward_model(reference, examples, run, seed, epochs=4, lr=1.5e-3, batch_size=64,
                       read="tokens"):
    """Fit a RewardModel, begun at the reference's weights, to pairs: Eq. 2.

    Returns it frozen. Its mean score over some pairs is shifted to 0. The
    loss knows only differences, but the fixed score UNFINISHED must fit.
    """
    model = RewardModel(reference, read).eval()
    device = model.scalar.weight.device

    def scores_of(indices):
        batch = data.collate([examples[i] for i in indices], device=device)
        return model(batch["tokens"], batch["response_mask"]).chunk(2)  # (B,), (B,)

    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    plan = data.epochs([len(e) for e in examples], batch_size, seed, epochs)
    show_on_bar = "loss", "accuracy"
    for _, [(_, indices)] in run.steps("reward", model, optimizer, plan, show=show_on_bar):
        chosen, rejected = scores_of(indices)  # (B,), (B,)
        loss = reward_model_loss(chosen, rejected).mean()
        loss.backward()
        right = (chosen > rejected) + 0.5 * (chosen == rejected)  # (B,): a tie counts 1/2
        run.log(loss=loss, accuracy=right.mean())
        run.log(grad_norm=clip_grad_norm_(model.parameters(), 10.0))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        some = range(min(len(examples), 4096))
        model.shift += torch.cat(scores_of(some)).mean()
    return model.requires_grad_(False)


# ---- 2. Policy learning

def response_token_logps(model, tokens, mask):
    """log pi(y_t | x, y_<t) where mask (B,S) is true, else 0. (B,S)

    It is dpo.token_logps at a lower price, see `model.response_logits`.
    """
    first = torch.zeros_like(mask[:, :1])  # no token is predicted by nothing
    logits, targets, _ = response_logits(model, tokens, torch.cat([first, mask], 1))
    logps = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)  # (B, S)
    return zeros.masked_scatter(mask, logps)


@dataclass
class Settings:
    """How the policy is learned. These values came closest to the optimum
    on the train prompts, in about fifteen trials on two or three seeds."""
    beta: float = 1.0  # the leash of Eq. 3; a larger beta gives a smaller KL
    target_kl: float | None = None  # nats a response; beta is steered so that the KL comes to this
    samples: int = 40_960  # responses generated in all
    batch_size: int = 512  # responses generated with one policy, before it is updated
    minibatch_size: int = 64  # responses an update
    epochs: int = 2  # passes over a batch; later passes learn from staler samples
    lr: float = 2e-3  # near the limit: with 2,500 labels, one run of three falls apart
    critic: bool = True  # False is REINFORCE++: the advantage is the reward to go
    critic_lr: float = 3e-3
    # From here on: the details that are said to matter. Each is a switch.
    gamma: float = 1.0  # below 1 the objective is no longer that of Eq. 3
    lam: float = 1.0  # responses are short: the critic's bias would cost more than noise does
    clip: float | None = 0.1  # of the ratio; None is no clip
    normalise_advantages: bool = True
    clip_values: float | None = None
    scale_rewards: bool = False  # divide rewards by the running deviation of the returns
    anneal_lr: bool = True  # linearly to 0
    max_grad_norm: float | None = 1.0  # of each network's gradient; None is no clip


def by_model(reward_model):
    """A scoring function for `learn`, from a reward model."""
    device, eos = reward_model.scalar.weight.device, data.get_tokenizer("toy").eot_token

    @torch.no_grad()
    def scores(prompts, responses):
        tokens, mask = data.pad(prompts, responses)  # (B, T), (B, T)
        values = reward_model(tokens.to(device), mask.to(device)).cpu()  # (B,)
        ended = torch.tensor([y[-1] == eos for y in responses])  # (B,)
        return torch.where(ended, values, UNFINISHED)
    return scores


@torch.no_grad()
def rollout(policy, reference, critic, score, prompts, beta):
    """Let the policy answer prompts (lists of token ids); score the answers.

    Returns a dict: tokens (B,T); mask, logps, rewards and, with a critic,
    values (B,S); scores and kl, an estimate of KL(pi || ref), (B,).
    """
    device = next(policy.parameters()).device
    eos = data.get_tokenizer("toy").eot_token
    responses = policy.generate(prompts, MAX_NEW_TOKENS, eos_id=eos)
    tokens, mask = data.pad(prompts, responses)  # (B, T), (B, T)
    tokens, mask = tokens.to(device), mask[:, 1:].to(device)  # (B, T), (B, S)
    scores = score(prompts, responses).to(device)  # (B,)
    logps = response_token_logps(policy, tokens, mask)  # (B, S)
    ref_logps = response_token_logps(reference, tokens, mask)  # (B, S)
    batch = {"tokens": tokens, "mask": mask, "logps": logps, "scores": scores,
             "rewards": token_rewards(scores, logps, ref_logps, mask, beta),  # (B, S)
             "kl": (logps - ref_logps).sum(-1)}  # (B,)
    if critic is not None:
        batch["values"] = critic(tokens[:, :-1], mask)  # (B, S)
    return batch


def learn(policy, reference, score, prompts, settings, seed=0, at_step=None, name="ppo"):
    """Sample prompts, generate, score, update, until settings.samples.

    policy: a GPT, changed in place. reference: a GPT, frozen.
    score(prompts, responses) -> (B,): who judges lists of token ids.
    at_step(generated): called before the first batch and after each.
    Returns a dict of means for each batch. Raises ValueError for a frozen
    policy, and for fewer samples than one batch.
    """
    s, device = settings, next(policy.parameters()).device
    if not all(p.requires_grad for p in policy.parameters()):
        raise ValueError("the policy is frozen; call policy.requires_grad_(True) first")
    if s.samples < s.batch_size:
        raise ValueError(f"samples={s.samples} is less than one batch, batch_size={s.batch_size}")
    choose = torch.Generator().manual_seed(seed)  # of prompts and minibatches
    torch.manual_seed(seed)  # of generation
    critic = ScalarModel(reference).to(device) if s.critic else None
    groups = [{"params": list(policy.parameters()), "lr": s.lr}]
    if critic is not None:
        groups.append({"params": list(critic.parameters()), "lr": s.critic_lr})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)
    beta, history, squares = s.beta, [], []
    batches = s.samples // s.batch_size
    if at_step:
        at_step(0)
    bar = tqdm(range(batches), desc=f"{name:>16}", unit="batch", dynamic_ncols=True)
    for k in bar:
        # sample prompts, generate, score
        which = torch.randint(len(prompts), (s.batch_size,), generator=choose).tolist()
        batch = rollout(policy, reference, critic, score, [prompts[i] for i in which], beta)
        mask, rewards = batch["mask"], batch["rewards"]  # (B, S)
        if s.scale_rewards:  # all by one number, so the optimum stays where it is
            returns = rewards.sum(-1)  # (B,)
            squares.append((returns - returns.mean()).square().mean())
            deviation = torch.stack(squares).mean().sqrt()
            rewards = rewards / deviation.clamp(min=0.1)  # scores that are all alike have none
        # how much better was each token than expected?
        if critic is not None:
            advantages = gae(rewards, batch["values"], mask, s.gamma, s.lam)  # (B, S)
            batch["returns"] = advantages + batch["values"]  # (B, S)
        else:
            advantages = reward_to_go(rewards, mask)  # (B, S)
        if s.normalise_advantages:
            advantages = normalise(advantages, mask)
        batch["advantages"] = advantages
        # update, in some passes over the batch
        for group, lr in zip(optimizer.param_groups, (s.lr, s.critic_lr)):
            group["lr"] = lr * (1 - k / batches) if s.anneal_lr else lr
        for _ in range(s.epochs):
            order = torch.randperm(s.batch_size, generator=choose)
            for part in order.split(s.minibatch_size):
                b = {key: value[part.to(device)] for key, value in batch.items()}
                logps = response_token_logps(policy, b["tokens"], b["mask"])  # (b, S)
                loss = ppo_loss(logps, b["logps"], b["advantages"], b["mask"], s.clip)
                if critic is not None:  # two networks: the sum trains each by its own term
                    values = critic(b["tokens"][:, :-1], b["mask"])  # (b, S)
                    loss = loss + value_loss(values, b["values"], b["returns"], b["mask"],
                                             s.clip_values)
                optimizer.zero_grad()
                loss.backward()
                if s.max_grad_norm:
                    for group in groups:
                        clip_grad_norm_(group["params"], s.max_grad_norm)
                optimizer.step()
        row = {"generated": (k + 1) * s.batch_size, "score": batch["scores"].mean().item(),
               "kl": batch["kl"].mean().item(), "beta": beta}
        history.append(row)
        bar.set_postfix_str(f"score={row['score']:.3f}, kl={row['kl']:.3f}, beta={beta:.3f}")
        if s.target_kl is not None:  # https://arxiv.org/abs/1909.08593, section 2.2
            error = row["kl"] / s.target_kl - 1
            beta *= 1 + 0.1 * max(-0.2, min(0.2, error))
        if at_step:
            at_step(row["generated"])
    return history


# ---- The pipeline

def main(argv=None):
    start = time.time()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the folder of a finished toy run of train.py")
    parser.add_argument("--samples", type=number(int, Settings.batch_size, 10_000_000),
                        default=Settings.samples,
                        help="responses to generate (default: %(default)s)")
    args = parser.parse_args(argv)
    flags, tokenizer, models = load_toy_run(args.dir)
    seed, beta, reference = flags["seed"], flags["beta"], models["sft"].requires_grad_(False)
    folder = args.dir / "ppo"
    if (folder / "policy.pt").exists():
        raise SystemExit(f"{folder} holds a policy and is not overwritten; remove it to begin anew")
    train_prompts, held_out = world.prompts()

    # 1. The reward model, from the run's own pairs. 2. The policy, from the reward model's scores.
    pairs = data.make_preferences(flags["pairs"], flags["annotator"], seed)
    examples, _ = data.tokenize(pairs, tokenizer)
    reward_model = train_reward_model(reference, examples, Run(folder), seed)
    policy = copy.deepcopy(reference).requires_grad_(True)
    prompts = [tokenizer.encode_ordinary(x) for x in train_prompts]
    settings = Settings(beta=beta, samples=args.samples)
    learn(policy, reference, by_model(reward_model), prompts, settings, seed)
    checkpoints.save_model(policy, folder / "policy.pt", settings=asdict(settings),
                           reference=checkpoints.fingerprint(reference))

    # Everyone measured in the same way, beside the best policy that is possible.
    ref = evaluate.exact_logps(reference, held_out)  # (P, N)
    rows = {}
    models = {"sft": reference, "dpo": models["dpo"], "ppo": policy}
    for name, model in models.items():
        rows[show.NAMES[name]] = evaluate.measure(evaluate.exact_logps(model, held_out), ref, beta)
    rows["optimum (pi*)"] = evaluate.optimum(ref, beta, beta)
    print("\n" + show.table(rows))
    show.answers(models, tokenizer, held_out[2])
    print(f"\nDone in {time.time() - start:.0f} s. The policy is in {folder / 'policy.pt'}.")


if __name__ == "__main__":
    command.run(main, again="The same command starts again.")
