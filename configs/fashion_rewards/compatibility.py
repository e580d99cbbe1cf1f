"""Compatibility: on the host, with what the prompt source knows of each prompt.

reward.name=metadata:configs.fashion_rewards.compatibility:harmony
"""

import colorsys

import numpy as np

NEUTRAL = 0.15  # of saturation: white, grey and black go with everything


def harmony(images, prompts, metadata):
    """images (b, H, W, 3) numpy in [0, 1], b texts, b mappings -> b numbers in [0, 1], NaN where there is no outfit.

    How near the picture's mean hue is to that of the outfit's other pieces, or to its complement: the mean of
    |4 d - 1|, d being the distance of two hues on a circle of length 1. metadata["outfit"] gives the pieces' colours as
    (r, g, b) in [0, 1]. A neutral colour, of a piece or of the picture, counts 1.
    """
    return [score(image, entry.get("outfit", ())) for image, entry in zip(images, metadata, strict=True)]


def score(image, outfit):
    own = image.mean(axis=(0, 1))
    return np.mean([fit(own, colour) for colour in outfit]) if outfit else np.nan


def fit(colour, other):
    (hue, saturation, _), (other_hue, other_saturation, _) = colorsys.rgb_to_hsv(*colour), colorsys.rgb_to_hsv(*other)
    if min(saturation, other_saturation) < NEUTRAL:
        return 1.0
    apart = abs(hue - other_hue)
    return abs(4 * min(apart, 1 - apart) - 1)
