"""pass@k: the chance that at least one of k responses is right, estimated from n of them."""

import math


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate of pass@k for one prompt, `num_right` of whose `num_samples` responses are right (Chen et al. 2021, eq. 1).

    1 - C(n - c, k) / C(n, k): the share of the sets of k responses that hold a right one. Needs 1 <= k <= num_samples.
    """
    assert 1 <= k <= num_samples and 0 <= num_right <= num_samples, (num_samples, num_right, k)
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def reported_ks(num_samples: int) -> tuple[int, ...]:
    """The k that an evaluation with so many responses a prompt reports: 1, 2, 4, ... and all of them."""
    powers = [1 << exponent for exponent in range(num_samples.bit_length()) if 1 << exponent <= num_samples]
    return tuple(dict.fromkeys([*powers, num_samples])) if num_samples else ()
