"""Rewards and image sources that tests name as module:function. Importing needs nothing but numpy."""

import time

import numpy as np

CALLS_LEFT = [0]


def redness(images):
    """Traceable: how much redder than the other channels."""
    return images[..., 0].mean(axis=(1, 2)) - images[..., 1:].mean(axis=(1, 2, 3))


def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))


def wrong_shape(images, prompts):
    return images.mean(axis=(1, 2))


def raising(images, prompts):
    raise OSError("the scorer's disk is full")


def hanging(images, prompts):
    time.sleep(60)


def raising_later(images, prompts):
    """Raises once CALLS_LEFT is used up."""
    CALLS_LEFT[0] -= 1
    if CALLS_LEFT[0] < 0:
        raise OSError("the scorer's disk is full")
    return brightness(images, prompts)


def colored(index):
    """A 16 x 16 picture of one colour and its name; a pure function of the index."""
    names = ("red", "green", "blue")
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., index % 3] = 255 - index % 50
    return image, names[index % 3]
