"""What the census' server loads before it forks: everything that costs seconds to import."""

import networkx as networkx
import torch._dynamo
import torch._inductor.compile_fx
import torch.export
import transformers

import ltepass as ltepass

torch.set_num_threads(1)  # before the first operation: a pool of threads does not outlive a fork
transformers.logging.set_verbosity_error()
transformers.AutoModelForCausalLM  # noqa: B018 -- transformers imports lazily
transformers.LlamaForCausalLM  # noqa: B018
