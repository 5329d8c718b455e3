"""Train causal language models that also predict a summary of their own future."""

import logging

# transformers imports torchao wherever it is installed, and that tells of kernels which it cannot load on this machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
