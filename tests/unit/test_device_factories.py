"""A prepared host keeps torch's own ways: a device context reaches every factory function, a device called "cuda" exists."""

import torch

from megarl.parallel import device


def test_device_context_reaches_the_factories() -> None:
    device.prepare()
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.full((2,), 1.0), torch.arange(2), torch.tensor([1.0]), torch.rand(2)]
    assert all(tensor.is_meta for tensor in made)


def test_cuda_as_a_device_name_means_this_hosts_device() -> None:
    device.prepare()
    assert torch.zeros(2, device="cuda").device.type == device.device().type
