"""What the doctor says of this host, and of hosts made up."""

import json
import socket
from functools import partial
from pathlib import Path

import pytest

from megarl.cli import run
from megarl.errors import SetupError
from megarl.operations import doctor, host, preflight
from megarl.operations.attempts import bad_hosts

NVIDIA = """\
0, NVIDIA H100 80GB HBM3, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, 81559, 20000, 0
2, NVIDIA H100 80GB HBM3, 81559, 4, 3
3, NVIDIA L4, 23034, 4, [N/A]
not a GPU
"""


def status(checks):
    return {check.name: check.status for check in checks}


def test_this_host_passes(tmp_path, capsys):
    assert run(["doctor", "--run", str(tmp_path / "not" / "yet"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"torch", "megatron-core", "vllm", "transformer-engine", "clock", "shared memory", "run directory", "open ports"} <= set(found)
    assert found["torch"]["status"] == "ok" and all(check["status"] != "fault" for check in found.values())
    assert not list(tmp_path.iterdir())


def test_gpus_are_told_apart(monkeypatch):
    gpus = host.parse_gpus(NVIDIA)
    assert [gpu.ecc_errors for gpu in gpus] == [0, 0, 3, None] and gpus[1].used_mib == 20000
    monkeypatch.setattr(host, "ask_gpus", lambda: (NVIDIA, ""))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert status(doctor.accelerators()) == {"GPU 0": "ok", "GPU 1": "warning", "GPU 2": "fault", "GPU 3": "ok"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert status(doctor.accelerators())["CUDA"] == "fault"


def test_a_gpu_that_does_not_answer_is_not_passed_over(monkeypatch):
    lost = "".join(NVIDIA.splitlines(keepends=True)[:1]) + "1, NVIDIA H100 80GB HBM3, [GPU is lost], [GPU is lost], [GPU is lost]\n"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refusal = (NVIDIA[:45], "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error")
    for answer in ((lost, ""), refusal, ("", "exit code 9")):
        monkeypatch.setattr(host, "ask_gpus", partial(tuple, answer))
        assert [check.advice for check in doctor.accelerators() if check.status == "warning"], answer
    monkeypatch.setattr(host, "ask_gpus", lambda: ("", ""))
    assert status(doctor.accelerators()) == {"GPUs": "absent"}


def test_a_host_with_fewer_gpus_than_promised_is_bad(monkeypatch, tmp_path):
    """Before the ranks look for one another: those without a GPU could not answer."""
    environment = {"SLURMD_NODENAME": "n3", "LOCAL_WORLD_SIZE": "8", "SLURM_GPUS_ON_NODE": "8", "LOCAL_RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    for rank in "0123":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SetupError, match="n3 shows 7 GPUs, expected 8"):
            preflight.count_gpus(tmp_path)
    assert bad_hosts(tmp_path) == ["n3"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    preflight.count_gpus(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")  # more than any host has: the user's mistake, which the layout's check refuses
    preflight.count_gpus(tmp_path)


def test_every_rank_looks_at_its_own_gpu_alone(monkeypatch):
    looked = []
    monkeypatch.setattr(preflight.device, "is_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 5)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: looked.append(index) or (60 << 30, 80 << 30))
    assert "only 60 of 80 GiB of GPU 5 are free" in preflight.faults_of_this_gpu()[0] and looked == [5]


def test_preflight_wants_room_on_disks(monkeypatch, tmp_path):
    assert preflight.faults_of_this_host(tmp_path) == []
    monkeypatch.setattr(host, "free_bytes", lambda path: 10 << 20)
    assert sum("of the disk of" in fault for fault in preflight.faults_of_this_host(tmp_path)) == 2


def test_what_is_short_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "free_bytes", lambda path: 1 << 20)
    monkeypatch.setattr(host, "clock_error_s", lambda: None)
    monkeypatch.setattr(host, "own_address", lambda: "127.0.1.1")
    said = doctor.memory() + doctor.disks(tmp_path) + doctor.clock() + doctor.network()
    assert {check.name for check in said if check.status == "warning"} >= {"shared memory", f"disk of {tmp_path}", "clock", "host name"}
    assert all(check.advice for check in said if check.status == "warning")


def test_a_directory_that_cannot_be_written_is_a_fault(monkeypatch, tmp_path, capsys):
    def refuse(directory):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(host, "time_of_write", refuse)
    assert status(doctor.writable(tmp_path)) == {"run directory": "fault"}
    assert run(["doctor", "--run", str(tmp_path)]) == 1
    assert "cannot be written: Permission denied" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux")
def test_ports_on_all_interfaces_are_seen():
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        found = host.listening_everywhere()
        assert everywhere.getsockname()[1] in found and here.getsockname()[1] not in found
