"""Checks that every Python backend makes."""


def check_target(target, vocab_size, ignore_index):
    """Raise IndexError for the first bad row of a target on the CPU; on a GPU that would wait for
    it."""
    if target.device.type != "cpu":
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"dro_cross_entropy: target[{row}] must be in [0, {vocab_size}) or "
            f"ignore_index={ignore_index}, got {int(target[row])}"
        )
