"""Compatibility: on the host, with what the prompt source knows of each prompt.

reward.name=metadata:configs.fashion_rewards.compatibility:harmony
"""

import colorsys

import numpy as np


def harmony(images, prompts, metadata):
    """images (b, H, W, 3) numpy in [0, 1], b texts, b mappings -> b numbers in [0, 1], NaN where nothing is known.

    How near the garment's mean hue is to that of the outfit's other pieces, or to its complement, metadata["outfit"]
    being their colours as (r, g, b) in [0, 1].
    """
    return [score(image, entry.get("outfit", ())) for image, entry in zip(images, metadata, strict=True)]


def score(image, outfit):
    if not outfit:
        return np.nan
    hue = colorsys.rgb_to_hsv(*image.mean(axis=(0, 1)))[0]
    apart = [abs(hue - colorsys.rgb_to_hsv(*colour)[0]) for colour in outfit]
    apart = np.array([min(x, 1 - x) for x in apart])  # of a circle of length 1: 0 is the same hue, 1/2 its complement
    return float(np.mean(np.abs(4 * apart - 1)))
