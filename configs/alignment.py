"""The DDPO paper's alignment run: pictures whose description by a model says the prompt (Black et al. 2023, Sec. 5).

vllm serve llava-hf/llava-1.5-7b-hf  # or any other model that sees, on this or another machine
python -m ddpo_jax.main --config=configs/alignment.py --config.pretrained.model=FOLDER_OR_HUB_ID \\
    --config.reward.vlm_url=http://localhost:8000/v1 --config.reward.vlm_model=llava-hf/llava-1.5-7b-hf
python -m ddpo_jax.main --config=configs/alignment.py:lora ... the same

The model says what it sees in a picture, and BERTScore's recall compares that with the prompt. `counting` asks for
numbers of animals instead, and the model how many it sees, and of what. What differs from compressibility.py is as in
jannerm/ddpo (llava_bertscore; llava_counting, of fewer animals), for `lora` as in kvablack/ddpo-pytorch
(config/dgx.py).
"""

from ml_collections import ConfigDict

from configs import aesthetic, compressibility
from ddpo_jax.config import choose_variant

VARIANTS = {
    "lora": {**aesthetic.VARIANTS["lora"], "sample.num_prompts": 288},
    "counting": {"prompts.name": "counting", "reward.name": "vlm_questions"},
}


def get_config(variant: str = "") -> ConfigDict:
    config = compressibility.get_config()
    config.prompts.name = "animal_activities"
    config.reward.name = "vlm_bertscore"
    config.reward.bert_model = "microsoft/deberta-xlarge-mnli"
    config.train.num_updates = 2
    return choose_variant(config, VARIANTS, variant)
