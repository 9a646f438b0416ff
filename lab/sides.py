"""The sides that lab/bench.py lets take turns: DPO here and in TRL, generation here and in
transformers. Each works in a process of its own, and takes next(orders) before every step."""
import json
import math
import os
import random
import sys
import time

import torch

import data
import train
from model import GPT
from support import machine, run

try:
    import resource
except ImportError:
    resource = None  # Windows does not have it

STEPS = 20  # whose losses are compared; as many batches differ
TEXTS, NEW = 64, 64  # texts that are made at once, and new tokens of each
LR, BETA = 2e-5, 0.1


def work():
    """Be the side that `take_turns` has started."""
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(task["threads"])
    losses = []
    with machine.precision_of(task["dtype"], task["device"]):
        globals()[task["side"]](task, orders(answers, losses, task["device"]), losses)


def orders(answers, losses, device):
    """An order is a line with a number k. Yields k times, then answers it."""
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            yield
        seconds = since(start, device)
        answer = {"seconds": seconds, "losses": list(map(float, losses)), "memory": memory(device)}
        print(json.dumps(answer), file=answers, flush=True)
        losses.clear()
    raise SystemExit


def since(start, device):
    getattr(torch, device).synchronize()
    return time.perf_counter() - start


def memory(device):
    """The most bytes that this process has held, or None where the system does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def texts(shape, lengths):
    """Random tokens, a list for each length. They are the same in every process."""
    generator = random.Random(0)
    return [generator.choices(range(shape["vocab"]), k=n) for n in lengths]


def pairs(shape):
    """(examples for STEPS batches, the batches in the order in which train_dpo takes them)"""
    lengths = [shape["prompt"], shape["response"], shape["response"]]
    tokens = iter(texts(shape, lengths * shape["pairs"] * STEPS))
    examples = [data.Example(*three) for three in zip(tokens, tokens, tokens)]
    return examples, data.epochs([len(e) for e in examples], shape["pairs"], seed=0, n=1)


def dpo(task, orders, losses):
    run.SAVE_EVERY = math.inf  # TRL saves nothing either
    policy = GPT.from_pretrained(task["weights"]).to(task["device"]).eval()
    examples, _ = pairs(task["shape"])
    batch, paced = task["shape"]["pairs"], run.Run(task["folder"])
    steps = paced.steps

    def with_orders(stage, model, optimizer, *others):
        for step in steps(stage, model, optimizer, *others):
            for group in optimizer.param_groups:
                group["lr"] = LR  # constant, as TRL's
            next(orders)
            yield step
            losses.append(paced.losses[0])

    paced.steps = with_orders
    ref = train.reference_logps(policy, examples, batch)
    train.train_dpo(policy, examples, ref, paced, beta=BETA, epochs=501, batch_size=batch, lr=LR,
                    seed=0)


def trl(task, orders, losses):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Pace(TrainerCallback):
        def on_step_begin(self, *_, **__):
            next(orders)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # these are tokens already

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    examples, plan = pairs(task["shape"])
    rows = []
    for e in (examples[i] for batch in plan for i in batch):
        rows.append({"prompt_ids": e.prompt, "chosen_ids": e.chosen, "rejected_ids": e.rejected})
    config = DPOConfig(task["folder"], per_device_train_batch_size=task["shape"]["pairs"],
                       use_cpu=task["device"] == "cpu", bf16=task["dtype"] == "bfloat16",
                       **task["settings"])
    Trainer(task["weights"], args=config, train_dataset=Dataset.from_list(rows),
            callbacks=[Pace()]).train()


def generate(task, orders, losses):
    model = GPT.from_pretrained(task["weights"]).to(task["device"])
    prompts = texts(task["shape"], [task["shape"]["prompt"]] * TEXTS)
    for _ in orders:
        model.generate(prompts, NEW, temperature=0)


def transformers(task, orders, losses):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(task["weights"]).to(task["device"])
    model.generation_config.eos_token_id = None  # all texts have NEW tokens
    prompts = texts(task["shape"], [task["shape"]["prompt"]] * TEXTS)
    prompts = torch.tensor(prompts, device=task["device"])  # (B, T)
    for _ in orders:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW,
                       do_sample=False, use_cache=True)
