"""LLaMA-Factory's fields: the model, the method, the batch, the optimizer, how long and how often."""

from pathlib import Path

from dataflex_jax.errors import shown
from dataflex_jax.foreign import read_object
from dataflex_jax.moving.draft import Code, Draft, Given

STAGES = ("sft", "pt")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")


def purpose(given: Given) -> str:
    """The stage, where it is one that a recipe has and there is something to train."""
    for name in ("export_dir", "model", "train_dataset"):
        if given.has(name):
            return "sft"  # refused by name with what is left
    if not given.flag("do_train"):
        given.refuse("do_train", "must be true; of another file nothing is trained")
    return given.one_of("stage", {stage: stage for stage in STAGES}, "sft")


def model(given: Given, draft: Draft) -> None:
    """Which model, and where its weights come from."""
    name = given.text("model_name_or_path")
    if name is None:
        given.refuse("model_name_or_path", "a folder or a hub id is expected")
    if given.text("model_revision", "main") != "main":
        given.refuse("model_revision", "the newest one is read; download the other and name its folder")
    scratch = given.flag("train_from_scratch")
    name = draft.located(name)
    draft.set(model__name_or_path=name)
    if scratch:
        draft.set(model__from_scratch=True, data__tokenizer=name)
    if given.has("resize_vocab"):
        draft.set(model__resize_vocab=given.flag("resize_vocab"))
    _precision(given, draft)


def _precision(given: Given, draft: Draft) -> None:
    half, pure, other = given.flag("bf16"), given.flag("pure_bf16"), given.flag("fp16")
    for name in ("fp16_opt_level", "half_precision_backend", "fp16_full_eval", "fp16_backend"):
        given.raw(name)
    if half or pure or other:
        draft.set(model__dtype="bfloat16", lora__base_dtype="bfloat16")
    if pure:
        draft.set(model__param_dtype="bfloat16")
    if other:
        draft.note(given.place("fp16"), "bfloat16 in its place, which needs no scaling of the loss")


def method(given: Given, draft: Draft) -> None:
    """All parameters, or adapters."""
    reason = "name the parameters in config.model.trainable of a recipe"
    kind = given.text("finetuning_type", "lora")
    if kind == "freeze":
        given.refuse("finetuning_type", reason)
    if kind not in ("lora", "full"):
        given.refuse("finetuning_type", "accepted: lora, full")
    rank, alpha = given.integer("lora_rank"), given.number("lora_alpha")
    dropout, targets = given.number("lora_dropout"), given.names("lora_target")
    rs, adapter = given.flag("use_rslora"), given.names("adapter_name_or_path")
    given.raw("adapter_folder")
    if kind == "full":
        if adapter:
            given.refuse("adapter_name_or_path", "merge it first: python -m dataflex_jax.export")
        draft.set(lora__rank=0)
        return
    if unknown := [name for name in targets if name not in (*_MODULES, "all")]:
        given.refuse("lora_target", f"{unknown[0]} has no adapter here; accepted: all, {', '.join(_MODULES)}")
    if len(adapter) > 1:
        given.refuse("adapter_name_or_path", "one adapter is expected; merge the others first")
    draft.set(
        lora__rank=rank,
        lora__alpha=None if alpha is None else float(alpha),
        lora__dropout=dropout,
        lora__use_rslora=rs or None,
        lora__target_modules=targets or None,
        lora__name_or_path=draft.located(adapter[0]) if adapter else None,
    )


def batch(given: Given, draft: Draft, devices: int | None) -> None:
    """How many rows a step has: the file says it a device."""
    rows = given.integer("per_device_train_batch_size", given.integer("per_gpu_train_batch_size", 8))
    steps, rays = given.integer("gradient_accumulation_steps", 1), given.integer("ray_num_workers")
    for name, value in (("per_device_train_batch_size", rows), ("gradient_accumulation_steps", steps)):
        if value < 1:
            given.refuse(name, "at least 1 is expected")
    if devices is None:
        devices = rays or 1
    what = f"{rows} rows a device, {steps} times accumulated, on {devices} device{'s' if devices > 1 else ''}"
    draft.set(
        data__batch_size=Code(f"{rows} * {steps} * {devices}"),
        data__grad_accumulation=None if steps == 1 else steps,
    )
    draft.note(given.place("per_device_train_batch_size"), f"a step has {what}; --devices=N says how many there were")


def optimizer(given: Given, draft: Draft) -> None:
    """AdamW and its schedule."""
    if given.text("optim", "adamw_torch") not in _ADAMW:
        given.refuse("optim", f"another optimizer; here it is AdamW ({', '.join(_ADAMW)})")
    schedule = given.text("lr_scheduler_type", "linear")
    if schedule not in _SCHEDULES:
        given.refuse("lr_scheduler_type", f"accepted: {', '.join(_SCHEDULES)}")
    draft.set(
        optim__learning_rate=given.number("learning_rate"),
        optim__schedule=_SCHEDULES[schedule] if given.has("lr_scheduler_type") else None,
        optim__weight_decay=given.number("weight_decay"),
        optim__b1=given.number("adam_beta1"),
        optim__b2=given.number("adam_beta2"),
        optim__eps=given.number("adam_epsilon"),
        optim__clip_norm=given.number("max_grad_norm"),
    )
    ratio, steps = given.number("warmup_ratio"), given.number("warmup_steps", 0)
    if 0 < steps < 1:
        ratio = steps
    elif steps:
        total = draft.fields.get("train_step")
        if total is None:
            given.refuse("warmup_steps", "with epochs the number of steps is not known yet; give warmup_ratio")
        ratio = steps / total
    draft.set(optim__warmup_ratio=0.0 if schedule == "constant" else ratio)


def duration(given: Given, draft: Draft, train_step: int | None) -> None:
    """Steps, where they are known, or epochs.

    Args:
        given: the file.
        draft: the recipe.
        train_step: what DataFlex's schedule takes; None: LLaMA-Factory's fields decide.
    """
    most, epochs = given.integer("max_steps", -1), given.number("num_train_epochs")
    if train_step is None and most > 0:
        train_step = most
    elif train_step is not None and most > 0 and most != train_step:
        given.refuse("max_steps", f"the schedule of the data policy takes {train_step} steps; make both the same")
    if train_step is not None:
        draft.set(train_step=train_step, epochs=Code("None"))
    elif epochs is not None and epochs <= 0:
        given.refuse("num_train_epochs", "a number above 0 is expected")
    else:
        draft.set(epochs=None if epochs is None else float(epochs))


def cadence(given: Given, draft: Draft) -> None:
    """How often the run logs, saves and evaluates, and where its curves go."""
    draft.set(
        seed=given.integer("seed"),
        log_every=_steps(given, "logging_steps"),
        checkpoint_every=_steps(given, "save_steps"),
        keep=given.integer("save_total_limit"),
    )
    if given.has("data_seed") and given.integer("data_seed") != draft.fields.get("seed", 42):
        draft.note(given.place("data_seed"), "config.seed decides what is drawn too")
    given.raw("data_seed")
    when = given.text("eval_strategy", given.text("evaluation_strategy", "no"))
    every = _steps(given, "eval_steps")
    if draft.fields.get("data.valid_fraction") and when == "steps":
        draft.set(eval_every=every or draft.fields.get("log_every", 500))
    elif when != "no":
        reason = "evaluated are held-out rows (val_size), after each config.eval_every steps and the last"
        draft.note(given.place("eval_strategy"), reason, matters=False)
    trackers = given.names("report_to")
    if trackers == ("none",):
        draft.set(tensorboard=False)
    elif "wandb" in trackers:
        draft.note(given.place("report_to"), "--config.wandb_project=NAME sends the curves there", matters=False)
    resume = given.raw("resume_from_checkpoint")
    if isinstance(resume, str):
        given.refuse("resume_from_checkpoint", "import its weights: python -m dataflex_jax.export --import_from=DIR")
    if given.has("deepspeed"):
        _deepspeed(given, draft)


def _deepspeed(given: Given, draft: Draft) -> None:
    """Parameters are split in any case; what DeepSpeed's file says beside that is refused where it is not "auto"."""
    value = given.raw("deepspeed")
    path = Path(draft.located(value)) if isinstance(value, str) else None
    fields = value if path is None else read_object(path) if path.exists() else {}
    for name in ("optimizer", "scheduler"):
        if name in fields:
            given.refuse("deepspeed", f"it names the {name}; here it is AdamW with config.optim.schedule")
    clip = fields.get("gradient_clipping", "auto")
    if clip not in ("auto", draft.fields.get("optim.clip_norm", 1.0)):
        given.refuse("deepspeed", f"its gradient_clipping is {shown(clip)}; say so by max_grad_norm, and there 'auto'")
    unread = "" if path is None or path.exists() else f"; {path} is not here, and was not read"
    reason = f"config.mesh splits the parameters over all devices as ZeRO-3 does{unread}"
    draft.note(given.place("deepspeed"), reason, matters=bool(unread))


def _steps(given: Given, name: str) -> int | None:
    value = given.number(name)
    if value is not None and 0 < value < 1:
        given.refuse(name, "a share of the run; give it in steps")
    return None if value is None else given.integer(name)
