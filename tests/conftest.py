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


@pytest.fixture(autouse=True)
def fresh_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a finished toy run, a few seconds' worth: 640 SFT texts, 256 pairs, both DPO stages."""
    out = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SFT_TEXTS", 640)
        train.main(["--out-dir", str(out), "--pairs", "256", "--epochs", "1", "--batch-size", "32", "--n-embd", "32",
                    "--device", "cpu"])
    return out
