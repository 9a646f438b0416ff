"""support/processes.py where there is one process, and what it refuses. Two processes are proved to
be as good as one in test_accidents.py."""
import threading
from functools import partial

import pytest
import torch

from support import processes


def test_one_process_is_the_first_and_has_all_the_work():
    tensor, model = torch.tensor([1.0, 2.0]), torch.nn.Linear(2, 1)
    assert processes.join("cpu") == "cpu"
    assert (processes.size(), processes.rank(), processes.leave()) == (1, 0, True)
    assert processes.mine([3, 1, 2]) == [3, 1, 2]
    processes.add_up(tensor)
    processes.add_up_gradients(model)
    assert tensor.tolist() == [1, 2] and model.weight.grad is None
    assert processes.add_up_numbers({"loss": 0.5}) == {"loss": 0.5}
    assert processes.any_of(True) and not processes.any_of(False)


@pytest.mark.parametrize("device, said", [
    ("mps", "processes cannot share --device mps; add --device cpu"),
    ("cuda", "2 processes need 2 GPUs, and this machine has 1; lower --nproc_per_node"),
])
def test_devices_that_processes_cannot_share_are_refused(device, said, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=said):
        processes.join(device)


def test_trainings_side_by_side_are_those_one_after_the_other():
    """On a CPU two jobs are at work at the same time, with a core each. The weights are those of
    the same jobs done in turn, to the bit; in turn is how a GPU gets them. The number of threads
    is put back. What a job raises is raised."""
    threads, both, results = torch.get_num_threads(), threading.Barrier(2), {}

    def job(name, seed, meet=True):
        if meet:
            both.wait(timeout=60)  # it breaks where the other job is not at work
            assert torch.get_num_threads() == 1
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(40, 40, generator=generator, requires_grad=True)
        optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
        for _ in range(50):
            ((w @ w).tanh().sum(0) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results[name] = w.detach()
    processes.side_by_side([partial(job, seed, seed) for seed in (1, 2)], "cpu")
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    processes.side_by_side([partial(job, -seed, seed, False) for seed in (1, 2)], "cuda")
    torch.set_num_threads(threads)
    assert list(results)[2:] == [-1, -2], "a GPU does one job after the other"
    for seed in (1, 2):
        assert torch.equal(results[seed], results[-seed])
    with pytest.raises(KeyError):
        processes.side_by_side([int, {}.popitem], "cpu")
    assert torch.get_num_threads() == threads
