"""What must be set before torch and transformers are imported, and what is changed in them: here
and nowhere else, each with its reason. Imported first by every script that uses a model.
"""

import os
import sys

# Caches and batches change their size from step to step, which cuts a GPU's memory to pieces.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# A run on the CPU must not see the GPU: transformers takes a GPU's kernels (fla, causal-conv1d)
# wherever torch sees one, and calls them on CPU tensors. The flags are read before anything parses
# them, since importing transformers decides it.
given = " ".join(sys.argv[1:]).replace("=", " ")
is_toy = "--toy" in sys.argv or os.path.basename(os.path.dirname(sys.argv[0])) == "toy"
if "--device cpu" in given or is_toy:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

if not torch.cuda.is_available():
    # transformers/integrations/hub_kernels.py, use_kernel_func_from_hub_with_fallback: it asks
    # whether the package is installed, not whether there is a GPU.
    sys.modules.update(fla=None, causal_conv1d=None)

# cuDNN's attention is preferred on Hopper. It makes a plan for every new length, which costs more
# than it saves here, and gave NaN with some masks (github.com/pytorch/pytorch/issues/139298).
torch.backends.cuda.enable_cudnn_sdp(False)

from transformers.integrations import sdpa_attention  # noqa: E402

# Decoding a token, transformers packs the query heads that share a key (pack_gqa), but not where
# it is compiled: there it repeats keys and values for every query head, and reading these is what
# decoding waits for (transformers/integrations/sdpa_attention.py, sdpa_attention_forward).
sdpa_attention.is_torchdynamo_compiling = lambda: False
