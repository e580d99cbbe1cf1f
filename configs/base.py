"""Every knob, once. A recipe starts from here and changes what differs.

Counts are global: they mean the same on one device and on many.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # Everything random follows from it: weights of adapters, prompts, noise, shuffles.
    config.seed = 0
    # Rounds of sampling, scoring and updating. May be raised later to continue a finished run.
    config.num_epochs = 100
    # Rounds between checkpoints. A signal or an error saves the last whole round anyway; kill -9 loses up to so many.
    config.checkpoint_every = 10
    # Checkpoints kept: the newest, and beside them those after the rounds of the highest mean reward.
    config.keep_checkpoints = 2
    config.keep_best_checkpoints = 1
    # Rounds between evaluations at fixed prompts and noise; 0: only before the first round and after the last.
    config.eval_every = 10
    # Pictures an evaluation draws of the train prompts, and as many of the held-out ones.
    config.eval_prompts = 64
    # From the model's own samples and a reward: "ddpo_is" (PPO-clip), "ddpo_sf" (score function: one update a round),
    # "rwr" and "sparse_rwr" (regression on samples weighted by reward, or on the best), "online_dpo" (the best against
    # the worst of each draw), "reward_backprop" (the reward's own gradient). From a data set: "diffusion_dpo" (pairs
    # with a preference), "sft" (captioned images).
    config.algorithm = "ddpo_is"
    # What the networks compute in: "float32" or "bfloat16". Trained weights, log-probs and losses stay float32.
    config.compute_dtype = "float32"
    # Of the UNet: "xla" holds all products of queries and keys, "stepwise" too, but fuses nothing with them, "chunked"
    # holds those of some queries at a time, "cudnn" (an NVIDIA GPU, bfloat16) none; it takes heads of up to 128, and
    # wider ones are left to XLA. "auto" is cudnn where it can be had, chunked on other accelerators, stepwise on CPU.
    config.attention = "auto"
    # How convolutions of 3x3 pixels are computed, in the UNet and the VAE: "direct", or "winograd", as matrix products
    # of fewer multiplications, where that pays (float32, 64 channels or more, maps that are not huge). "auto" is
    # winograd on CPU; an accelerator's library chooses by itself.
    config.convolution = "auto"
    # Folder of compiled programs, so that a second start takes seconds; "" compiles anew every time.
    config.compilation_cache = "~/.cache/ddpo_jax"
    # Scalars and grids to workdir/tensorboard (pip install 'ddpo_jax[tensorboard]').
    config.tensorboard = False
    # Project on Weights & Biases (pip install 'ddpo_jax[wandb]'); "" is off.
    config.wandb_project = ""

    # How the devices are arranged; the product is their number, and -1 takes what the others leave. No number below
    # depends on it, and no result but for rounding: a device takes its part of each program's pictures and rows.
    config.mesh = mesh = ConfigDict()
    # The batch is cut over data x fsdp.
    mesh.data = -1
    # What is trained, its optimizer's state and the frozen weights are cut over it too, and fetched when they are read:
    # less memory a device, more traffic. Best within one machine or slice.
    mesh.fsdp = 1
    # Attention and feed-forward kernels are cut over it, and multiplied by piece by piece: for models that are too
    # large for a device otherwise. Best a divisor of the numbers of heads, within one machine.
    mesh.tensor = 1

    config.pretrained = pretrained = ConfigDict()
    # A diffusers folder, a hub id, or "tiny": the embedded model.
    pretrained.model = "tiny"
    # Pixels, one side; 0 is the checkpoint's own.
    pretrained.resolution = 0
    # Which files of the folder: "fp16" reads diffusion_pytorch_model.fp16.safetensors and its like; "" those without.
    pretrained.variant = ""
    # Branch, tag or commit of a hub id; "" is the newest. A commit makes sure that a run is of the same weights later.
    pretrained.revision = ""

    config.prompts = prompts = ConfigDict()
    # imagenet_animals, common_animals, animal_activities, counting, to see generalisation unseen_animals,
    # unseen_animal_activities and unseen_activities, or a UTF-8 file with one prompt a line. A line of a
    # .jsonl file is {"prompt": ...} with whatever a reward reads beside it, such as "questions" and "answers".
    prompts.name = "common_animals"
    # Prompts given here are taken instead of `name`.
    prompts.list = ()
    # Fraction of the prompts that is never trained on, only evaluated; 0 holds out none.
    prompts.held_out = 0.0
    # Which prompts are held out. Not the run's seed, so that seeds can be compared.
    prompts.split_seed = 0

    config.sample = sample = ConfigDict()
    # DDIM steps. Work is proportional; below 10 pictures suffer.
    sample.num_steps = 50
    # Noise of a step, 0 to 1. DDPO needs more than 0: a deterministic step has no density.
    sample.eta = 1.0
    # Classifier-free guidance, in sampling and in training. 1 is off and halves the work.
    sample.guidance_scale = 5.0
    # Prompts drawn a round, with replacement.
    sample.num_prompts = 256
    # Pictures a prompt.
    sample.num_samples_per_prompt = 1
    # The pictures of one draw of a prompt start from the same noise and are compared with each other alone (DanceGRPO).
    # With few steps the noise at the start decides most of a picture, and no step has earned that. It takes at least 2
    # pictures a prompt, better 4 or more (of 2 one is always +1, the other -1), and a buffer_size of 0 below.
    sample.shared_noise = False
    # Of DDPO: denoising steps in a row that are taken with noise and learned from; all others are deterministic (eta 0)
    # and cost the update nothing (MixGRPO, Flow-GRPO-Fast). 0: all are noisy, as published. Evaluations draw with noise
    # at every step whatever it is, so that they can be compared.
    sample.window = 0
    # The first of them, counted from 0, or -1: drawn anew in each round, among those that leave all of the window above
    # min_timestep. An early one decides more of a picture.
    sample.window_start = -1
    # Pictures (pairs, where diffusion_dpo encodes them) a program call and device, at most. Larger is faster until
    # memory is full.
    sample.chunk_size = 8
    # Of these, pictures that are decoded at a time; 0 is all. Decoding is what needs most memory at 1024 pixels.
    sample.decode_chunk_size = 0
    # Log-probs in nats: "mean" a latent element (published; clip_range 1e-4 assumes it) or "sum" a latent.
    sample.log_prob_reduction = "mean"

    config.train = train = ConfigDict()
    # "adamw", or "adafactor": second moments in factors of a matrix, and no first ones. Then adam_beta1, adam_beta2 and
    # adam_epsilon are not read.
    train.optimizer = "adamw"
    train.learning_rate = 1e-5
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_epsilon = 1e-8
    train.adam_weight_decay = 1e-4
    # What AdamW's first moments are kept in: "float32", or "bfloat16" for half their memory.
    train.adam_moment_dtype = "float32"
    # The gradient of an update is scaled down to this norm.
    train.max_grad_norm = 1.0
    # Updates over which the learning rate rises from 0; 0: at once.
    train.num_warmup_steps = 0
    # Updates, warm-up included, over which it falls to 0 along a cosine; 0: constant.
    train.num_decay_steps = 0
    # Rank of the adapters on the attention kernels (or on lora_targets); 0 trains the whole UNet.
    train.lora_rank = 0
    # Adapters count alpha / rank; 0: alpha = rank.
    train.lora_alpha = 0.0
    # Regular expression of kernel paths that get an adapter: diffusers' names of the UNet's layers, with / for a dot
    # and _ before a number, as in down_blocks_0/attentions_1/transformer_blocks_0/attn2/to_out_0/kernel.
    # r"(attn[12]/to_\w+|ff/net_\w+(/proj)?)/kernel$" adds the feed-forward layers,
    # r"(attn[12]/to_\w+|resnets_\d+/conv\d)/kernel$" the residual blocks' convolutions.
    train.lora_targets = r"attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$"
    # Optimizer steps a pass over a round's samples: each takes its share of them, all timesteps.
    train.num_updates = 4
    # Passes over a round's samples. More learn more of each sample, and are clipped more.
    train.num_inner_epochs = 1
    # Noise levels that a picture, or a pair, is learned from in a pass; DDPO and reward_backprop have no use for it.
    train.num_noise_draws = 1
    # Fraction of each sample's timesteps that is learned from, drawn anew in each pass. Work is proportional.
    train.timestep_fraction = 1.0
    # Denoising steps that begin below this timestep, of the checkpoint's 1000, are sampled but not learned from; 0
    # learns from all, as published. With few steps the last but one adds so little noise that its log-prob is 6 times
    # as steep as any other's, or more (of 8 steps, that from 126 to 1): most of the gradient's variance, and it decides
    # little.
    # The KL, its weight and its budget are then of the steps that are learned from.
    train.min_timestep = 0
    # (sample, timestep) rows a gradient program and device, at most. Larger is faster until memory is full; it changes
    # only rounding.
    train.micro_batch_size = 16
    # What of the UNet's forward pass is kept for the backward pass; the rest is computed again. "none" keeps all,
    # "products" the outputs of convolutions and linear layers but a feed-forward's first (a tenth more work, two fifths
    # of the memory), "blocks" what goes into each block (a third more work), "full" the same, and inside a block it
    # keeps one layer at a time (two thirds more). The README has the bytes. Little effect on CPU.
    train.remat = "products"
    # PPO's clip range of the importance ratio. Larger learns faster, and less safely.
    train.clip_range = 1e-4
    # Advantages are clipped to ± this.
    train.adv_clip_max = 5.0
    # Where the sampling policy's log-probs come from: "stored" by the rollout, "recompute" by the update's own program
    # before the first update (exact, one more pass), or "": stored in float32, recompute in bfloat16.
    train.old_log_prob = ""
    # Weight of KL(policy || pretrained), nats as the log-probs are (DPOK); 0 is off and saves a forward pass.
    train.kl_weight = 0.0
    # The run ends when a round's mean KL to the pretrained model reaches this; 0 is never.
    train.kl_budget = 0.0
    # Decay of a running average of the trained weights, which is then evaluated and exported; 0 is off.
    train.ema_decay = 0.0

    # Of rwr and sparse_rwr, which regress on a round's own samples.
    config.rwr = rwr = ConfigDict()
    # Of rwr: weights are N softmax(reward / temperature). In units of the reward (in standard deviations, with
    # reward.standardise): small, and only the best count; large, and all count alike.
    rwr.temperature = 5.0
    # Of sparse_rwr: the fraction of a round's samples, the best, that is learned from.
    rwr.top_fraction = 0.1
    # Weighs each prompt's samples among themselves, not all of the round together.
    rwr.by_prompt = False
    # Regresses the guided output that is sampled from, as published, and not the network's own.
    rwr.guided = True

    # Of diffusion_dpo and online_dpo.
    config.dpo = dpo = ConfigDict()
    # "sigmoid" (Diffusion-DPO), "ipo" (which does not push a pair further apart than a margin), or "kto" (each picture
    # by itself: liked, or not).
    dpo.loss = "sigmoid"
    # How much a pair may move the model: small, and it moves far from the pretrained one. Stands before a 1/2 as in the
    # authors' code, whose launcher has 5000; the paper's text says 2000. Errors are means over a latent's elements.
    dpo.beta = 5000.0
    # Chance that a label is wrong, below 0.5 (conservative DPO).
    dpo.label_smoothing = 0.0
    # Of online_dpo: the so many best of each draw of a prompt, against as many of its worst.
    dpo.num_pairs = 1
    # "reward": the pictures' reward says which are best; "majority": the experts of reward.name vote on each two
    # pictures of a draw, with reward.weights.
    dpo.vote = "reward"
    # Rounds after which the reference becomes the model as it is then; 0: it stays the pretrained one.
    dpo.reference_every = 0
    # A folder to which the pairs of each round are written, to be learned from by diffusion_dpo; "" writes none.
    dpo.save_pairs = ""

    # Of reward_backprop: the denoising steps, the last of a picture's, through which the gradient flows. Their number
    # is drawn for each picture from min to max. More say more, cost more memory and time, and may blow up.
    config.backprop = backprop = ConfigDict()
    backprop.min_steps = 1
    backprop.max_steps = 1

    config.per_prompt_stat_tracking = tracking = ConfigDict()
    # Rewards kept a prompt for its own mean and deviation; 0 standardises over the whole round instead. With
    # sample.shared_noise it must be 0: each draw's own pictures are standardised.
    tracking.buffer_size = 32
    # Below so many, a prompt takes the round's mean and deviation.
    tracking.min_count = 16

    config.reward = reward = ConfigDict()
    # On the device: clip_score, aesthetic_score, pickscore, hpsv2, sciscore, image_reward, learned_reward, and
    # jpeg_compressibility_estimate and jpeg_incompressibility_estimate, smooth estimates of the size of a JPEG. On the
    # host: jpeg_compressibility and jpeg_incompressibility, of the file itself. By a vision-language model on a server:
    # vlm_bertscore (what it sees, compared with the prompt), vlm_clip (the same, by a CLIP), vlm_questions (the
    # prompt's own questions: the fraction of right answers), vlm_judge (it gives a number). Or yours: module:function,
    # metadata:module:function, device:module:function, maker:module:function (the README has them). Several with commas
    # between.
    reward.name = "jpeg_compressibility"
    # Weight of each; () is 1 for all. One of weight 0 is only watched: it is in the curves, and not in the reward.
    reward.weights = ()
    # How several count together: "weighted_sum", or "minimum" of the weighted scores, so that none is given up for
    # another.
    reward.combine = "weighted_sum"
    # Measures each expert's scores in standard deviations over all that it has given in this run, before they are
    # weighted: experts of different scales then count alike. Evaluations are measured by the run's first one.
    reward.standardise = False
    # Conditions on experts' own scores, such as ("clip_score>=20", "nsfw<=0.5"). A picture that breaks one gets the
    # lowest reward of its round's others. A gate's expert may have the weight 0.
    reward.gates = ()
    # The CLIP of clip_score: a folder as transformers saves it, a hub id such as "openai/clip-vit-large-patch14", or
    # "tiny": the embedded one, which knows nothing but the embedded model's pictures, and judges these if this is "".
    reward.clip_model = ""
    # What clip_score compares a picture with: {} stands for the prompt, as in "a photo of a {}".
    reward.clip_template = "{}"
    # Of aesthetic_score: the file of LAION's MLP, .pth (only plain tensors are read) or .safetensors, and its CLIP:
    # "openai/clip-vit-large-patch14".
    reward.aesthetic_model = ""
    reward.aesthetic_clip = ""
    # Folders or hub ids of CLIP-H models in transformers' form, such as "yuvalkirstain/PickScore_v1" and
    # "Jialuo21/SciScore"; HPSv2's published file must be converted to that form.
    reward.pickscore_model = ""
    reward.hpsv2_model = ""
    reward.sciscore_model = ""
    # Of image_reward: a folder or hub id with ImageReward.pt (only plain tensors are read) and med_config.json, such as
    # "zai-org/ImageReward", and one with BERT's tokenizer, "google-bert/bert-base-uncased"; "": it lies in the former.
    reward.imagereward_model = ""
    reward.imagereward_tokenizer = ""
    # Of learned_reward: the file that `python -m ddpo_jax.fit_reward` wrote, and the CLIP that it was fitted on, a
    # folder or a hub id; "": what the file says.
    reward.learned_model = ""
    reward.learned_clip = ""
    # The encoder of vlm_bertscore: a folder or a hub id of a BERT, RoBERTa or DeBERTa (v1), such as
    # "microsoft/deberta-xlarge-mnli"; and the layer whose states are compared: 0 is bert-score's own choice.
    reward.bert_model = ""
    reward.bert_layer = 0
    # A server of the OpenAI-compatible chat-completions protocol with a vision-language model, for the vlm_ rewards:
    # http://localhost:8000/v1 after `vllm serve MODEL`, say. It answers greedily.
    reward.vlm_url = ""
    # The name that the server knows its model by.
    reward.vlm_model = ""
    # The name, not the value, of the environment variable with the server's key, which is sent to vlm_url. None is sent
    # if OPENAI_API_KEY is not set, or for ""; any other name must be set.
    reward.vlm_key = "OPENAI_API_KEY"
    # What vlm_judge asks of a picture: {prompt} stands for the prompt. How to end with a number is added to it.
    reward.vlm_question = 'How well does this image show "{prompt}"? Consider everything that the text says.'
    # Lowest and highest number that the judge may give; a picture with another, or with none, has no reward.
    reward.vlm_lowest = 0.0
    reward.vlm_highest = 10.0
    # Requests at a time, of each of num_workers threads. More keep a large server busy; too many run into vlm_timeout.
    reward.vlm_concurrency = 32
    # Seconds that a request may take, waiting in the server's queue included.
    reward.vlm_timeout = 60.0
    # Further tries of a request that failed on the way, or by the server's fault, each after a longer wait.
    reward.vlm_retries = 3
    # Tokens of an answer. A judge that reasons before its number needs more; cut off, it gives none.
    reward.vlm_max_tokens = 128
    # Deals each round's rewards out anew among its pictures: a control, from which nothing can be learned. (Of
    # reward_backprop half of the pictures teach the opposite.) The rewards of the evaluations stay the true ones.
    reward.shuffled = False
    # Seconds that a chunk's scores may take on the host once its pictures are there. The vlm_ rewards give up what has
    # not come after 0.8 of them: it is missing.
    reward.deadline = 300.0
    # Threads that score on the host, one chunk each.
    reward.num_workers = 2
    # Fraction of a round whose reward may be missing (not finite) before the run stops.
    reward.max_missing = 0.1

    # Captioned images for sft, pairs with a preference for diffusion_dpo.
    config.data = data = ConfigDict()
    # Of captioned images a folder with metadata.jsonl (file_name, text), or module:function: index -> (H, W, 3) uint8,
    # caption. Of pairs one with pairs.jsonl (prompt, image_0, image_1, label), or module:function: index -> prompt,
    # image_0, image_1, label; a label is 1 where image_0 is preferred, 0 where image_1 is, and 0.5 is a tie, which is
    # left out. Of either a data set that ddpo_jax.prepare made. A function is called on one thread, which is not the
    # main one, for the round after the one that trains.
    data.source = ""
    # Images, or pairs, a round, each encoded once. The host holds them, and those of the next round, which are read
    # meanwhile: 1.6 MB a pair of 512 pixels.
    data.batch_size = 1024
    # Fraction of them whose caption is dropped, for guidance.
    data.prompt_dropout = 0.1
    # Turns each picture of a pair over, left to right, with a chance of one half.
    data.horizontal_flip = False
    # A folder to keep what the VAE's encoder makes of each picture, which later passes, continued runs and other runs
    # read there instead of decoding and encoding the picture; "" keeps nothing. The latents are drawn from it anew in
    # each round, as without it. It fills up while the run goes on: 131 KB a picture of 512 pixels, 524 KB of 1024, and
    # with horizontal_flip up to twice that. Several hosts need one folder that all see.
    data.cache = ""
    # What is kept there: "float32" (nothing changes) or "float16" (half the bytes, rounded to 3 digits).
    data.cache_dtype = "float32"

    # Locked, so that a misspelt field is an error in recipes too.
    return config.lock()
