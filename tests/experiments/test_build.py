from __future__ import annotations

import numpy as np

from experiments.build import standardise


def test_many_large_images_are_standardised_exactly():
    # Ten million pixels a channel: in single precision their sum comes out far too small.
    images = np.broadcast_to(np.array([200, 0, 50], np.uint8), (2, 2_300, 2_300, 3)).copy()
    images[0, :, :, 0] = 100
    images[1, :, :, 1] = 255
    found = np.asarray(standardise(images)(images[:, :1, :1]))
    assert np.allclose(found[:, 0, 0, 0], [-1, 1], atol=1e-4)
    assert np.allclose(found[:, 0, 0, 1], [-1, 1], atol=1e-4)
    assert np.allclose(found[..., 2], 0, atol=1e-4)
