"""Compares mathematical answers with math-verify, one JSON line in, one out. Run as a script: whoever started it ends it when it hangs.

In: {"answer": str, "response": str}. Out: true, false, or null where the answer itself holds nothing that can be compared.
"""

import json
import logging
import resource
import sys

from math_verify import parse, verify

MOST_BYTES = 4 << 30  # of memory: a power tower would take all there is


def main() -> None:
    """Serve until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.disable(logging.CRITICAL)  # it warns that its own time limits are off: the parent's are the ones that hold
    print("ready", flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        answer = parse(f"${pair['answer']}$", parsing_timeout=None) or parse(pair["answer"], parsing_timeout=None)
        found = parse(pair["response"], parsing_timeout=None)
        print(json.dumps(verify(answer, found, timeout_seconds=None) if answer else None), flush=True)


if __name__ == "__main__":
    main()
