"""Names of the trainer's own metrics. Imports nothing: metric writers are chosen before torch is loaded."""

from __future__ import annotations

MFU = ("mfu", "mfu_aux_forward", "mfu_heads")
CUDA_GRAPH_FRACTION = "cuda_graph_fraction"
SPEED_METRICS = (
    *MFU,
    "step_tflops",
    "peak_memory_gib",
    "data_wait_seconds",
    "data_wait_fraction",
    CUDA_GRAPH_FRACTION,
    "tokens_per_second",
    "step_seconds",
)
STEP_METRICS = ("loss", "ce_loss", "largest_ce_loss", "aux_loss", "grad_norm", "lr", "loss_weight")
