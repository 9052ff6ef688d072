"""What lies between a caller's tensors and the host memory an operation works on."""

import threading

import pytest
import torch
from torch import Tensor

from elastic_run.collectives.staging import Staging, side_by_side

needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
DEVICES = ["cpu", pytest.param("accelerator", marks=needs_accelerator)]


def on(device: str, tensor: Tensor) -> Tensor:
    return tensor if device == "cpu" else tensor.to(torch.accelerator.current_accelerator())


def test_a_cpu_tensor_is_handed_through_as_it_is() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    staging = Staging()
    for host in (staging.read(tensor), staging.write(tensor), staging.update(tensor)):
        assert host.data_ptr() == tensor.data_ptr()
        assert host.stride() == tensor.stride()
    assert not staging.needed


def test_what_requires_a_gradient_is_handed_through_without_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    host = Staging().update(parameter)
    host.add_(1)
    assert parameter.tolist() == [2, 2, 2]
    assert not host.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_staged_tensor_changes_only_at_the_end(device: str) -> None:
    tensor = on(device, torch.arange(6.0).view(2, 3).t())
    staging = Staging(always=True)
    host = staging.update(tensor)
    staging.ready()
    assert host.device.type == "cpu"
    assert host.tolist() == [[0, 3], [1, 4], [2, 5]]
    host.mul_(10)
    assert tensor.cpu().tolist() == [[0, 3], [1, 4], [2, 5]]
    staging.finish(other_thread=True)
    assert tensor.cpu().tolist() == [[0, 30], [10, 40], [20, 50]]


@pytest.mark.parametrize("device", DEVICES)
def test_without_finish_nothing_is_written_back(device: str) -> None:
    tensor = on(device, torch.zeros(4))
    staging = Staging(always=True)
    staging.write(tensor).fill_(7)
    staging.write_list([tensor]).fill_(7)
    staging.ready()
    assert tensor.cpu().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_only_read_is_not_written_back(device: str) -> None:
    tensor = on(device, torch.ones(4))
    staging = Staging(always=True)
    host = staging.read(tensor)
    staging.ready()
    host.fill_(7)
    staging.finish(other_thread=True)
    assert tensor.cpu().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_a_list_is_one_run_of_elements_and_comes_back_as_a_list(device: str) -> None:
    tensors = [on(device, torch.full((2, i), float(i))) for i in range(4)]
    staging = Staging(always=device != "cpu")
    source = staging.read_list(tensors)
    target = staging.write_list(tensors)
    staging.ready()
    assert source.tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    target.copy_(torch.arange(12.0))
    staging.finish(other_thread=True)
    assert [tensor.flatten().cpu().tolist() for tensor in tensors] == [[], [0, 1], [2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert staging.needed


def test_neighbours_in_memory_are_used_where_they_lie() -> None:
    whole = torch.arange(12.0)
    staging = Staging()
    flat = staging.write_list(list(whole[2:].view(5, 2).unbind()))
    assert flat.data_ptr() == whole[2:].data_ptr()
    assert flat.tolist() == list(range(2, 12))
    assert not staging.needed


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(4)[:2], torch.zeros(4)[2:]],
        list(reversed(torch.zeros(4).chunk(2))),
        list(torch.zeros(4, 2).t().chunk(2)),
        list(torch.zeros(8).split([2, 1, 2, 3])[::2]),
        [torch.zeros(0), torch.zeros(0)],
    ],
)
def test_what_does_not_lie_side_by_side_is_copied(tensors: list[Tensor]) -> None:
    assert side_by_side(tensors) is None
    Staging().write_list(tensors).fill_(1)
    assert not any(tensor.any() for tensor in tensors)


def test_finish_from_two_threads_writes_back_once_and_both_may_use_the_result() -> None:
    tensor = torch.zeros(1_000_000)
    staging = Staging(always=True)
    staging.write(tensor).fill_(1)
    seen: list[bool] = []

    def finish() -> None:
        staging.finish(other_thread=True)
        seen.append(bool(tensor.all()))

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4
    tensor.zero_()
    staging.finish()
    assert not tensor.any()
