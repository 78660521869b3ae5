"""The names of the fields of LLaMA-Factory, its trainer and DataFlex, by what becomes of them."""

from typing import Any

# By reason: fields that a recipe does without and that leave the results as they are.
WITHOUT_EFFECT = {
    "what a run writes is in its run folder: python -m dataflex_jax.train --workdir=DIR": (
        "output_dir overwrite_output_dir logging_dir run_name plot_loss save_only_model save_safetensors "
        "save_on_each_node save_strategy"
    ),
    "the log is here the same for all": (
        "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node "
        "disable_tqdm include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second "
        "print_param_status skip_memory_metrics debug project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
        "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret"
    ),
    "processes find each other by SLURM, Open MPI or --coordinator": (
        "ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph "
        "local_rank master_addr master_port ray_init_kwargs ray_scope mp_parameters accelerator_config"
    ),
    "the parameters are split over all devices as ZeRO-3 does it; config.mesh": (
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap parallelism_config"
    ),
    "JAX takes the devices that there are and compiles for them": (
        "use_cpu no_cuda use_mps_device tf32 torch_compile torch_compile_backend torch_compile_mode jit_mode_eval "
        "enable_jit_checkpoint torchdynamo torch_empty_cache_steps tpu_num_cores tpu_metrics_debug low_cpu_mem_usage "
        "offload_folder device_map"
    ),
    "how a layer is computed is config.model.attention, config.model.remat and config.model.scan_layers": (
        "flash_attn enable_liger_kernel use_liger_kernel liger_kernel_config use_unsloth use_unsloth_gc "
        "gradient_checkpointing gradient_checkpointing_kwargs disable_gradient_checkpointing use_reentrant_gc "
        "activation_checkpointing activation_checkpointing_kwargs use_v1_kernels"
    ),
    "norms, softmax and losses are float32 always": "upcast_layernorm upcast_lmhead_output bf16_full_eval",
    "every text is tokenised once, into config.data.cache_dir": (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path data_shared_file_system "
        "streaming buffer_size cache_dir media_dir"
    ),
    "rows are read ahead by a thread": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns"
    ),
    "nobody's code is run": "trust_remote_code",
    "the tokenizer is its tokenizer.json": "use_fast_tokenizer split_special_tokens",
    "padding is never trained on": "ignore_pad_token_for_loss",
    "evaluated are the held-out rows of each domain": (
        "do_eval per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps eval_delay eval_on_start "
        "eval_on_each_dataset eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics "
        "include_inputs_for_metrics prediction_loss_only compute_accuracy metric_for_best_model greater_is_better "
        "label_names"
    ),
    "of no meaning without images, videos and sound": (
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
        "video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower freeze_multi_modal_projector"
    ),
    "of no meaning where nothing is generated": (
        "use_cache use_kv_cache infer_dtype infer_backend eval_num_beams generation_max_length generation_num_beams "
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank sglang_maxlen sglang_mem_fraction"
    ),
    "of no meaning without another field that is refused": (
        "quantization_method quantization_type double_quantization quantization_device_map loraplus_lr_embedding "
        "pissa_iter galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval "
        "badam_update_ratio badam_mask_mode badam_verbose asft_alpha eaft_alpha freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules fp8_backend fp8_enable_fsdp_float8_all_gather pref_beta "
        "pref_ftx pref_loss reward_model ref_model early_stopping_min_delta mixer_eval_dataset"
    ),
    "give the token to huggingface_hub: hf auth login": "hf_hub_token ms_hub_token om_hub_token hub_token",
    "a run is the same each time it is repeated": "full_determinism",
    "each row's loss is a mean over its own tokens": "average_tokens_across_devices",
    "the same command goes on with a run": "ignore_data_skip restore_callback_states_from_checkpoint",
}

# By reason: fields that would change the results, unless they have one of the values of `OFF`.
REFUSED = {
    "another training objective; instruction tuning and pretraining are what a recipe does": (
        "use_dft_loss use_asft_loss use_eaft_loss label_smoothing_factor neftune_noise_alpha do_predict "
        "predict_with_generate"
    ),
    "another optimizer; here it is AdamW": (
        "use_galore use_apollo use_badam use_adam_mini use_muon adafactor optim_args optim_target_modules "
        "lr_scheduler_kwargs loraplus_lr_ratio"
    ),
    "another form of adapters; here it is LoRA": (
        "use_dora pissa_init pissa_convert create_new_adapter oft_rank oft_block_size oft_target module_dropout"
    ),
    "the weights are not quantised": "quantization_bit fp8",
    "it is config.model.router_aux_loss_coef": "moe_aux_loss_coef",
    "the model would be another one": (
        "rope_scaling shift_attn mixture_of_depths use_llama_pro block_diag_attn model_max_length"
    ),
    "add the tokens to the tokenizer's files, and set config.model.resize_vocab": (
        "add_tokens add_special_tokens new_special_tokens_config"
    ),
    "name the parameters in config.model.trainable": "additional_target freeze_language_model freeze_gate",
    "the chat template of the tokenizer says it, or config.data.template": (
        "tool_format default_system preserve_thinking"
    ),
    "the step that is best is not known before the last; eval.jsonl has them all": (
        "load_best_model_at_end early_stopping_steps"
    ),
    "the batch is what config.data.batch_size says": "auto_find_batch_size dataloader_drop_last",
    "an order does that: see docs/algorithms.md": "disable_shuffling",
    "config.data.proportions says how often each domain comes": "interleave_probs",
    "another trainer": "use_mca use_megatron_bridge use_hyper_parallel use_kt",
    "a file of `llamafactory-cli export`; python -m dataflex_jax.export --checkpoint=MODEL --output=DIR does that": (
        "export_dir"
    ),
    "LLaMA-Factory's v1 format; read is the one with model_name_or_path": "model train_dataset peft_config dist_config",
    "a run is exported with python -m dataflex_jax.export": "push_to_hub",
}

# Fields that a recipe follows.
READ = (
    "do_train stage model_name_or_path model_revision train_from_scratch resize_vocab bf16 pure_bf16 fp16 "
    "fp16_backend fp16_opt_level fp16_full_eval half_precision_backend finetuning_type lora_rank lora_alpha "
    "lora_dropout lora_target use_rslora adapter_name_or_path adapter_folder dataset dataset_dir eval_dataset "
    "template enable_thinking cutoff_len max_samples val_size packing neat_packing train_on_prompt mask_history "
    "mix_strategy group_by_length length_column_name train_sampling_strategy per_device_train_batch_size "
    "per_gpu_train_batch_size gradient_accumulation_steps ray_num_workers learning_rate lr_scheduler_type "
    "warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim "
    "num_train_epochs max_steps seed data_seed logging_steps save_steps save_total_limit eval_strategy "
    "evaluation_strategy eval_steps report_to resume_from_checkpoint deepspeed train_type component_name "
    "components_cfg_file warmup_step update_step update_times train_step static_mix mixture_sample_rule "
    "init_mixture_proportions"
)

OFF: tuple[Any, ...] = (False, None, 0, "", "none")


def by_name(reasons: dict[str, str]) -> dict[str, str]:
    """Of `WITHOUT_EFFECT` or `REFUSED`: the reason of each field."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}
