"""Dropout masks that every process computes alike."""

import torch


def hashed_dropout(key, ids, width, probability, dtype):
    """Dropout factors, 0 or 1 / (1 - probability), ``[n, width]``: a function of ``key`` (0-d
    int64), of each row's id ``[n]`` and of the column alone."""
    rows = _mix(_mix(key) ^ ids)  # (n,)
    columns = _mix(torch.arange(width, device=ids.device))  # (width,)
    bits = rows.int()[:, None] + columns.int()  # (n, width), of the last round's 32 bits
    bits ^= _shift_right(bits, 16)
    bits *= -2048144789  # 0x85ebca6b
    bits ^= _shift_right(bits, 13)
    bits *= -1028477387  # 0xc2b2ae35
    bits ^= _shift_right(bits, 16)
    kept = bits >= int(probability * 2**32) - 2**31
    return kept.to(dtype).div_(1 - probability)


def _shift_right(x, count):
    """A logical shift of int32."""
    return (x >> count) & ((1 << (32 - count)) - 1)


def _mix(x):
    """A bijection of int64 whose output bits each depend on all input bits (the finaliser of
    splitmix64); products wrap."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & ((1 << 33) - 1))
