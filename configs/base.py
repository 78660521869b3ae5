"""Every configuration field once, at its default, and plain training from scratch.

Recipes start from `get_config()` and set what they need. The argument chooses policies, whose own fields then exist
and can be overridden on the command line:

    python -m dataflex_jax.train --config=configs/base.py:mixer=odm --config.mixer.alpha=0.8 --config.data.root=DIR ...
    python -m dataflex_jax.train --config=configs/base.py:selector=less,weighter=loss --config.weighter.r=0.5 ...

Other recipes take the same after their own variant: configs/odm.py:local,weighter=loss. None, null or nothing
(--config.data.domains=None) is None; a tuple may be written a,b. In paths `~` and environment variables are expanded.

The kinds are mixer, selector, order and weighter. Several weighters, `weighter=loss+adapt`, are multiplied, and each
has its own fields: --config.weighter.loss.r=0.5. `plugins=my_package.my_mixer` (several with +) first imports
modules that register policies, signals, sources, evaluators or model families of your own.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry


def get_config(arg: str = "") -> ConfigDict:
    """The base configuration; `arg` is "kind=name,..." with a kind of policy or "plugins"."""
    config = ConfigDict()

    # The run.
    config.seed = 42
    config.train_step = placeholder(int)  # optimizer steps in all; None: as many as `epochs` take
    config.train_step = 1000
    config.epochs = placeholder(float)  # passes over the training rows, in place of train_step, which is then None
    config.log_every = 10  # steps between lines of metrics.jsonl
    config.eval_every = 0  # steps between evaluations on the held-out split; 0: only after the last step
    config.eval_rows = 256  # at most this many held-out rows a domain in each evaluation
    config.evaluators = ("held_out",)  # what is evaluated then: held-out losses, and evaluators that plugins register
    # Tasks of lm-evaluation-harness, such as ("mmlu", "arc_easy"), that the model is asked too; need the extra `eval`.
    config.eval_tasks = ()
    config.eval_tasks_every = 0  # steps between two times; 0: only after the last step
    config.eval_num_fewshot = placeholder(int)  # examples before each question; None: as each task says
    config.eval_limit = placeholder(object)  # the first so many questions of a task, below 1 that share; None: all
    config.eval_include_path = placeholder(str)  # folder with further tasks as YAML files
    config.eval_mmlu_root = placeholder(str)  # folder with MMLU's csv files, in place of the hub's data set
    config.checkpoint_every = 500  # steps between checkpoints; the last step is always saved
    config.keep = 3  # newest checkpoints kept
    config.tensorboard = True
    config.wandb_project = placeholder(str)  # None: off; needs the extra `wandb`

    # The schedule of every policy; a policy's own section may override it.
    config.warmup_step = 0  # optimizer steps on the initial policy
    config.update_step = 1  # optimizer steps between updates
    config.update_times = -1  # number of updates; -1: until the end
    config.plugins = ()  # modules that register policies, signals, sources, evaluators, model families of your own
    config.mixer = placeholder(ConfigDict)  # from which domain the next rows come; None: data.proportions throughout
    config.selector = placeholder(ConfigDict)  # which examples come next; None: all
    config.order = placeholder(ConfigDict)  # in which order they come; None: shuffled
    config.weighter = placeholder(ConfigDict)  # how much each row counts in the loss; None: its share of the tokens

    # The model. Shape fields have Hugging Face's names; None: that of name_or_path; without one a small model's (128
    # wide, 4 layers of 4 heads) and the architecture's defaults.
    config.model = model = ConfigDict()
    model.name_or_path = placeholder(str)  # hub id, folder with a config.json, or run folder; None: as below
    model.from_scratch = True  # random weights; False: those of name_or_path
    # Tokens that the weights of name_or_path lack get rows in the embedding and the head, each the mean of the others:
    # model.vocab_size of them in all, or the tokenizer's, rounded up to a multiple of 128.
    model.resize_vocab = False
    model.architecture = "qwen2"
    model.vocab_size = placeholder(int)  # None: the tokenizer's, rounded up to a multiple of 128
    model.hidden_size = placeholder(int)
    model.intermediate_size = placeholder(int)
    model.num_hidden_layers = placeholder(int)
    model.num_attention_heads = placeholder(int)
    model.num_key_value_heads = placeholder(int)
    model.head_dim = placeholder(int)
    model.max_position_embeddings = placeholder(int)
    model.rms_norm_eps = placeholder(float)
    model.rope_theta = placeholder(float)
    model.tie_word_embeddings = placeholder(bool)
    model.num_experts = placeholder(int)  # this and the six to come: of the architectures that are mixtures of experts
    model.num_experts_per_tok = placeholder(int)
    model.moe_intermediate_size = placeholder(int)  # width of an expert, where it is not intermediate_size
    model.shared_expert_intermediate_size = placeholder(int)
    model.norm_topk_prob = placeholder(bool)  # probabilities of the chosen experts are divided by their sum
    model.router_aux_loss_coef = placeholder(float)  # times the load-balancing loss in the training loss; 0: without
    model.router_z_loss_coef = placeholder(float)  # times the mean squared logsumexp of the routers' logits; None: 0
    model.initializer_range = placeholder(float)
    model.dtype = "bfloat16"  # of the forward and backward pass; norms, softmax and losses are float32
    model.param_dtype = "float32"  # of the master weights and the optimizer state
    model.remat = "full"  # what the backward pass recomputes, by name; see ModelConfig in dataflex_jax/models/config.py
    model.scan_layers = True  # False: one after the other in the train step, faster on GPUs, slower to compile
    model.attention = "auto"  # "auto", "xla" or "cudnn"
    # Patterns of the parameters that are trained, such as ("layers/attention/*", "lm_head/*") or, with "!" for what is
    # not, ("*", "!*/router/*"); the others stay as they are. None: all; with adapters, these alone.
    model.trainable = placeholder(tuple)

    # Low-rank adapters (LoRA): the model stays as it is, only they are trained and saved.
    config.lora = lora = ConfigDict()
    lora.rank = 0  # inner width of the adapters; 0: off, all parameters are trained
    lora.alpha = placeholder(float)  # their product is scaled by alpha / rank; None: 2 * rank
    lora.dropout = 0.0  # of their inputs, while training
    lora.name_or_path = placeholder(str)  # PEFT adapter to start from (folder or hub id); None: fresh ones
    lora.use_rslora = False  # scale by alpha / sqrt(rank)
    # Of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj; "all": all seven, without those of experts, which get
    # adapters where they are named.
    lora.target_modules = ("all",)
    lora.base_dtype = "bfloat16"  # of the frozen parameters; the adapters have model.param_dtype

    # The data.
    config.data = data = ConfigDict()
    # "builtin" (Python's installation), "local" (files), "hub" (datasets) or "dataset_info" (LLaMA-Factory's folder)
    data.source = "builtin"
    # local: folder of NAME.jsonl, .ndjson, .json (each plain, .gz, .zst, .bz2 or .xz), .parquet, .txt (not instruction
    # data; MMLU's: .csv); hub: id or save_to_disk folder; dataset_info: folder with dataset_info.json
    data.root = placeholder(str)
    data.domains = placeholder(tuple)  # names, in order; None: all that are found
    # Dotted record field that says which domain a record belongs to: a string or integer, also within a string of JSON.
    data.domain_field = placeholder(str)
    data.domain_values = placeholder(tuple)  # that field's value for each of data.domains; None: the names themselves
    data.max_samples = placeholder(int)  # at most this many records of each domain, the first ones; None: all
    data.hub_config = placeholder(str)
    data.hub_split = "train"
    data.text_field = "text"  # of a document's record
    # Hub id, folder (or a run's), a tokenizer.json, "bytes", or "train:VOCAB" (byte-level BPE of the training text).
    # None: that of the weights; without weights "train:4096".
    data.tokenizer = placeholder(str)
    data.eos_token = placeholder(str)  # None: the tokenizer's own
    data.begin_of_text = placeholder(bool)  # documents begin with the tokenizer's bos_token; None: as it says itself
    data.seq_len = 512  # tokens a row
    data.batch_size = 32  # rows an optimizer step, over all devices and hosts
    data.grad_accumulation = 1  # microbatches an optimizer step
    # What policies that weight the loss look at: the whole batch (with microbatches, one more forward pass) or
    # "microbatch".
    data.weigh_over = "batch"
    # K numbers, {"name": number, ...}, "uniform", a file that a mixer left (domain_weights.json), or None: natural, by
    # number of rows
    data.proportions = placeholder(object)
    # How often each domain's rows come at most: a number, K numbers, {"name": number, ...}, or None. The others then
    # share what a domain would give, in proportion.
    data.max_epochs = placeholder(object)
    data.valid_fraction = 0.02  # of the documents, held out by hash (unless a domain has its own held-out files)
    data.draw = "systematic"  # rows of a domain in a batch: within 1 of B*w ("systematic") or "multinomial"
    data.lag = 1  # weights decided after step s are drawn from at step s + 1 + lag
    data.cache_dir = "~/.cache/dataflex_jax"  # rows stores and trained tokenizers
    # How closely the cache is looked at: the "size" of its files, "sampled" blocks of them too, or the whole "content",
    # and that of the data's files whatever their size and time say.
    data.verify = "sampled"
    data.on_bad_record = "raise"  # or "skip", which counts them

    # Instruction data: one example a row instead of rows of seq_len tokens.
    data.formatting = placeholder(str)  # "alpaca", "sharegpt", "openai", "pairs", "mmlu"; None: documents, dataset_info
    data.template = placeholder(str)  # "qwen", "llama3", "mistral", "alpaca"; None: the tokenizer's own, or "qwen"
    data.cutoff_len = 2048  # further tokens of an example are cut off; without a response in the rest it is dropped
    data.train_on_prompt = False  # the loss is on all tokens, not on the responses only
    data.mask_history = False  # the loss is on the last response only
    # Key of a message with its weight, any number >= 0; the weighter `field` of turns sets this to its field.
    data.weight_key = placeholder(str)
    data.packing = False  # several examples a row of cutoff_len tokens, which do not see each other
    data.buckets = placeholder(tuple)  # row lengths that a batch is padded to; None: cutoff_len / 8, / 4, / 2, / 1

    # The target set of selectors and weighters that compare with one. Fields as in `data`, whose tokenizer, lengths and
    # template are used.
    config.targets = targets = ConfigDict()
    targets.source = placeholder(str)  # None: the held-out split of the training data
    targets.root = placeholder(str)
    targets.domains = placeholder(tuple)
    targets.domain_field = placeholder(str)
    targets.domain_values = placeholder(tuple)
    targets.hub_config = placeholder(str)
    targets.hub_split = "train"
    targets.text_field = "text"
    targets.formatting = placeholder(str)
    targets.group_field = placeholder(str)  # record field that names an example's group; None: its domain is its group
    targets.group_rows = placeholder(int)  # at most this many rows a group; None: all

    # Passes over many rows: for what selectors, orders, mixers and weighters ask, and a reference's cached losses.
    config.sweep = sweep = ConfigDict()
    sweep.batch_rows = placeholder(int)  # rows a batch, over all devices; None: what fits into the devices' memory

    # The optimizer: AdamW.
    config.optim = optim = ConfigDict()
    optim.learning_rate = 3e-4
    # After the warm-up: "linear" or "cosine" to 0, "wsd" (decays in the last tenth) or "constant".
    optim.schedule = "cosine"
    optim.warmup_ratio = 0.03  # of train_step
    optim.weight_decay = 0.1  # on matrices, not on norms and biases
    optim.b1 = 0.9
    optim.b2 = 0.95
    optim.eps = 1e-8
    optim.clip_norm = 1.0  # global gradient norm; 0: off

    # The devices: sizes of the mesh axes, -1 once for the rest.
    config.mesh = mesh = ConfigDict()
    mesh.data = 1  # copies of the model
    mesh.fsdp = -1  # parameters and optimizer state split over these (ZeRO-3)
    mesh.expert = 1  # experts split over these, to which tokens are sent; of mixtures of experts
    mesh.tensor = 1  # matrices split over these

    choices = _parse(arg)
    config.plugins = tuple(filter(None, choices.pop("plugins", "").split("+")))
    registry.load_plugins(config.plugins)
    for kind, name in choices.items():
        names = name.split("+")
        if len(names) == 1:
            config[kind] = registry.policy_config(kind, name)
        elif kind == "weighter":
            if twice := sorted({each for each in names if names.count(each) > 1}):
                raise InputError(f"--config=configs/base.py:{arg}: {kind}={name}: {twice[0]!r} twice; once is enough")
            config[kind] = ConfigDict({each: registry.policy_config(kind, each) for each in names})
        else:
            raise InputError(f"--config=configs/base.py:{arg}: {kind}={name}: only weighters can be several")
    return config.lock()


def split(variant: str, default: str) -> tuple[str, str]:
    """A recipe's variant, "local,mixer=odm,plugins=m", as what is its own, "local", and `get_config`'s argument."""
    parts = [part for part in variant.split(",") if part]
    return ",".join(part for part in parts if "=" not in part) or default, ",".join(p for p in parts if "=" in p)


def _parse(arg: str) -> dict[str, str]:
    choices = {}
    for part in filter(None, arg.split(",")):
        kind, equals, name = part.partition("=")
        if kind not in (*registry.KINDS, "plugins") or not equals or not name:
            kinds = ", ".join(f"{known}=NAME" for known in registry.KINDS)
            raise InputError(f"--config=configs/base.py:{arg}: {part!r} is not {kinds} or plugins=MODULE[+MODULE]")
        choices[kind] = name
    return choices
