"""The arguments of transformers' Trainer that become no key of a recipe: needless ones, and those that are left.

Names of transformers 4.20 to 5.23; a test compares them with the arguments of the installed version.
"""

from __future__ import annotations

from .several_processes import STARTED_BY_A_LAUNCHER

_OWN_LOG = "a run's log has one form: metrics.jsonl, curve.png and a line for each log"
_NO_HUB = "nothing is uploaded"

NEEDLESS = {
    "do_train": "weitiao train does so",
    "predict_with_generate": "rows are always scored by generated answers",
    "remove_unused_columns": "rows keep what the program needs",
    "output_dir": "a run's folder is runs/NAME, by the recipe's name",
    "run_name": "a run is called by the recipe's name",
    "logging_dir": "a run's folder is runs/NAME, by the recipe's name",
    "logging_strategy": "train.log_every says it",
    "dataloader_num_workers": "rows are prepared on all cores",
    "dataloader_pin_memory": "rows are prepared on all cores",
    "dataloader_persistent_workers": "rows are prepared on all cores",
    "dataloader_prefetch_factor": "rows are prepared on all cores",
    "dataloader_multiprocessing_context": "rows are prepared on all cores",
    "dataloader_in_order": "the order of rows is the seed's",
    "dataloader_drop_last": "no row is left over: the last step of a pass may be smaller",
    "preprocessing_num_workers": "rows are prepared on all cores",
    "overwrite_cache": "rows are kept by their content and made anew when it changes",
    "group_by_length": "rows lie end to end, so that nothing is padded",
    "length_column_name": "rows lie end to end, so that nothing is padded",
    "train_sampling_strategy": "rows lie end to end, in an order that the seed draws",
    "sortish_sampler": "rows lie end to end, so that nothing is padded",
    "load_best_model_at_end": "the adapter with the best dev score is kept in best/",
    "skip_memory_metrics": "weitiao check --plan foretells memory",
    "average_tokens_across_devices": "the loss is one mean over the learnt tokens of a step",
    "use_cache": "the cache serves generation alone",
    "use_reentrant": "checkpoints are never reentrant",
    "gradient_checkpointing_kwargs": "checkpoints are never reentrant",
    "activation_checkpointing_kwargs": "checkpoints are never reentrant",
    "data_seed": "train.seed draws the order too",
    "logging_nan_inf_filter": "a loss that is no number is always an error",
    "label_names": "what is learnt is the answer",
    "local_rank": "torchrun tells it",
}

LEFT = {
    **dict.fromkeys(
        (
            *("deepspeed", "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
            *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
            *("ddp_static_graph", "ddp_timeout", "sharded_ddp", "accelerator_config", "parallelism_config"),
            *("dispatch_batches", "split_batches", "save_on_each_node", "log_on_each_node", "log_level_replica"),
            *("tpu_num_cores", "tpu_metrics_debug", "mp_parameters", "xpu_backend", "include_num_input_tokens_seen"),
        ),
        STARTED_BY_A_LAUNCHER,
    ),
    **dict.fromkeys(
        (
            *("log_level", "logging_first_step", "disable_tqdm", "debug", "project", "trackio_space_id"),
            *("trackio_bucket_id", "trackio_static_space_id", "include_tokens_per_second"),
        ),
        _OWN_LOG,
    ),
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
        ),
        _NO_HUB,
    ),
    "overwrite_output_dir": "a run is never overwritten: choose another name, or delete runs/NAME",
    "resume_from_checkpoint": "a checkpoint of another program cannot be gone on with; an adapter can be a start: "
    "model.adapter",
    "ignore_data_skip": "a run that goes on sees what it would have seen",
    "restore_callback_states_from_checkpoint": "weitiao train --resume goes on exactly where it stopped",
    "full_determinism": "only the seed is fixed",
    "save_only_model": "a checkpoint holds all that is needed to go on",
    "save_safetensors": "weights are always written as safetensors",
    "enable_jit_checkpoint": "Ctrl-C saves and leaves",
    "past_index": "models with a memory of their own are not known",
    "label_smoothing_factor": "the loss is the plain cross-entropy",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "optim_args": "optimisers have no arguments but weight_decay",
    "optim_target_modules": "the optimiser updates all that learns",
    "adam_beta1": "AdamW's betas are torch's own, 0.9 and 0.999",
    "adam_beta2": "AdamW's betas are torch's own, 0.9 and 0.999",
    "adam_epsilon": "AdamW's epsilon is torch's own, 1e-8",
    "adafactor": "off",
    "lr_scheduler_kwargs": "schedules have no arguments",
    "auto_find_batch_size": "train.batch_size means rows of a step; train.tokens_per_pass is what memory allows",
    "torch_empty_cache_steps": "memory is not given back between steps",
    "torch_compile_backend": "layers are compiled by torch's own backend",
    "torch_compile_mode": "layers are compiled in torch's own mode",
    "torchdynamo": "layers are compiled by torch's own backend",
    "use_liger_kernel": "the loss of learnt tokens alone is weitiao's own",
    "liger_kernel_config": "the loss of learnt tokens alone is weitiao's own",
    "use_ipex": "torch itself is used",
    "jit_mode_eval": "torch itself is used",
    "tf32": "the precision of float32 is torch's own",
    "half_precision_backend": "precision is that of model.dtype",
    "fp16_opt_level": "precision is that of model.dtype",
    "fp16_backend": "precision is that of model.dtype",
    "fp16_full_eval": "precision is that of model.dtype",
    "bf16_full_eval": "precision is that of model.dtype",
    "use_cpu": "the GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "no_cuda": "the GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "use_mps_device": "Apple's GPU is not used so far",
    "eval_delay": "the dev rows are scored from the start",
    "eval_on_start": "weitiao evaluate scores the base model beside the tuned one",
    "eval_accumulation_steps": "scores are summed row by row",
    "eval_do_concat_batches": "scores are summed row by row",
    "eval_use_gather_object": "scores are summed row by row",
    "batch_eval_metrics": "scores are summed row by row",
    "include_for_metrics": "metrics see the row, its label and the answer",
    "include_inputs_for_metrics": "metrics see the row, its label and the answer",
    "prediction_loss_only": "rows are scored by generated answers; the loss is told too",
    "metric_for_best_model": "evaluate.best_by names a figure of a task, such as overall or topics.accuracy",
    "greater_is_better": "evaluate.best_by takes a minus before a figure of which less is better",
    "do_predict": "weitiao evaluate and weitiao predict do so after training",
    "generation_max_length": "generate.max_new_tokens counts the answer alone",
    "generation_num_beams": "an answer is written token by token, without beams",
}
