"""Personalisation: a scorer with parameters that reads the prompts' metadata, and is still traced and differentiable.

reward.name=maker:configs.fashion_rewards.personalisation:make
"""

from ddpo_jax.rewards import clip


def make(settings, place):
    """(pure, prepare, params) of 100 cos(picture, what its wearer wore before), by the CLIP in reward.clip_model.

    metadata["history"]: texts. settings: the config's `reward`. place: where the parameters are to lie.
    """
    found = clip.load(settings.clip_model, place=place)

    def pure(params, images, tokens):
        picture, history = found.embed_images(params, images), found.embed_texts(params, tokens)
        return 100 * (picture * history).sum(axis=-1)

    def prepare(prompts):
        return found.tokenize([", ".join(entry.get("history", ())) for entry in prompts.metadata])

    return pure, prepare, found.params
