"""What the tests share: the project on the path, no network, and one small finished run."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_seed(request):
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture
def tiny():
    """A tiny GPT in float64 and a batch of 3 pairs whose rewards disagree, so that no two weights are alike."""
    torch.manual_seed(3)
    policy = GPT(GPTConfig(block_size=7, vocab_size=9, n_layer=1, n_head=2, n_embd=8)).double()
    tokens, position = torch.randint(9, (6, 7)), torch.arange(7)
    tokens[3:, :2] = tokens[:3, :2]
    mask = (position >= 2) & (position < 2 + torch.tensor([5, 3, 4, 2, 5, 1])[:, None])
    batch = {"tokens": tokens, "response_mask": mask, "ref_chosen_logps": torch.randn(3).double() * 3 - 8,
             "ref_rejected_logps": torch.randn(3).double() * 3 - 8}
    return policy, batch


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a finished toy run, a few seconds' worth: 640 SFT texts, 256 pairs, both DPO stages."""
    out = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SFT_TEXTS", 640)
        train.main(["--out-dir", str(out), "--pairs", "256", "--epochs", "1", "--batch-size", "32", "--n-embd", "32",
                    "--device", "cpu"])
    return out
