"""What the tests share: a fresh seed for each, a tiny model with a batch, and one small run."""
import os
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn into files: no window is needed


@pytest.fixture(autouse=True)
def fresh_seed(request):
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture
def tiny():
    """A tiny GPT in float64 and a batch of 3 pairs. Their rewards differ, and so do the weights
    of the three pairs in the gradient."""
    torch.manual_seed(3)
    config = GPTConfig(block_size=7, vocab_size=9, n_layer=1, n_head=2, n_embd=4)
    policy = GPT(config).double()
    tokens = torch.randint(9, (6, 7))
    tokens[3:, :2] = tokens[:3, :2]  # both responses of a pair answer the same prompt
    lengths = torch.tensor([5, 3, 4, 2, 5, 1])
    position = torch.arange(7)
    mask = (position >= 2) & (position < 2 + lengths[:, None])
    batch = {"tokens": tokens, "response_mask": mask,
             "ref_chosen_logps": torch.randn(3).double() * 3 - 8,
             "ref_rejected_logps": torch.randn(3).double() * 3 - 8}
    return policy, batch


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a finished toy run that takes seconds: 640 SFT texts, 256 pairs, plain DPO
    and DPO."""
    import train  # only here: most tests need no training and no figures
    out = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SFT_TEXTS", 640)
        train.main(["--out-dir", str(out), "--pairs", "256", "--epochs", "1",
                    "--batch-size", "32", "--n-embd", "32", "--device", "cpu"])
    return out
