"""One file per DVC stage: read its params, call pipeline, write its outs."""

from pipeline.runtime.cpu import set_up_cpu
from pipeline.runtime.warm import hand_over

hand_over()
set_up_cpu()
