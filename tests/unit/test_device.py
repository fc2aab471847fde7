"""The CPU host's stand-ins change nothing for code that is not Megatron's. Skipped where there is a GPU: nothing is changed there."""

import pytest
import torch

from megarl.errors import CheckpointError
from megarl.parallel import device

pytestmark = pytest.mark.skipif(device.is_cuda(), reason="a CUDA host needs no stand-ins")
device.prepare()


def test_factories_read_cuda_as_the_cpu_and_nothing_else():
    assert torch.zeros(2, device="cuda").device == torch.tensor([1], device="cuda").device == torch.device("cpu")
    assert torch.ones(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        made = [torch.zeros(1), torch.ones(1), torch.tensor([1.0]), torch.empty(1), torch.full((1,), 2.0)]
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_preparing_twice_changes_nothing_more():
    before = torch.zeros, torch.Tensor.type, torch.cuda.current_device
    device.prepare()
    assert (torch.zeros, torch.Tensor.type, torch.cuda.current_device) == before


def test_types_still_convert():
    tensor = torch.ones(2, dtype=torch.bfloat16)
    assert tensor.type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float32).dtype == tensor.type("torch.FloatTensor").dtype == torch.float32


def test_a_cpu_host_says_what_it_has():
    assert device.device() == torch.device("cpu") == torch.cuda.current_device()
    assert device.process_group_backend() == "gloo"
    assert not device.has_transformer_engine() and not device.has_gradient_accumulation_fusion()
    device.synchronize()


def test_random_states_of_a_gpu_host_are_refused():
    states = device.random_states() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="saved on a GPU host, this is a CPU host"):
        device.restore_random_states(states)
