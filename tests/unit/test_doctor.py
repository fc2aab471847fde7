"""What the doctor says of this host, and of hosts made up."""

import json
import socket
from pathlib import Path

import pytest

from megarl.cli import run
from megarl.operations import doctor, host

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
    monkeypatch.setattr(host, "gpus", lambda: gpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert status(doctor.accelerators()) == {"GPU 0": "ok", "GPU 1": "warning", "GPU 2": "fault", "GPU 3": "ok"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert status(doctor.accelerators())["CUDA"] == "fault"


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
