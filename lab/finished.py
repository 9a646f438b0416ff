"""A finished toy run of train.py, and what the pieces of work on it share."""
import copy
from functools import cached_property
from pathlib import Path

import data
import evaluate
import train
import world
from lab.judges import by_text
from losses import LIKELY
from rlhf import RewardModel, by_model
from support import checkpoints, toy_data
from support.flags import dpo_settings
from support.likely import LikelyTokens
from support.run import Run, load_toy_run


class Finished:
    """The reference, the prompts and the pairs of a run, and what was trained from them."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = Path(folder), device
        self.flags, self.tokenizer, self.models = load_toy_run(folder, device)
        self.seed, self.beta = self.flags["seed"], self.flags["beta"]
        self.reference = self.models["sft"].requires_grad_(False)
        self.train_prompts, self.held_out = world.prompts()
        self.prompt_ids = [self.tokenizer.encode_ordinary(x) for x in self.train_prompts]

    def examples(self, annotator):
        """The run's own pairs, labelled by an annotator. The responses are the same for each."""
        pairs = data.make_preferences(self.flags["pairs"], annotator, self.seed)
        return data.tokenize(pairs, self.tokenizer)[0]

    @cached_property
    def ref_logps(self):
        return evaluate.exact_logps(self.reference, self.held_out)  # (P, N)

    @cached_property
    def train_ref_logps(self):
        return evaluate.exact_logps(self.reference, self.train_prompts)  # (P, N)

    def measure(self, policy):
        """evaluate.measure of a GPT, exact, on the held-out prompts."""
        logps = evaluate.exact_logps(policy, self.held_out)  # (P, N)
        return evaluate.measure(logps, self.ref_logps, self.beta)

    def new_policy(self):
        return copy.deepcopy(self.reference).requires_grad_(True)

    def policy(self, name):
        """A policy by name: "reference", "dpo", or one that lab.compare has trained."""
        if name in ("reference", "dpo"):
            return self.models["sft" if name == "reference" else name]
        file = self.folder / "rlhf" / name / "policy.pt"
        return checkpoints.load_model(file, self.device)[0].eval()

    def reward_model(self, annotator):
        """The reward model that lab.compare has fitted to an annotator's labels."""
        model = RewardModel(self.reference).to(self.device)
        file = self.folder / "rlhf" / f"reward-{annotator}" / "reward.pt"
        model.load_state_dict(checkpoints.load(file, self.device))
        return model.requires_grad_(False).eval()

    def score(self, judge):
        """Who scores the answers in policy learning: "true" is the true reward, "judge" the AI
        judge itself. "human" and "ai" are the reward models fitted to their labels."""
        if judge in ("true", "judge"):
            return by_text(world.true_reward if judge == "true" else world.ai_score)
        return by_model(self.reward_model(judge))

    def dpo(self, examples, folder, annotator="human", reference=None, **settings):
        """A policy trained by DPO as train.py does it, with the run's flags.

        examples: other pairs. settings: other arguments of train.train_dpo than the flags say.
        """
        reference = reference or self.reference
        policy = copy.deepcopy(reference).requires_grad_(True)
        likely = LikelyTokens(LIKELY)
        ref_logps = train.reference_logps(reference, examples, 512, likely)
        settings = dpo_settings(self.flags) | settings
        train.train_dpo(policy, examples, ref_logps, Run(folder), likely=likely,
                        ceiling=toy_data.ceiling(annotator), **settings)
        return policy
