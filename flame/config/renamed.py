"""Options that have gone: what to write instead. And options of other trainers that are declined, with the reason."""

from __future__ import annotations

from collections.abc import Container

_SCHEDULE = ("start_step", "warmup_steps", "decay_steps")

RENAMED = {
    "future_encoder.enable": 'write objective.name = "future" (or "next_token" for false)',
    **{f"future_encoder.{name}": f"write objective.{name}, which holds for every objective" for name in _SCHEDULE},
    "objective.loss_weight": "write that of the objective's own section, such as mtp.loss_weight or future_encoder.loss_weight",
    "objective.mtp_tokens": "write mtp.tokens",
    "objective.window": "write top.window or fsp_bow.window",
    "training.skip_nan_inf": "write training.max_skipped_steps = 1 for false; leave it out for true",
    "training.gc_freq": "leave it out: Python's garbage is collected every 50 steps",
    "training.prefetch_factor": "leave it out: each worker keeps 4 packed sequences ready",
    "optimizer.eps": "leave it out: it is 1e-8",
    "checkpoint.folder": "leave it out: checkpoints are in checkpoint/ in job.dump_folder, which may be a link to another disk",
    "metrics.future_interval": "write metrics.diagnostics_interval",
}

DECLINED = {
    "tensor_parallel": "the layers of any architecture are taken whole",
    "expert_parallel": "the layers of any architecture are taken whole",
    "context_parallel": "the anti-causal pass needs whole documents on one rank",
    "pipeline_parallel": "the causal and the anti-causal pass of a step meet in one loss on each rank",
}


OWN_SECTIONS = {"future": "future_encoder"}
"""Of objectives whose section has another name than they have."""


def explain_absence(key: str, objective: object, known: Container[str]) -> str | None:
    """What to say of an option that was here once or is known elsewhere; None for one that nobody knows.

    Args:
        objective: `objective.name` as typed. Where each objective has an option of its own instead, its own is named.
        known: the options there are.
    """
    name = key.replace("-", "_")
    if name in RENAMED:
        section, _, option = name.partition(".")
        own = f"{OWN_SECTIONS.get(str(objective), objective)}.{option}"
        if section == "objective" and own in known:
            return f"this option is gone: write {own}"
        return f"this option is gone: {RENAMED[name]}"
    for kind, reason in DECLINED.items():
        if kind in name.rpartition(".")[2]:
            return (
                f"{kind.replace('_', ' ')} training is not supported, since {reason}: leave it out, even at 1; large models fit "
                "by training.data_parallel_shard_degree, activation_checkpoint.mode and training.cpu_offload"
            )
    return None
