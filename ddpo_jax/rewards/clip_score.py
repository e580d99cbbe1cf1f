"""How well a picture fits its prompt, and how much people like it: scores of one CLIP's two embeddings."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from ddpo_jax.errors import UserError
from ddpo_jax.rewards import clip
from ddpo_jax.rewards.pixels import PixelBatch
from ddpo_jax.sharding import first_device
from ddpo_jax.types import Prompts, PyTree


def make(source: str, template: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of the cosine similarity of picture and prompt, times 100.

    100 cos(E_I, E_T): the score of Radford et al. 2021 before its softmax, and CLIPScore (Hessel et al. 2021, Eq. 1)
    without its 2.5 and without cutting negative values off, which have no gradient.

    source: `reward.clip_model`, as in clip.load.  template: what is scored in place of a prompt, which stands where it
    has {}, such as "a photo of a {}" (Radford et al. 2021, Sec. 3.1.4). Differentiable in the pictures.
    """
    if "{}" not in template:
        raise UserError(f"reward.clip_template={template!r}: expected {{}} in it, where the prompt stands")
    found = clip.load(source, place=place)
    return judged_by_prompt(found, lambda params, picture, text: 100.0 * _cosine(picture, text), template=template)


def make_pickscore(source: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of PickScore: exp(logit_scale) cos(E_I, E_T), of a CLIP-H that was trained on pairs.

    The difference of two pictures' scores is the log-odds that people pick the first (Kirstain et al. 2023, Eq. 1 and
    2): a Bradley-Terry model. About 20 to 23 with the published weights.

    source: `reward.pickscore_model`, such as yuvalkirstain/PickScore_v1.
    """
    return judged_by_prompt(clip.load(source, field="reward.pickscore_model", place=place), _by_own_scale)


def make_sciscore(source: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of SciScore: exp(logit_scale) cos(E_I, E_T), of a CLIP-H that was trained on what is
    scientifically so (Li et al. 2025, Science-T2I).

    source: `reward.sciscore_model`, such as Jialuo21/SciScore.
    """
    return judged_by_prompt(clip.load(source, field="reward.sciscore_model", place=place), _by_own_scale)


def make_hpsv2(source: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of the Human Preference Score v2: cos(E_I, E_T), of a CLIP-H trained on rankings.

    Wu et al. 2023 (HPS v2), Sec. 4, as its package returns it: without the temperature. About 0.2 to 0.3.

    source: `reward.hpsv2_model`: the weights in transformers' form, a folder or a hub id.
    """
    found = clip.load(source, field="reward.hpsv2_model", place=place)
    return judged_by_prompt(found, lambda params, picture, text: _cosine(picture, text))


def judged_by_prompt(
    found: clip.CLIP, score: Callable, *, template: str = "{}", head: PyTree = ()
) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of a score of a picture's and its prompt's embeddings.

    score: params, (b, d), (b, d) -> (b,), with params = {"clip": the CLIP's, "head": what the score has beside them}.
    """

    def pure(params: PyTree, images: PixelBatch, tokens: Shaped[Array, "b s"] | np.ndarray) -> Float[Array, " b"]:
        embedded = found.embed_images(params["clip"], images), found.embed_texts(params["clip"], tokens)
        return score(params, *embedded)

    def prepare(prompts: Prompts) -> Int32[np.ndarray, "b s"]:
        return np.asarray(found.tokenize([template.replace("{}", text) for text in prompts.texts]))

    return pure, prepare, {"clip": found.params, "head": head}


def _by_own_scale(params: PyTree, picture: Float[Array, "b d"], text: Float[Array, "b d"]) -> Float[Array, " b"]:
    return jnp.exp(params["clip"]["logit_scale"]) * _cosine(picture, text)


def _cosine(picture: Float[Array, "b d"], text: Float[Array, "b d"]) -> Float[Array, " b"]:
    return (picture * text).sum(axis=-1)
