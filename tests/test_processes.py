"""support/processes.py where there is one process, and what it refuses. Two processes are proved to
be as good as one in test_accidents.py."""
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
