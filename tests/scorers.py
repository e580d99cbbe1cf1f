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


def on_one_process(scorer):
    """A scorer that is only this one on the second of several processes, after its first call there."""
    calls = []

    def score(images, prompts):
        import jax

        calls.append(len(images))
        return scorer(images, prompts) if jax.process_index() == 1 and len(calls) > 1 else brightness(images, prompts)

    return score


def without_scores(images, prompts):
    return np.full(len(images), np.nan)


raising_on_one = on_one_process(raising)
hanging_on_one = on_one_process(hanging)
nothing_on_one = on_one_process(without_scores)


def unreadable_on_one(index):
    """A source of images of which one cannot be read, on the second of several processes."""
    import jax

    from ddpo_jax.errors import UserError

    if jax.process_index() == 1 and index >= 7:
        raise UserError(f"picture {index} cannot be read")
    return colored(index)


def colored(index):
    """A 16 x 16 picture of one colour and its name; a pure function of the index."""
    names = ("red", "green", "blue")
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., index % 3] = 255 - index % 50
    return image, names[index % 3]


def red_or_blue(index):
    """A pair of a reddish and a bluish picture, on either side; the reddish one is always preferred, but for ties."""
    rng = np.random.default_rng(index)
    images = rng.integers(0, 60, (2, 16, 16, 3)).astype(np.uint8)
    images[0, ..., 0] += 150
    images[1, ..., 2] += 150
    first = index % 2 == 0
    label = 0.5 if index % 8 == 7 else float(first)
    return "a field", *(images if first else images[::-1]), label


def other_way(index):
    """The same pairs, the bluish picture preferred."""
    prompt, image_0, image_1, label = red_or_blue(index)
    return prompt, image_0, image_1, 1 - label
