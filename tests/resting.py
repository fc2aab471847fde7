"""The place of a sampler in tests of the trainer's memory alone."""


class Resting:
    """No sampler: what is left on the device is the trainer's."""

    policy_version = 0

    def wake(self, part: str) -> None:
        pass

    def sleep(self) -> None:
        pass
