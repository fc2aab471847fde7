"""Code in the sandbox: what passes its tests earns 1, and what tries to leave finds nothing there."""

import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megarl.errors import RewardError, SetupError
from megarl.rewards import sandbox as sandboxes
from megarl.rewards.code_tests import CodeTests, code_of, read_tests
from megarl.rewards.sandbox import Sandbox
from tests.unit.reward_samples import scorer_rows

ACCEPT = ("root",) if os.geteuid() == 0 else ()


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(10, ACCEPT, "rewards.0")
    except SetupError as error:
        pytest.skip(str(error))


LOOK_AROUND = """
import json, os, socket, sys
def refused(call, *arguments):
    try: call(*arguments)
    except OSError: return True
    return False
print(json.dumps({
    "home": refused(os.listdir, sys.argv[1]), "etc": refused(os.listdir, "/etc"), "proc": refused(os.listdir, "/proc"),
    "network": refused(socket.create_connection, ("127.0.0.1", 22), 2), "others": refused(os.kill, -1, 9), "root": refused(os.chroot, "/"),
    "system": refused(open, "/usr/x", "w"), "python": refused(open, sys.prefix + "/x", "w"), "pid": os.getpid() < 10,
    "here": os.listdir("."), "environment": sorted(os.environ)}))
"""


def ending(sandbox, program, *arguments, stdin=""):
    return sandbox.run([sys.executable, "-I", "-S", "main.py", *arguments], {"main.py": program}, stdin)


def test_code_is_judged_by_asserts(sandbox):
    tests = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
    right = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    responses = {
        right: 1.0,
        "def add(a, b): return a + b": 1.0,
        "```python\ndef add(a, b): return 0\n```\nno, rather\n```\ndef add(a, b): return a + b\n```": 1.0,
        right.replace("a + b", "a - b"): 0.0,
        right.replace("return", "retrun"): 0.0,
        "import sys\nsys.exit(0)": 0.0,
        "import os\nos._exit(0)": 0.0,
        "print('passed')\nraise SystemExit": 0.0,
        "```python\ndef add(a, b): return a + b": 0.0,
        "": 0.0,
    }
    assert CodeTests(sandbox, 60).score(*scorer_rows(list(responses), tests)) == list(responses.values())
    assert CodeTests(sandbox, 60).score(*scorer_rows([right], tests, finish_reason="length")) == [0.0]


def test_code_is_judged_by_what_it_prints(sandbox):
    tests = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})
    responses = {"print(sum(map(int, input().split())))  ": 1.0, "print(3)": 0.0, "print(sum(map(int, input().split()))); exit(1)": 0.0}
    assert CodeTests(sandbox, 60).score(*scorer_rows(list(responses), tests)) == list(responses.values())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("assert (", "neither JSON nor Python"),
        ("[1, 2]", "of equal length"),
        ('{"inputs": ["1"], "outputs": []}', "of equal length"),
        ('{"inputs": [1], "outputs": ["1"]}', "of equal length"),
    ],
)
def test_tests_that_cannot_be_read_are_an_error_of_the_data(answer, reason):
    with pytest.raises(RewardError, match=f"the tests of prompt 10 .*{reason}"):
        read_tests(scorer_rows(["x"], answer)[0][0])


def test_the_last_fenced_block_is_the_code():
    assert code_of("a\n```py\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert code_of("x = 1") == "x = 1" and code_of("```python\nx = 1") == ""


def test_a_program_sees_no_network_no_files_no_processes_no_variables(sandbox, monkeypatch):
    monkeypatch.setenv("CANARY", "canary")
    found = ending(sandbox, LOOK_AROUND, str(Path(__file__).parent))
    assert found.code == 0, found
    assert json.loads(found.output) == {
        **dict.fromkeys(("home", "etc", "proc", "network", "others", "root", "system", "python", "pid"), True),
        "here": ["main.py"],
        "environment": ["HOME", "LANG", "OMP_NUM_THREADS", "PATH", "TMPDIR"],
    }


def test_a_program_may_not_take_more_than_its_share(sandbox):
    assert b"MemoryError" in ending(sandbox, "x = bytearray(3 << 30)").errors
    flood = ending(sandbox, "while True: print('x' * 4096)")
    assert flood.code != 0 and len(flood.output) <= sandbox.limits.file_bytes
    full = ending(sandbox, "for i in range(200): open(f'f{i}', 'w').write('x' * (1 << 20))")
    assert full.code != 0 and b"No space left" in full.errors


def processes_with(word):
    """How many processes of this machine have `word` among their arguments."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += word.encode() in path.read_bytes().split(b"\0")
    return found


def test_the_clock_ends_a_program_and_all_its_children(monkeypatch, sandbox):
    monkeypatch.setattr(sandbox, "timeout_s", 2.0)
    program, word = "import os, time\nfor i in range(3): os.fork() or os.setsid()\ntime.sleep(60)", f"marked-{os.getpid()}"
    start, most = time.monotonic(), 0
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ending, sandbox, program, word)
        while not found.done():
            most = max(most, processes_with(word))
            time.sleep(0.02)
    assert found.result().code is None and time.monotonic() - start < 30
    assert most == 8
    deadline = time.monotonic() + 5
    while processes_with(word) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with(word) == 0


def test_root_and_a_host_without_namespaces_are_refused_unless_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(sandboxes.os, "geteuid", lambda: 0)
    with pytest.raises(SetupError, match=r"^rewards.1: .*who is root.*expected another user, or rewards.1.accept: \[root\]"):
        Sandbox(5, (), "rewards.1")
    (tmp_path / "unshare").write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SetupError, match=r"Operation not permitted; expected .* or rewards.1.accept: \[no_namespaces\]"):
        Sandbox(5, ("root",), "rewards.1")
    accepted = Sandbox(5, ("root", "no_namespaces"), "rewards.1")
    assert ending(accepted, "print(input())", stdin="hey\n").output == b"hey\n"


def test_a_sandbox_that_breaks_during_the_run_is_an_error_not_a_0(sandbox, monkeypatch, tmp_path):
    monkeypatch.setattr(sandboxes, "UNSHARE", ("--no-such-option",))
    with pytest.raises(RewardError, match="the sandbox failed for prompt 10"):
        CodeTests(sandbox, 60).score(*scorer_rows(["x = 1"], "assert True"))


def test_all_programs_together_have_a_time_limit_too(sandbox):
    with pytest.raises(RewardError, match="the tests of prompts 10, 11 took more than 0 s in all"):
        CodeTests(sandbox, 0.0).score(*scorer_rows(["x = 1", "y = 1"], "assert True"))
