import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from vit_jax.data.preparing.checksum import crc32c


def test_published_values():
    """RFC 3720, B.4, and the check value of every table of CRCs."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


@pytest.mark.parametrize("size", [1, 3, 4, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000, 4096,
                                  4097, 20_000])
def test_like_tensorboards_byte_by_byte(size):
    data = np.random.default_rng(size).bytes(size)
    theirs = pywrap_tensorflow.crc_finalize(
        pywrap_tensorflow.crc_update(pywrap_tensorflow.CRC_INIT, data))
    assert crc32c(data) == theirs
    damaged = bytearray(data)
    damaged[size // 2] ^= 1
    assert crc32c(bytes(damaged)) != theirs
