"""The DDPO paper's alignment run: pictures whose description by a model says the prompt (Black et al. 2023, Sec. 5).

python -m ddpo_jax.main --config=configs/alignment.py --config.pretrained.model=FOLDER_OR_HUB_ID
python -m ddpo_jax.main --config=configs/alignment.py:lora --config.pretrained.model=FOLDER_OR_HUB_ID

NOT YET: there is no reward vlm_bertscore in this version (LLaVA describes the picture, BERTScore's recall compares that
with the prompt), and the run says so and ends; --config.reward.name=clip_score is another judge of the same, with
--config.reward.clip_model. What differs from compressibility.py is as in jannerm/ddpo (llava_bertscore), for `lora` as
in kvablack/ddpo-pytorch (config/dgx.py).
"""

from ml_collections import ConfigDict

from configs import aesthetic, compressibility
from ddpo_jax.config import choose_variant

VARIANTS = {"lora": {**aesthetic.VARIANTS["lora"], "sample.num_prompts": 288}}


def get_config(variant: str = "") -> ConfigDict:
    config = compressibility.get_config()
    config.prompts.name = "animal_activities"
    config.reward.name = "vlm_bertscore"
    config.train.num_updates = 2
    return choose_variant(config, VARIANTS, variant)
