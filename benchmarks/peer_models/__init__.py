"""Next-token steps of other trainers on a packed sequence. `benchmarks.peer_worker` runs one in a process of its own.

Each module has `build_step(shape, pack, options)`:

    shape: a Hugging Face Llama configuration, as a dict.
    pack: input_ids and labels, int64 [1, T], and cu_seqlens, int32 [S+1], on the GPU.
    options: of `benchmarks.peer_worker`.
    returns: forward and backward, without optimizer. Gradients are gone after it.
"""
